"""Searches of several terms: added, taken away, weighted, more like this, without duplicates."""

import csv
import json
import sys

import numpy as np
import pytest

from clipkit.errors import ArgumentError, CaptionError, DataError
from clipkit.index.vector_index import MINUS_WEIGHT, NEAR_DUPLICATE, VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.tasks.index import build_index
from tests.helpers.toys import COLOURS, ColourEncoder, square, write_squares


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("asking")
    write_squares(path / "photos", per_colour=3)
    return path


@pytest.fixture(scope="module")
def index(folder):
    return build_index(folder / "photos", folder / "i", ColourEncoder())


def best(index, vector, k, without=()):
    """Keys by a product with every vector."""
    rows = np.concatenate([block for block, _ in index.shards()])
    order = np.argsort(-(rows @ vector), kind="stable")
    keys = [index.keys[n] for n in order]
    return [key for key in keys if key not in without][:k]


def of(*words):
    return ColourEncoder().encode_text(list(words))


def test_terms_add_up_with_their_weights(index):
    red, blue, green = of("red", "blue", "green")
    hits = index.search("red", k=9, minus=["blue", "green"])
    expected = best(index, red - MINUS_WEIGHT * (blue + green), 9)
    assert [hit.key for hit in hits] == expected
    hits = index.search("red", k=9, minus="blue", minus_weight=0.8)
    assert [hit.key for hit in hits] == best(index, red - 0.8 * blue, 9)
    assert hits.query == "red, without blue"
    picture = square("blue")
    hits = index.search("red", image=picture, image_weight=0.25, k=9)
    image = ColourEncoder().encode_images([picture])[0]
    assert [hit.key for hit in hits] == best(index, red + np.float32(0.25) * image, 9)


def test_more_like_this_is_not_the_same(index):
    key = "cyan/cyan-1.png"
    row = index.keys.index(key)
    vector = np.concatenate([block for block, _ in index.shards()])[row]
    hits = index.search(like=[key], k=5)
    assert [hit.key for hit in hits] == best(index, vector, 5, without=[key])
    with pytest.raises(DataError, match=r"no item 'cyan/cyan-9.png' \(did you mean 'cyan/cyan-"):
        index.search(like=["cyan/cyan-9.png"])


def test_a_removed_image_is_not_found_by_its_key(folder, tmp_path):
    build_index(folder / "photos", tmp_path / "i", encoder=ColourEncoder())
    with IndexWriter(tmp_path / "i") as writer:
        writer.remove(["red/red-0.png"])
        writer.commit()
    with pytest.raises(DataError, match="no item"):
        VectorIndex.open(tmp_path / "i").search(like=["red/red-0.png"])


def test_near_duplicates_stand_once(index):
    rows = np.concatenate([block for block, _ in index.shards()])
    vectors = dict(zip(index.keys, rows, strict=True))
    everything = index.search("red", k=24)
    kept = []
    for hit in everything:
        if all(vectors[hit.key] @ vectors[key] < NEAR_DUPLICATE for key in kept):
            kept.append(hit.key)
    assert len(COLOURS) <= len(kept) < 24
    for k in (3, len(kept), 24):
        assert [hit.key for hit in index.search("red", k=k, distinct=True)] == kept[:k]


def test_bad_terms_are_refused(index):
    with pytest.raises(CaptionError, match="empty"):
        index.search("red", minus=[" "])
    for weight in (0, -1, np.inf, np.nan):
        for name in ("minus_weight", "image_weight"):
            with pytest.raises(
                ArgumentError, match=f"{name} is .*expected a finite number above 0"
            ):
                index.search("red", **{name: weight})
    assert index.search("red", minus="white at 10:30").query == "red, without white at 10:30"
    with pytest.raises(TypeError, match="minus holds a int, expected str"):
        index.search("red", minus=[1])
    with pytest.raises(DataError, match="cancel each other out"):
        index.search("red", minus=["red"], minus_weight=1)


def test_the_command_takes_all_of_it(tmp_path, colour_folder, tiny_checkpoint, monkeypatch, run):
    index = tmp_path / "index"
    run("index", "build", colour_folder, "--out", index, "--model", tiny_checkpoint)
    import clipkit

    opened = VectorIndex.open(index, encoder=clipkit.load_model(tiny_checkpoint))
    picture = colour_folder / "red-0.png"
    out, _ = run(
        *("search", index, "red", "--minus", "blue", "--like", "red-1.png"),
        *("--minus-weight", 0.3, "--image", picture, "--image-weight", 0.5, "--json", "-k", 4),
    )
    expected = opened.search(
        *("red", 4),
        image=str(picture),
        image_weight=0.5,
        minus="blue",
        minus_weight=0.3,
        like="red-1.png",
    )
    found = [json.loads(line) for line in out.splitlines()]
    assert [hit["key"] for hit in found] == [hit.key for hit in expected]

    (tmp_path / "queries.txt").write_text("red\n\na blue picture\n")
    page = tmp_path / "page.html"
    asked = ("search", index, "--from", tmp_path / "queries.txt")
    out, _ = run(*asked, "-k", 2, "--csv", "-", "--html", page)
    lines = list(csv.DictReader(out.splitlines()))
    queries = ["red", "red", "a blue picture", "a blue picture"]
    assert [line["query"] for line in lines] == queries
    expected = [hit.key for query in ("red", "a blue picture") for hit in opened.search(query, k=2)]
    assert [line["key"] for line in lines] == expected
    text = page.read_text()
    assert all(key in text for key in expected)
    assert text.count("data:image/jpeg;base64,") == 4
    out, _ = run("search", index, "--from", tmp_path / "queries.txt", "-k", 1)
    assert out.splitlines()[0] == "red:"
    run("search", index, "red", "--from", tmp_path / "queries.txt", code=2)
    run("search", index, code=2)
    run("search", index, "red", "--json", "--show", code=2)
    table, _ = run("search", index, "red", "-k", 1)
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out, _ = run("search", index, "red", "-k", 1, "--show")
    assert out.startswith(table)
    assert "▀" in out.removeprefix(table)
