"""Images inside tables, tars and saved data sets are shown by key, and no others."""

import json
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.artifacts import MANIFEST
from clipkit.data import random_access as inside
from clipkit.data.images import read_image
from clipkit.data.open_source import open_source
from clipkit.data.random_access import open_image_reader
from clipkit.display.thumbnails import thumbnail
from clipkit.errors import DataError
from clipkit.index.hits import Hit, Hits
from clipkit.index.roots import roots_of
from clipkit.tasks.index import build_index
from clipkit.tasks.sync import add_images
from clipkit.web import images as files
from tests.helpers.toys import COLOURS, png, square, write_tar
from tests.helpers.web_toys import ServedEncoder, build, client, keys

PNGS = {colour: png(square(colour, size=8 + n)) for n, colour in enumerate(COLOURS)}


def table(file, names=None, group=3):
    """A Parquet file of the eight colours, with keys or without, three rows a row group."""
    columns = {"image": list(PNGS.values()), "caption": list(PNGS)}
    if names:
        columns["key"] = names
    pq.write_table(pa.table(columns), file, row_group_size=group)


def saved(folder):
    """A saved ``datasets`` directory of the eight colours."""
    from datasets import Dataset

    rows = Dataset.from_dict({"image": [{"bytes": data, "path": None} for data in PNGS.values()]})
    rows.save_to_disk(str(folder))


def shards(folder):
    """Two tars with all that may stand in them; the pattern that names them."""
    folder.mkdir()
    first = [("red.txt", b"a red square"), ("red.png", PNGS["red"])]
    first += [("deep/green.PNG", PNGS["green"]), ("deep/green.cls", b"1")]
    first += [("blue.png", PNGS["blue"]), ("blue.jpg", PNGS["red"]), ("notes.md", b"no item")]
    first += [("lonely.txt", b"no image"), ("blue.png", PNGS["white"])]  # the key is taken
    write_tar(folder / "a-0.tar", first)
    second = [("red.png", PNGS["cyan"]), (f"{'long' * 60}/name.png", PNGS["yellow"])]
    write_tar(folder / "a-1.tar", second)
    return folder / "a-{0..1}.tar"


def made(kind, folder):
    """A source of a kind."""
    if kind == "numbered":
        table(folder / "t.parquet")
    elif kind == "keyed":
        table(folder / "t.parquet", [f"a/{colour}.png" for colour in PNGS])
    elif kind == "two files":
        table(folder / "t-0.parquet", list(PNGS))
        table(folder / "t-1.parquet", [f"{colour} again" for colour in PNGS], group=100)
        return folder / "t-*.parquet"
    elif kind == "saved":
        saved(folder / "saved")
        return folder / "saved"
    elif kind == "tars":
        return shards(folder / "tars")
    return folder / "t.parquet"


KINDS = ["numbered", "keyed", "two files", "saved", "tars"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_the_one_that_a_walk_over_the_source_meets(tmp_path, kind):
    spec = made(kind, tmp_path)
    rows = {row.key: row.image.data for row in open_source(spec).rows}
    assert len(rows) == {"two files": 16, "tars": 5}.get(kind, 8)
    pictures = open_image_reader(str(spec))
    for key, data in reversed(rows.items()):
        assert pictures.read(key) == data
    for key in ("", "9", "00", "-1", "x/../a-0.tar/red.png", "a-0.tar", "a-0.tar/", "red/red.png"):
        assert pictures.read(key) is None


def test_a_tar_forgotten_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "SHARDS", 1)
    pictures = open_image_reader(str(shards(tmp_path / "tars")))
    for _ in range(2):
        assert pictures.read("a-0.tar/red.png") == PNGS["red"]
        assert pictures.read("a-1.tar/red.png") == PNGS["cyan"]


def test_keys_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(inside, "hash", len, raising=False)
    table(tmp_path / "t.parquet", [f"{n}" for n in range(8)])
    saved(tmp_path / "saved")
    for where in ("t.parquet", "saved"):
        pictures = open_image_reader(str(tmp_path / where))
        assert [pictures.read(f"{n}") for n in range(8)] == list(PNGS.values())
        assert pictures.read("x") is None


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_served(tmp_path, kind):
    spec = made(kind, tmp_path)
    index = build_index(spec, tmp_path / "index", encoder=ServedEncoder())
    with client(index.path) as ask:
        assert ask.get("/info").json()["missing"] is None
        rows = {row.key: row.image.data for row in open_source(spec).rows}
        for key in keys(ask.get("/search", params={"k": 100})):
            whole = ask.get(f"/image/{quote(key)}")
            assert (whole.content, whole.headers["content-type"]) == (rows[key], "image/png")
            assert ask.get(f"/thumb/{quote(key)}").content.startswith(b"\xff\xd8\xff")
        for path in ("../secret", "a-0.tar/../secret", "t.parquet", "-1", "99", "a-0.tar/no.png"):
            assert ask.get(f"/image/{path}").status_code == 404


@pytest.mark.parametrize("kind", KINDS)
def test_hits_show_them_in_notebooks_and_terminals(tmp_path, kind):
    spec = made(kind, tmp_path)
    index = build_index(spec, tmp_path / "index", encoder=ServedEncoder())
    rows = {row.key: row.image.data for row in open_source(spec).rows}
    hits = Hits([Hit(key, 1.0) for key in (*rows, "none")], "", roots_of(index.manifest))
    shown = [hits.thumbnail(hit) for hit in hits]
    assert shown == [*(thumbnail(read_image(data)) for data in rows.values()), None]
    files = list(tmp_path.glob("*.parquet"))
    for file in files:
        file.unlink()
    assert not files or Hits(hits, "", hits.roots).thumbnail(hits[0]) is None


def test_a_source_that_changed_never_shows_another_image(tmp_path):
    table(tmp_path / "t.parquet")
    index = build_index(tmp_path / "t.parquet", tmp_path / "index", encoder=ServedEncoder())
    row = list(PNGS).index("red")
    whole = dict(PNGS)
    for other in (PNGS["blue"], whole["red"][:-1] + b"x"):  # of another size, and of the same
        PNGS["red"] = other
        table(tmp_path / "t.parquet")
        PNGS.update(whole)
        with client(index.path) as ask:
            answer = ask.get(f"/image/{row}")
            assert answer.status_code == 404
            assert "has changed since it was indexed" in answer.json()["detail"]
            assert ask.get(f"/image/{row + 1}").status_code == 200


def test_missing_or_damaged_sources_are_reported(tmp_path):
    table(tmp_path / "t.parquet")
    index = build_index(tmp_path / "t.parquet", tmp_path / "index", encoder=ServedEncoder())
    whole = (tmp_path / "t.parquet").read_bytes()
    for change, sentence in (
        (lambda file: file.write_bytes(b"PAR1" + bytes(100)), "not an intact Parquet file"),
        (lambda file: file.unlink(), "is not there any more"),
    ):
        change(tmp_path / "t.parquet")
        with client(index.path) as ask:
            assert sentence in ask.get("/info").json()["missing"]
            for route in ("image", "thumb"):
                answer = ask.get(f"/{route}/0")
                assert answer.status_code == 404
                assert sentence in answer.json()["detail"]
            assert len(keys(ask.get("/search", params={"q": "red"}))) == 8
    (tmp_path / "t.parquet").write_bytes(whole)
    with client(index.path) as ask:
        assert ask.get("/image/0").status_code == 200
        (tmp_path / "t.parquet").unlink()  # while it is served
        answer = ask.get("/image/1")
        assert (answer.status_code, "cannot read" in answer.text) == (404, True)


def test_a_damaged_tar_is_reported(tmp_path):
    spec = shards(tmp_path / "tars")
    index = build_index(spec, tmp_path / "index", encoder=ServedEncoder())
    (tmp_path / "tars" / "a-1.tar").write_bytes(b"no tar at all" * 100)
    with client(index.path) as ask:
        assert ask.get("/image/a-0.tar/red.png").status_code == 200
        answer = ask.get("/image/a-1.tar/red.png")
        assert (answer.status_code, "cannot read" in answer.text) == (404, True)
    with pytest.raises(DataError, match="is not there any more"):
        open_image_reader(str(tmp_path / "tars" / "b-{0..1}.tar"))


def test_giant_images_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE", len(PNGS["red"]))
    table(tmp_path / "t.parquet")
    index = build_index(tmp_path / "t.parquet", tmp_path / "index", encoder=ServedEncoder())
    with client(index.path) as ask:
        for row, data in enumerate(PNGS.values()):
            large = len(data) > len(PNGS["red"])
            assert ask.get(f"/image/{row}").status_code == (413 if large else 200)
    assert max(map(len, PNGS.values())) > len(PNGS["red"])


def test_a_table_that_was_added_to_a_folder_is_shown_too(tmp_path):
    index = build(tmp_path, per_colour=1)
    table(tmp_path / "more.parquet", [f"{colour}/{colour}-0.png" for colour in PNGS])
    add_images(index, tmp_path / "more.parquet", encoder=ServedEncoder())
    with client(index) as ask:
        assert ask.get("/image/more/cyan/cyan-0.png").content == PNGS["cyan"]
        assert ask.get("/image/cyan/cyan-0.png").content == png(square("cyan"))


def test_images_on_the_hub_are_reported(tmp_path):
    index = build(tmp_path, per_colour=1)
    manifest = json.loads((index / MANIFEST).read_text())
    manifest["source"] = {"spec": "hf:someone/colours:train", "kind": "hub", "root": None}
    (index / MANIFEST).write_text(json.dumps(manifest))
    with client(index) as ask:
        told = "it is part of the hub dataset hf:someone/colours:train"
        assert told in ask.get("/info").json()["missing"]
        assert told in ask.get("/thumb/red/red-0.png").json()["detail"]
