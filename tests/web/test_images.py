"""Only images of the index are ever read, and nothing is written outside of the cache."""

import json
import os
import shutil
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from clipkit.display.thumbnails import thumbnail
from clipkit.tasks.index import build_index
from clipkit.tasks.sync import add_images
from clipkit.web import images as files
from clipkit.web.images import THUMBNAIL_SIDE, ThumbnailCache
from tests.helpers.toys import COLOURS, square, write_squares
from tests.helpers.web_toys import ServedEncoder, application, build, client, keys, running


@pytest.fixture
def index(tmp_path):
    return build(tmp_path, per_colour=1)


@pytest.fixture
def photos(index):
    return index.with_name("photos")


def opened(answer):
    assert answer.status_code == 200, answer.text
    return Image.open(BytesIO(answer.content))


def test_an_image_comes_as_it_is_and_a_thumbnail_is_small(index, photos):
    Image.effect_noise((2000, 1000), 90).convert("RGB").save(photos / "red" / "red-0.png")
    with client(index) as ask:
        whole = ask.get("/image/red/red-0.png")
        assert whole.content == (photos / "red" / "red-0.png").read_bytes()
        assert whole.headers["content-type"] == "image/png"
        small = opened(ask.get("/thumb/red/red-0.png"))
        assert (small.format, small.size) == ("JPEG", (THUMBNAIL_SIDE, THUMBNAIL_SIDE // 2))
        tiny = opened(ask.get("/thumb/blue/blue-0.png"))
        assert tiny.size == (8, 8)
        assert np.abs(np.asarray(tiny).mean((0, 1)) - COLOURS["blue"]).max() < 3


def test_what_browsers_do_not_show_comes_as_a_jpeg(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    square("red", size=16).save(folder / "a.tiff")
    square("blue", size=16).save(folder / "b.ppm")
    index = build_index(folder, tmp_path / "index", encoder=ServedEncoder())
    with client(index.path) as ask:
        for key, colour in (("a.tiff", "red"), ("b.ppm", "blue")):
            answer = ask.get(f"/image/{key}")
            assert answer.headers["content-type"] == "image/jpeg"
            assert np.abs(np.asarray(opened(answer)).mean((0, 1)) - COLOURS[colour]).max() < 3


def test_a_thumbnail_is_made_once_until_its_image_changes(index, photos, monkeypatch):
    made = []
    monkeypatch.setattr(
        "clipkit.web.images.thumbnail",
        lambda image, side: made.append(image) or thumbnail(square("red"), side),
    )
    with client(index) as ask:
        for _ in range(3):
            assert ask.get("/thumb/red/red-0.png").status_code == 200
        assert len(made) == 1
        square("red", 50, size=9).save(photos / "red" / "red-0.png")
        ask.get("/thumb/red/red-0.png")
        assert len(made) == 2
    with client(index) as ask:  # another run finds it
        ask.get("/thumb/red/red-0.png")
        assert len(made) == 2


def test_the_cache_never_outgrows_its_bound(tmp_path):
    cache = ThumbnailCache(tmp_path / "cache", max_bytes=1000)
    for number in range(8):
        cache.store(f"name {number}", bytes([number]) * 300)
        assert cache.find("name 0") == b"\0" * 300  # asked for lately, so it stays
        held = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
        assert held == cache.used <= 1000
    assert cache.find("name 7") == b"\7" * 300
    assert cache.find("name 4") is None
    cache.store("too large", b"x" * 1001)
    assert cache.find("too large") is None
    assert ThumbnailCache(tmp_path / "cache", max_bytes=1000).used == 900
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_done_without(index, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with client(index, cache=tmp_path / "file" / "cache") as ask:
        assert opened(ask.get("/thumb/red/red-0.png")).size == (8, 8)


def test_nothing_is_written_outside_of_the_cache(index, tmp_path):
    def state():
        return {
            path: path.stat().st_mtime_ns
            for path in tmp_path.rglob("*")
            if "thumbs" not in path.relative_to(tmp_path).parts
        }

    before = state()
    with client(index) as ask:
        for key in keys(ask.get("/search", params={"q": "red"})):
            assert ask.get(f"/thumb/{key}").status_code == 200
        big = BytesIO()
        noise = np.random.default_rng(0).integers(0, 200, (700, 700, 3), np.uint8)
        Image.fromarray(noise).save(big, "PNG")
        assert len(big.getvalue()) > 1 << 20
        assert ask.post("/search", content=big.getvalue()).status_code == 200
    assert state() == before
    assert len(list((tmp_path / "thumbs").iterdir())) == len(COLOURS)


@pytest.mark.parametrize(
    "key",
    [
        "../secret.png",
        "red/../../secret.png",
        "/etc/passwd",
        "//etc/passwd",
        "red",
        "red/red-0.png/",
        "red/red-0.png\0",
        "red\\red-0.png",
        "RED/red-0.png",
        "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/secret.png",
        "a" * 5000,
    ],
)
@pytest.mark.parametrize("route", ["image", "thumb", "similar"])
def test_unknown_keys_are_not_found(index, tmp_path, key, route):
    square("red").save(tmp_path / "secret.png")
    with client(index) as ask:
        for written in (quote(key, safe=""), quote(key, safe="/"), quote(quote(key, safe=""))):
            answer = ask.get(f"/{route}/{written}")
            assert answer.status_code == 404, answer.text


def test_keys_that_point_out_of_the_folder_are_not_read(tmp_path):
    square("red").save(tmp_path / "secret.png")
    folder = tmp_path / "photos"
    folder.mkdir()
    square("blue").save(folder / "own.png")
    (folder / "linked.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "away").mkdir()
    square("green").save(tmp_path / "away" / "deep.png")
    (folder / "folder").symlink_to(tmp_path / "away")
    (folder / "inside.png").symlink_to(folder / "own.png")
    table = folder / "table.csv"
    rows = ["own.png", "../secret.png", str(tmp_path / "secret.png"), "linked.png"]
    rows += ["folder/deep.png", "inside.png"]
    table.write_text("file_name,caption\n" + "".join(f"{row},text\n" for row in rows))
    index = build_index(table, tmp_path / "index", encoder=ServedEncoder())
    assert len(index) == 6
    with client(index.path) as ask:
        for key in index.keys:
            for route in ("image", "thumb"):
                answer = ask.get(f"/{route}/{quote(key, safe='')}")
                if key in ("own.png", "inside.png"):
                    assert answer.status_code == 200
                else:
                    assert answer.status_code == 404
                    assert "a link points outside the index's folder" in answer.json()["detail"]


def test_a_file_that_became_something_else_is_not_read(index, photos):
    secret = photos / "notes.txt"
    secret.write_text("my secret")
    for colour, change in {
        "red": lambda file: file.symlink_to(secret),
        "green": lambda file: os.mkfifo(file),
        "blue": lambda file: file.mkdir(),
        "cyan": lambda file: file.symlink_to(file),
        "yellow": lambda file: file.write_bytes(b""),
        "white": lambda file: file.write_text("<script>alert(1)</script>"),
        "black": lambda file: file.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
    }.items():
        file = photos / colour / f"{colour}-0.png"
        file.unlink()
        change(file)
    shutil.rmtree(photos / "magenta")
    with client(index) as ask:
        for colour in COLOURS:
            for route in ("image", "thumb"):
                answer = ask.get(f"/{route}/{colour}/{colour}-0.png")
                assert answer.status_code in (404, 415)
                assert "secret" not in answer.text
        gone = ask.get("/image/magenta/magenta-0.png").json()["detail"]
        assert "update the index" in gone
        assert ask.get("/search", params={"q": "red"}).status_code == 200


def test_a_huge_file_is_not_read(index, photos, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE", 1000)
    (photos / "red" / "red-0.png").write_bytes(b"\xff\xd8\xff" + bytes(998))
    with client(index) as ask:
        assert ask.get("/image/red/red-0.png").status_code == 413
        assert ask.get("/image/blue/blue-0.png").status_code == 200


def test_images_that_moved_are_found_where_they_are_now(index, photos, tmp_path):
    photos.rename(tmp_path / "moved")
    with client(index) as ask:
        assert "update the index" in ask.get("/info").json()["missing"]
        assert ask.get("/image/red/red-0.png").status_code == 404
    with client(index, images=tmp_path / "moved") as ask:
        assert ask.get("/info").json()["missing"] is None
        assert opened(ask.get("/image/red/red-0.png")).size == (8, 8)


def test_names_of_any_letters_work(tmp_path):
    names = ["a b.png", "100%.png", "what?.png", "#1.png", "日本 é.png", "a&b=c;d.png"]
    names += ["<img src=x onerror=alert(1)>.png", "'\".png", "-rf.png", "%2e%2e.png"]
    folder = tmp_path / "photos"
    write_squares(folder)
    for name in names:
        square("red").save(folder / name)
    index = build_index(folder, tmp_path / "index", encoder=ServedEncoder())
    assert set(names) <= set(index.keys)
    # A real server, for the test client reads percent signs twice.
    with running(application(index.path)[0]) as port:

        def get(path):
            with urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                return answer.read()

        for name in names:
            for path in (f"/thumb/{quote(name, safe='')}", f"/image/{quote(name)}"):
                assert Image.open(BytesIO(get(path))).size == (8, 8)
            for path in (f"/similar/{quote(name)}?", f"/search?like={quote(name)}&"):
                found = [hit["key"] for hit in json.loads(get(f"{path}k=100"))["hits"]]
                assert name not in found
                assert len(found) == len(index) - 1
        for path in ("/image/../secret", "/image/%2e%2e/secret", "/image/..%2fsecret", "/image/.."):
            with pytest.raises(HTTPError, match="404"):
                get(path)


def test_the_program_itself_is_served_and_nothing_beside_it(index):
    static = Path(files.__file__).parent / "static"
    with client(index) as ask:
        for file in static.iterdir():
            assert ask.get(f"/static/{file.name}").content == file.read_bytes()
        for path in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "", "//etc/passwd"):
            assert ask.get(f"/static/{path}").status_code == 404


def test_images_of_a_second_folder_are_shown(index, tmp_path):
    write_squares(tmp_path / "more", per_colour=1)
    square("cyan", size=20).save(tmp_path / "more" / "red" / "red-0.png")
    add_images(index, tmp_path / "more", encoder=ServedEncoder())
    with client(index) as ask:
        (key,) = {key for key in ask.served.collection.keys if key.endswith("/red/red-0.png")}
        assert opened(ask.get(f"/thumb/{key}")).size == (20, 20)
        assert opened(ask.get("/thumb/red/red-0.png")).size == (8, 8)
        assert ask.get(f"/thumb/{key.split('/')[0]}/../photos/red/red-0.png").status_code == 404
