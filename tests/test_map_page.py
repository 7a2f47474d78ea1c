"""The page of a map, in a real browser."""

import numpy as np
import pytest
from browser import chromium, missing
from toys import square

from clipkit.pages.map import Cluster, MapPage, render_map

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
NASTY = "<img src=x onerror=window.harmed=1>"


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
            pictures=["a.png", "gone.png", "", ""],
        )
    )
    (tmp_path / "map.html").write_text(text, encoding="utf-8")
    one = browser.new_page(viewport={"width": 1000, "height": 700})
    one.set_default_timeout(10_000)
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


def test_pointing_at_an_item_shows_its_picture_and_texts(page):
    card = page.locator("#card")
    assert card.is_hidden()
    point_at(page, 0, 0)
    assert card.inner_text().split("\n") == ["a red square", "a.png"]
    page.wait_for_function("document.querySelector('#card img').naturalWidth === 8")
    point_at(page, 1, 0)  # its file is gone
    page.wait_for_function("document.querySelector('#card img').hidden")
    point_at(page, 1, 1)
    assert NASTY in card.inner_text()
    point_at(page, 0.5, 0.5)
    assert card.is_hidden()


def test_words_and_clusters_choose_what_is_lit(page):
    page.get_by_label("Find").fill("DOG")
    assert page.locator("#count").inner_text() == "1 of 4"
    assert page.evaluate("[0, 1, 2, 3].filter(lit)") == [2]
    page.get_by_label("Find").fill("")
    page.get_by_role("button", name="above").click()
    assert page.evaluate("[0, 1, 2, 3].filter(lit)") == [2, 3]
    point_at(page, 0, 0)
    assert page.locator("#card").is_hidden()


def test_the_map_zooms_and_moves(page):
    before = page.evaluate("[view.zoom, view.x]")
    point_at(page, 0.2, 0.2)
    under = page.evaluate("toScreen(0.2, 0.2)")
    page.mouse.wheel(0, -500)
    page.wait_for_function(f"view.zoom > {before[0]}")
    assert page.evaluate("toScreen(0.2, 0.2)") == pytest.approx(under, abs=1)
    page.mouse.down()
    page.mouse.move(500, 300)
    page.mouse.up()
    assert page.evaluate("view.x") != before[1]
    page.locator("#map").press("0")
    assert page.evaluate("[view.zoom, view.x, view.y]") == [1, 0.5, 0.5]


def test_the_points_are_drawn_in_their_colours(page):
    page.wait_for_function(
        """() => [[0, 0], [1, 1]].every(([x, y]) => {
            const ratio = window.devicePixelRatio, at = toScreen(x, y).map((v) => v * ratio);
            return pen.getImageData(...at, 1, 1).data[3] > 0;
        })"""
    )
    empty = "pen.getImageData(...toScreen(0.5, 0.5), 1, 1).data[3]"
    assert page.evaluate(empty) == 0
