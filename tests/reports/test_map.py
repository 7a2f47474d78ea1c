"""The page of a map, in a real browser."""

import numpy as np
import pytest

from clipkit.reports.map import Cluster, MapPage, render_map
from tests.helpers.browser import WAIT, become, chromium, expect, missing
from tests.helpers.toys import square

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
NASTY = "<img src=x onerror=window.harmed=1>"
LIT = "[0, 1, 2, 3].filter(lit).join()"
PIXEL = """((x, y) => [...pen.getImageData(
    ...toScreen(x, y).map(v => Math.floor(v * devicePixelRatio)), 1, 1).data])"""
# The slow obvious way: the canvas draws each square itself, in the same order.
SQUARES = """([width, height, at, faint]) => {
    const count = 4000, clusters = 5, colours = [];
    let seed = 1;
    const random = () => (seed = seed * 16807 % 2147483647) / 2147483647;
    for (let n = 0; n < clusters; n++) colours.push([n * 60, 255 - n * 50, n % 2 * 200]);
    const places = Uint16Array.from({ length: 2 * count }, () => 65535 * random());
    const cluster = Uint16Array.from({ length: count }, () => clusters * random());
    const lit = Uint8Array.from({ length: count }, () => random() < faint ? 0 : 1);

    const image = new ImageData(width, height), pixels = new Int32Array(image.data.buffer);
    pixels.fill(0xff000000 | 28 << 16 | 23 << 8 | 20);
    new Points(places, cluster, colours).draw(pixels, width, height, at, lit);

    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const ink = canvas.getContext("2d");
    ink.fillStyle = "rgb(20 23 28)";
    ink.fillRect(0, 0, width, height);
    for (const [pass, opacity] of [[0, 0.08], [1, 0.85]])
      for (let n = 0; n < clusters; n++) {
        ink.fillStyle = `rgb(${colours[n].join(" ")})`;
        ink.globalAlpha = opacity;
        for (let i = 0; i < count; i++) {
          if (cluster[i] !== n || lit[i] !== pass) continue;
          ink.fillRect(at.left + at.unit * places[2 * i] - at.size / 2,
            at.top + at.unit * places[2 * i + 1] - at.size / 2, at.size, at.size);
        }
      }
    const found = ink.getImageData(0, 0, width, height).data;
    const apart = found.map((value, n) => Math.abs(value - image.data[n]));
    const ground = [...new Uint32Array(found.buffer)].filter((one) => one === 0xff1c1714).length;
    return { drawn: 1 - ground / (width * height), most: apart.reduce((a, b) => Math.max(a, b)),
      mean: apart.reduce((a, b) => a + b) / apart.length };
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture
def page(browser, tmp_path):
    """Four points in the corners of a map."""
    square("red").save(tmp_path / "a.png")
    text = render_map(
        MapPage(
            title="four",
            lead="four points",
            places=np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32),
            clusters=np.array([0, 0, 1, 1]),
            names=[Cluster("above", 0.5, 0, 2), Cluster(NASTY, 0.5, 1, 2)],
            keys=["a.png", "gone.png", "c.png", NASTY],
            captions=["a red square", "", "a dog", NASTY],
            images=["a.png", "gone.png", "", ""],
        )
    )
    (tmp_path / "map.html").write_text(text, encoding="utf-8")
    one = browser.new_page(viewport={"width": 1000, "height": 700})
    one.set_default_timeout(WAIT)
    wrong = []
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.goto((tmp_path / "map.html").as_uri())
    yield one
    assert one.evaluate("window.harmed") is None
    assert not wrong
    one.close()


def point_at(page, x, y):
    """Move the mouse over a place of the map, in [0, 1]²."""
    box = page.locator("#map").bounding_box()
    left, top = page.evaluate(f"toScreen({x}, {y})")
    page.mouse.move(box["x"] + left, box["y"] + top)


def test_pointing_at_an_item_shows_its_image_and_texts(page):
    card = page.locator("#card")
    expect(card).to_be_hidden()
    point_at(page, 0, 0)
    expect(card).to_have_js_property("innerText", "a red square\na.png")
    become(page, "document.querySelector('#card img').naturalWidth === 8")
    point_at(page, 1, 0)  # its file is gone
    become(page, "document.querySelector('#card img').hidden")
    point_at(page, 1, 1)
    expect(card).to_contain_text(NASTY)
    point_at(page, 0.5, 0.5)
    expect(card).to_be_hidden()


def test_words_and_clusters_choose_what_is_lit(page):
    page.get_by_label("Find").fill("DOG")
    expect(page.locator("#count")).to_have_text("1 of 4")
    become(page, f"{LIT} === '2'")
    page.get_by_label("Find").fill("")
    become(page, f"{LIT} === '0,1,2,3'")
    page.get_by_role("button", name="above").click()
    become(page, f"{LIT} === '2,3'")
    point_at(page, 1, 1)
    expect(page.locator("#card")).to_be_visible()
    point_at(page, 0, 0)  # not lit
    expect(page.locator("#card")).to_be_hidden()


def test_the_map_zooms_and_moves(page):
    point_at(page, 0.2, 0.2)
    under = page.evaluate("toScreen(0.2, 0.2)")
    page.mouse.wheel(0, -500)
    become(page, "view.zoom > 1")
    assert page.evaluate("toScreen(0.2, 0.2)") == pytest.approx(under, abs=1)
    x = page.evaluate("view.x")
    page.mouse.down()
    page.mouse.move(500, 300)
    page.mouse.up()
    become(page, "view.x !== it", x)
    page.locator("#map").press("0")
    become(page, "view.zoom === 1 && view.x === 0.5 && view.y === 0.5")


def test_the_points_are_drawn_in_their_colours(page):
    red, green, blue = page.evaluate("colour(0)")
    expected = [255 + 0.85 * (value - 255) for value in (red, green, blue)]
    become(page, f"{PIXEL}(0, 0)[0] !== 255")
    assert page.evaluate(f"{PIXEL}(0, 0).slice(0, 3)") == pytest.approx(expected, abs=2)
    assert page.evaluate(f"{PIXEL}(0.5, 0.5)") == [255, 255, 255, 255]
    # The same colours as CSS names them.
    assert (red, green, blue) == tuple(
        page.evaluate(
            """() => {
                const one = document.createElement("i");
                one.style.color = "hsl(210 62% 56%)";
                document.body.append(one);
                return getComputedStyle(one).color.match(/\\d+/g).map(Number);
            }"""
        )
    )


@pytest.mark.parametrize(
    ("at", "faint"),
    [
        ({"left": 10.3, "top": 20.7, "unit": 180 / 65535, "size": 1.5}, 0),
        ({"left": -70.1, "top": -33.9, "unit": 400 / 65535, "size": 3.7}, 0.5),
        ({"left": -500, "top": -400, "unit": 1500 / 65535, "size": 9}, 1),
    ],
)
def test_points_look_as_the_canvas_would_draw_them(page, at, faint):
    found = page.evaluate(SQUARES, [211, 197, at, faint])
    assert found["drawn"] > 0.1
    assert found["mean"] < 0.3
    assert found["most"] <= 8  # where many lie over each other, roundings add up
