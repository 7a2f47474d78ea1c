"""The page, in a real browser."""

import json
import threading
import time
from urllib.parse import urlencode
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.tasks.index import build_index, remove_items
from tests.helpers.browser import WAIT, become, chromium, expect, missing
from tests.helpers.toys import COLOURS, png, square
from tests.helpers.web_toys import ServedEncoder, application, build, running

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
SCRIPT = "<img src=x onerror=window.harmed=1><script>window.harmed=1</script>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """160 squares of eight colours; the address, and the encoder behind it."""
    encoder = ServedEncoder()
    index = build(tmp_path_factory.mktemp("page"), per_colour=20)
    with running(application(index, encoder=encoder)[0]) as port:
        yield f"http://127.0.0.1:{port}", encoder


@pytest.fixture
def address(served):
    return served[0]


@pytest.fixture
def encoder(served):
    yield served[1]
    served[1].gate.set()


@pytest.fixture
def page(browser, address):
    """A fresh page; whatever it fetched elsewhere, refused to run or threw fails the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    context.set_default_timeout(WAIT)
    one = context.new_page()
    wrong = []
    one.on("request", lambda request: wrong.append(request.url) if foreign(request) else None)
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.on("console", lambda line: wrong.append(line.text) if "Policy" in line.text else None)

    def foreign(request):
        return not request.url.startswith((address, "blob:", "http://127.0.0.1"))

    yield one
    one.unroute_all(behavior="wait")  # an answer may still be on its way to a handler of a test
    context.close()
    assert not wrong


def shown(page):
    """Keys of the tiles, in order."""
    return page.eval_on_selector_all("#grid .open", "all => all.map(one => one.title)")


def wait_for(page, colour, count=1):
    """Wait until the first tiles are of a colour."""
    page.wait_for_function(
        """([colour, count]) => {
            const all = [...document.querySelectorAll("#grid .open")].slice(0, count);
            return all.length === count && all.every(one => one.title.startsWith(colour + "/"));
        }""",
        arg=[colour, count],
    )


def wait_for_image(page, selector):
    """Wait until an image has been loaded."""
    become(page, "document.querySelector(it)?.naturalWidth > 0", selector)


def wait_for_focus(page, title):
    """Wait until a tile has the focus."""
    become(page, "document.activeElement.title === it", title)


def expected(address, **query):
    """The first keys that the API gives."""
    with urlopen(f"{address}/search?{urlencode({**query, 'k': 5}, doseq=True)}") as answer:
        return [hit["key"] for hit in json.load(answer)["hits"]]


def wait_until(page, keys):
    """Wait until the first tiles are of these keys."""
    page.wait_for_function(
        """(keys) => keys.every((key, n) =>
            document.querySelectorAll("#grid .open")[n]?.title === key)""",
        arg=keys,
    )


def test_typing_shows_the_right_images(page, address):
    page.goto(address)
    wait_for(page, "black")  # the first in the index
    expect(page.locator("#status")).to_contain_text("160 images")
    page.keyboard.type("a red square")  # the field has the focus
    # Half of it may be asked for before the rest is typed.
    expect(page.locator("#status")).to_contain_text("best first for “a red square”")
    wait_for(page, "red", 3)
    expect(page).to_have_url(f"{address}/?q=a+red+square")
    wait_for_image(page, "#grid img")
    page.fill("#q", 'blue -cyan -"a green thing"')
    wait_until(page, expected(address, q="blue", minus=["cyan", "a green thing"]))
    page.fill("#minus", "magenta, black")
    minus = ["cyan", "a green thing", "magenta", "black"]
    wait_until(page, expected(address, q="blue", minus=minus))


def test_an_answer_that_comes_late_is_dropped(page, address, encoder):
    page.goto(address)
    wait_for(page, "black")
    encoder.gate.clear()
    page.fill("#q", "red late")
    deadline = time.monotonic() + WAIT / 1000
    while ["red late"] not in encoder.calls:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    page.wait_for_selector("#progress:not([hidden])")
    page.fill("#q", "blue late")
    become(page, "location.search.includes('blue')")
    threading.Timer(0.3, encoder.gate.set).start()
    wait_for(page, "blue", 3)
    page.wait_for_selector("#progress", state="hidden")
    expect(page.locator("#q")).to_have_value("blue late")


def test_a_click_right_after_typing_meets_its_image(page, address):
    page.goto(address)
    page.fill("#q", "red")
    expect(page.locator("#status")).to_contain_text("best first for “red”")
    page.hover("#grid .open")
    page.mouse.down()  # takes the focus from the field, whose words have been searched for
    page.wait_for_timeout(300)
    page.mouse.up()
    page.wait_for_selector("#details[open]")


def test_an_image_that_is_open_stays_among_its_own(page, address, encoder):
    page.goto(f"{address}/?q=red")
    wait_for(page, "red", 3)
    first, second, *_ = shown(page)
    encoder.gate.clear()
    page.fill("#q", "blue meanwhile")
    page.wait_for_selector("#progress:not([hidden])")
    page.click("#grid .open")
    page.wait_for_selector("#details[open]")
    encoder.gate.set()
    wait_for(page, "blue", 3)
    expect(page.locator("#details-name")).to_have_text(first)
    page.keyboard.press("ArrowRight")
    expect(page.locator("#details-name")).to_have_text(second)


def test_an_image_is_sent_from_the_disk(page, address, tmp_path):
    (tmp_path / "mine.png").write_bytes(png(square("green")))
    page.goto(address)
    page.set_input_files("#file", tmp_path / "mine.png")
    wait_for(page, "green", 3)
    become(page, "location.search.startsWith('?image=')")
    expect(page.locator("#chips span")).to_have_text("your image")
    name = page.evaluate("location.search").partition("image=")[2]
    page.fill("#q", "red")
    both = expected(address, q="red", image=name)
    assert both != expected(address, image=name) != expected(address, q="red")
    wait_until(page, both)
    page.reload()
    wait_until(page, both)
    page.click("#chips button")
    wait_for(page, "red", 3)


def test_an_image_is_dropped_and_pasted(page, address):
    page.goto(address)
    wait_for(page, "black")
    give = """([kind, data]) => {
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(data)], "a.png", { type: "image/png" }));
        const name = kind === "drop" ? "dataTransfer" : "clipboardData";
        const made = kind === "drop" ? new DragEvent("drop", { dataTransfer: files })
          : new ClipboardEvent("paste", { clipboardData: files });
        window.dispatchEvent(made);
    }"""
    for kind, colour in (("drop", "cyan"), ("paste", "magenta")):
        page.evaluate(give, [kind, list(png(square(colour)))])
        wait_for(page, colour, 3)


def test_what_is_no_image_is_refused_in_words(page, address, tmp_path):
    (tmp_path / "page.png").write_text(SCRIPT)
    page.goto(address)
    page.set_input_files("#file", tmp_path / "page.png")
    expect(page.locator("#problem-text")).to_contain_text("is not an image of a known format")
    page.wait_for_selector("#problem:not([hidden])")
    page.click("#chips button")
    page.wait_for_selector("#problem", state="hidden")


def test_the_back_button_goes_back(page, address):
    page.goto(address)
    page.fill("#q", "red")
    wait_for(page, "red", 3)
    page.press("#q", "Enter")
    page.fill("#q", "green")
    wait_for(page, "green", 3)
    page.hover(".tile")
    page.click(".tile .more")
    expect(page.locator("#status")).to_contain_text("best first like that image")
    expect(page.locator("#chips li")).to_have_count(1)
    wait_for(page, "green", 3)
    expect(page.locator("#q")).to_have_value("")
    page.go_back()
    expect(page.locator("#q")).to_have_value("green")
    expect(page.locator("#chips li")).to_have_count(0)
    expect(page.locator("#status")).to_contain_text("best first for “green”")
    wait_for(page, "green", 3)
    page.go_back()
    wait_for(page, "red", 3)
    expect(page.locator("#q")).to_have_value("red")
    page.go_forward()
    wait_for(page, "green", 3)


def test_an_address_holds_the_whole_search(page, address):
    where = "where=label+in+%28%27blue%27%2C+%27green%27%29"
    query = f"q=a+thing&minus=red&{where}&unlike=cyan%2Fcyan-0.png"
    page.goto(f"{address}/?{query}")
    expect(page.locator("#status")).to_contain_text("40 images")
    expect(page.locator("#chips li")).to_have_count(2)
    expect(page.locator("#grid .open")).to_have_count(40)
    assert {key.split("/")[0] for key in shown(page)} == {"green", "blue"}
    expect(page.locator("#minus")).to_have_value("red")
    expect(page).to_have_url(f"{address}/?{query}")


def test_everything_goes_by_keyboard(page, address):
    page.goto(f"{address}/?q=red")
    wait_for(page, "red", 3)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    wait_for_focus(page, shown(page)[1])
    page.keyboard.press("ArrowDown")
    across = page.evaluate(
        "getComputedStyle(document.querySelector('#grid')).gridTemplateColumns.split(' ').length"
    )
    wait_for_focus(page, shown(page)[1 + across])
    page.keyboard.press("Enter")
    page.wait_for_selector("#details[open]")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#details-name")).to_have_text(shown(page)[2 + across])
    page.keyboard.press("Escape")
    # The browser tells of a closed dialog in a task of its own, after the dialog is hidden.
    wait_for_focus(page, shown(page)[2 + across])
    page.keyboard.press("x")
    page.wait_for_selector("#chips li.less")
    become(page, "document.activeElement === document.querySelector('#grid .open')")
    page.keyboard.press("ArrowRight")
    wait_for_focus(page, shown(page)[1])
    page.keyboard.press("?")
    page.wait_for_selector("#help[open]")


def test_scrolling_shows_the_rest(page, address):
    page.goto(f"{address}/?q=red")
    wait_for(page, "red", 3)
    for count in (120, 160):
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        become(page, "document.querySelectorAll('.tile').length >= it", count)
    expect(page.locator("#end")).to_have_text("All 160 images are shown.")
    assert len(set(shown(page))) == 160


def test_a_tall_screen_is_filled(page, address):
    def later(route):
        expect(page.locator("#collection")).not_to_be_empty()  # what is told by /info
        route.continue_()

    page.set_viewport_size({"width": 400, "height": 9000})
    page.route("**/search?*offset=0*", later)
    page.goto(f"{address}/?q=red")
    expect(page.locator("#grid .open")).to_have_count(160)


def test_a_list_without_end_ends_with_advice(page, address):
    def shorter(route):
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "max_hits": 120})

    page.route("**/info", shorter)
    page.goto(f"{address}/?q=red")
    wait_for(page, "red", 3)
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    advice = "These are the first 120 of 160 images. Add words or a filter"
    expect(page.locator("#end")).to_contain_text(advice)
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_timeout(300)
    assert page.locator(".tile").count() == 120


def test_nothing_found_is_said(page, address):
    page.goto(f"{address}/?q=red&where=label%3D%27violet%27")
    expect(page.locator("#status")).to_have_text("No image with this filter.")
    expect(page.locator(".tile")).to_have_count(0)
    page.goto(f"{address}/?q=red&where=colour%3D%27violet%27")
    page.wait_for_selector("#problem:not([hidden])")
    expect(page.locator("#problem-text")).to_contain_text("there is no column 'colour'")


def test_columns_choose_images(page, address):
    page.goto(f"{address}/?q=red")
    page.click("#filter-button")
    page.click("fieldset:has-text('label') label:has-text('blue')")
    wait_for(page, "blue", 3)
    expect(page.locator("#status")).to_contain_text("20 images with this filter")
    expect(page.locator("[name=where]")).to_have_value("label = 'blue'")
    page.click("fieldset:has-text('folder') label:has-text('cyan')")
    expect(page.locator("#status")).to_contain_text("No image with this filter")
    page.click("fieldset:has-text('label') label:has-text('cyan')")
    wait_for(page, "cyan", 3)
    condition = "label in ('blue', 'cyan') and folder = 'cyan'"
    expect(page.locator("[name=where]")).to_have_value(condition)
    expect(page.locator("#chips span")).to_have_text(
        ["label in ('blue', 'cyan')", "folder = 'cyan'"]
    )
    page.reload()
    page.click("#filter-button")
    checked = page.locator("#filters :checked")
    assert checked.evaluate_all("all => all.map(one => one.value)") == ["blue", "cyan", "cyan"]
    page.click("#chips li:first-child button")
    page.click("#chips button")
    wait_for(page, "red", 3)
    expect(page.locator("#filters :checked")).to_have_count(0)


def test_a_condition_is_written_by_hand_and_completed_by_controls(page, address):
    page.goto(f"{address}/?q=red")
    page.click("#filter-button")
    page.fill("[name=where]", "label = 'blue' or label = 'green'")
    page.press("[name=where]", "Enter")
    expect(page.locator("#status")).to_contain_text("40 images with this filter")
    page.click("fieldset:has-text('folder') label:has-text('green')")
    wait_for(page, "green", 3)
    expect(page.locator("[name=where]")).to_have_value(
        "folder = 'green' and (label = 'blue' or label = 'green')"
    )
    page.fill("[name=where]", "label = ")
    page.press("[name=where]", "Enter")
    expect(page.locator("#problem-text")).to_contain_text("expected columns compared with values")


def test_controls_of_every_kind_write_conditions(page, tmp_path):
    rows = {
        "image": [png(square(colour)) for colour in COLOURS],
        "caption": list(COLOURS),
        "year": list(range(2018, 2018 + len(COLOURS))),
        "in": [n % 2 == 0 for n in range(len(COLOURS))],
        "day": pa.array([f"2023-05-{n + 1:02}" for n in range(len(COLOURS))]).cast(pa.date32()),
        "long note": [f"{colour}'s " + "note " * 40 for colour in COLOURS],
    }
    pq.write_table(pa.table(rows), tmp_path / "table.parquet")
    index = build_index(tmp_path / "table.parquet", tmp_path / "index", encoder=ServedEncoder())
    with running(application(index.path)[0]) as port:
        page.goto(f"http://127.0.0.1:{port}/")
        page.click("#filter-button")
        page.fill("[aria-label='year from']", "2020")
        page.fill("[aria-label='day up to']", "2023-05-07")
        page.fill("[aria-label='long note contains']", "E's")
        page.click("fieldset:has-text('in') label:has-text('true')")
        condition = "day <= '2023-05-07' and `in` = true and 'E''s' in `long note` and year >= 2020"
        expect(page.locator("[name=where]")).to_have_value(condition)
        names = [name for n, name in enumerate(COLOURS) if 2 <= n <= 6 and n % 2 == 0]
        total = sum(name.endswith("e") for name in names)
        expect(page.locator("#grid .open")).to_have_count(total)
        page.reload()
        page.click("#filter-button")
        expect(page.locator("[aria-label='long note contains']")).to_have_value("E's")
        expect(page.locator("[aria-label='year from']")).to_have_value("2020")
        expect(page.locator("[aria-label='day up to']")).to_have_value("2023-05-07")
        expect(page.locator("#filters :checked")).to_have_count(1)


def test_labels_give_bars_and_prompts_are_compared(page, address):
    page.goto(f"{address}/?q=red&view=classify")
    page.fill("[name=labels]", "red thing\nblue thing\ngreen thing")
    page.click(".ask button")
    expect(page.locator(".card")).to_have_count(24)
    expect(page.locator(".card .guess.first .label").first).to_have_text("red thing")
    page.fill("[name=other]", "{} blue blue blue blue")
    page.click(".ask button")
    page.wait_for_selector(".fill.second")
    note = page.locator("#classify-view > .name")
    expect(note).to_contain_text("The two sets of prompts disagree on")
    page.reload()
    page.wait_for_selector(".fill.second")
    expect(page.locator("[name=labels]")).to_have_value("red thing\nblue thing\ngreen thing")
    page.fill("[name=labels]", "one")
    page.click(".ask button")
    page.wait_for_selector("#problem:not([hidden])")


def test_a_stopped_server_is_reported_and_retried(page, address):
    page.goto(address)
    wait_for(page, "black")
    page.route("**/search?*", lambda route: route.abort())
    page.fill("#q", "red")
    page.wait_for_selector("#problem:not([hidden])")
    expect(page.locator("#problem-text")).to_contain_text("does not respond")
    page.unroute("**/search?*")
    page.click("#again")
    wait_for(page, "red", 3)
    expect(page.locator("#problem")).to_be_hidden()


def test_no_good_match_is_said_plainly(page, address):
    def none(route):
        answer = route.fetch()
        body = answer.json()
        body |= {"matched": False, "any_match": 0.21}
        for hit in body["hits"]:
            hit["probability"] = 0.034
        route.fulfill(response=answer, json=body)

    page.route("**/search?*", none)
    page.goto(f"{address}/?q=red")
    wait_for(page, "red", 3)
    said = "No good match for “red”: the ten best hits hold one with a probability of 21 %."
    expect(page.locator("#status")).to_contain_text(said)
    expect(page.locator(".match b").first).to_have_text("3 %")
    assert "matches with a probability of 3 %" in page.get_attribute(".open", "aria-label")


def test_script_in_names_captions_and_columns_is_shown_as_text(page, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    name = SCRIPT.replace("/", "") + ".png"
    for one in (name, "b.png"):
        square("red").save(folder / one)
    rows = [f'"{name}","{SCRIPT}","{SCRIPT}"', 'b.png,"two","plain"']
    (folder / "metadata.csv").write_text("file_name,caption,label\n" + "\n".join(rows))
    index = build_index(folder, tmp_path / SCRIPT.replace("/", ""), encoder=ServedEncoder())
    with running(application(index.path)[0]) as port:
        page.goto(f"http://127.0.0.1:{port}/?q={SCRIPT}&labels={SCRIPT}%0Ab&where='<img' in label")
        expect(page.locator(".tile .name").first).to_have_text(SCRIPT)
        page.click("#filter-button")
        page.click(".tile .open")
        page.wait_for_selector("#details[open]")
        expect(page.locator("#details-captions")).to_have_text(SCRIPT)
        wait_for_image(page, "#details-image")
        page.keyboard.press("Escape")
        page.click("[data-view=classify]")
        page.wait_for_selector(".card")
        page.wait_for_timeout(200)
        assert page.evaluate("window.harmed") is None
        assert page.locator("main script, header script, img[src=x]").count() == 0


def test_images_inside_a_table_are_shown_and_named_where_it_is_gone(page, tmp_path):
    rows = {"image": [png(square(c)) for c in COLOURS], "caption": list(COLOURS)}
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table(rows), table)
    index = build_index(table, tmp_path / "index", encoder=ServedEncoder())
    with running(application(index.path)[0]) as port:
        page.goto(f"http://127.0.0.1:{port}/?q=red")
        wait_for_image(page, "#grid img")
        page.click(".tile .open")
        wait_for_image(page, "#details-image")
    table.unlink()
    with running(application(index.path)[0]) as port:
        page.goto(f"http://127.0.0.1:{port}/?q=red")
        page.wait_for_selector(".tile.lost")
        expect(page.locator("#status")).to_contain_text("No image can be shown: ")
        expect(page.locator("#status")).to_contain_text("table.parquet is not there any more")
        expect(page.locator("#grid img")).to_have_count(0)
        expect(page.locator(".tile .name").first).to_have_text("red")
        page.click(".tile .open")
        expect(page.locator("#details-lost")).to_contain_text("is not there any more")


def test_a_tile_says_why_it_has_no_image(page, tmp_path):
    index = build(tmp_path, per_colour=1)
    (tmp_path / "photos" / "red" / "red-0.png").unlink()
    with running(application(index)[0]) as port:
        page.goto(f"http://127.0.0.1:{port}/?q=red")
        name = page.locator(".tile.lost .lost-name")
        expect(name).to_contain_text("the file of red/red-0.png is gone")
        expect(name).to_be_visible()


@pytest.mark.parametrize("width", [320, 390, 768, 1600])
@pytest.mark.parametrize("view", ["search", "classify"])
def test_nothing_is_wider_than_the_screen(page, address, width, view):
    page.set_viewport_size({"width": width, "height": 700})
    page.goto(
        f"{address}/?q=red&view={view}&labels=a%0Ab&like=red/red-0.png&where=label%3D%27red%27"
    )
    page.wait_for_selector(".card" if view == "classify" else ".tile:not(.ghost)")
    page.click("#filter-button")
    page.wait_for_selector("#filters")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    columns = page.evaluate("getComputedStyle(document.querySelector('#grid')).gridTemplateColumns")
    assert view == "classify" or len(columns.split()) >= 2


NAMELESS = """() => [...document.querySelectorAll("button, input:not([hidden]), textarea, a, img")]
    .filter(one => one.checkVisibility())
    .filter(one => !(one.ariaLabel || one.textContent.trim() || one.labels?.length
      || one.alt === "" || one.alt))
    .map(one => one.outerHTML)"""
CONTRAST = """() => {
    const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
    const ground = (one) => {
      for (; one; one = one.parentElement) {
        const colour = parse(getComputedStyle(one).backgroundColor);
        if (colour.length === 3 || colour[3] === 1) return colour;
      }
    };
    const bad = [];
    for (const one of document.querySelectorAll("body *")) {
      const text = [...one.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
      if (!text || !one.checkVisibility()) continue;
      const [a, b] = [light(parse(getComputedStyle(one).color)), light(ground(one))];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) bad.push(`${ratio.toFixed(2)} ${one.outerHTML.slice(0, 90)}`);
    }
    return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_has_a_name_and_can_be_read(page, address, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{address}/?q=red&unlike=red/red-0.png&labels=a%0Ab&where=label%3D%27red%27")
    wait_for(page, "red", 3)
    page.click("#filter-button")
    page.wait_for_selector("#filters")
    looks = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (looks == "rgb(255, 255, 255)") == (scheme == "light")
    for step in (lambda page: None, open_details, classify):
        step(page)
        assert page.evaluate(NAMELESS) == []
        assert page.evaluate(CONTRAST) == []


def open_details(page):
    page.click(".tile .open")
    page.wait_for_selector("#details[open]")


def classify(page):
    page.keyboard.press("Escape")
    page.click("[data-view=classify]")
    page.wait_for_selector(".card")


def test_the_token_is_entered_once(page, tmp_path):
    token = "a-token-of-our-own-0123456789"
    index = build(tmp_path, per_colour=1)
    with running(application(index, token=token, hosts=None)[0]) as port:
        page.goto(f"http://127.0.0.1:{port}/?q=red")
        for given in ("a wrong one", token):
            page.fill("[name=token]", given)
            with page.expect_navigation():
                page.click("button")
        page.wait_for_selector(".tile")
        assert token not in page.evaluate("location.href")
        page.goto(f"http://127.0.0.1:{port}/?q=green")
        wait_for(page, "green")


def test_an_index_without_images_says_so(page, tmp_path):
    index = build(tmp_path, per_colour=1)
    remove_items(index, ["*"])
    with running(application(index)[0]) as port:
        for query in ("", "?q=red"):
            page.goto(f"http://127.0.0.1:{port}/{query}")
            expect(page.locator("#collection")).to_have_text("index · 0 images")
            expect(page.locator("#status")).to_have_text("This index has no images yet.")
            expect(page.locator("#filter-button")).to_be_hidden()
        page.click("[data-view=classify]")
        page.fill("[name=labels]", "red, blue")
        page.click(".ask button")
        note = page.locator("#classify-view > .name")
        expect(note).to_have_text("There is no image to classify.")
        expect(page.locator("#problem")).to_be_hidden()
