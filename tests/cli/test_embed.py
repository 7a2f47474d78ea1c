"""The options of `clipkit embed` and `clipkit index build`, as the command line takes them."""

import json

import pytest

from clipkit.index.vector_index import VectorIndex
from clipkit.models import encoder as batches
from clipkit.store.embedding_store import EmbeddingStore


@pytest.fixture
def embed(run, colour_folder, tiny_checkpoint, tmp_path):
    """Run `clipkit embed` of the coloured pictures into tmp_path/store."""
    words = ["embed", colour_folder, "--model", tiny_checkpoint, "--out", tmp_path / "store"]
    return lambda *more, code=0: run(*words, *more, code=code)


def test_embed_says_how_pictures_are_read(run, embed, tmp_path):
    embed("--decode", "exact")
    assert EmbeddingStore.open(tmp_path / "store").decode == "exact"
    _, err = embed("--decode", "fast", code=1)
    assert "made with --decode exact, asked for is fast; leave --decode out" in err
    assert len(err.splitlines()) == 1
    embed()
    out, _ = run("info", tmp_path / "store", "--json")
    assert json.loads(out)["detail"]["decode"] == "exact"


def test_index_build_hands_it_on_to_images_alone(run, colour_folder, tiny_checkpoint, tmp_path):
    images = ["index", "build", colour_folder, "--model", tiny_checkpoint]
    run(*images, "--out", tmp_path / "one", "--decode", "exact")
    assert VectorIndex.open(tmp_path / "one").decode == "exact"
    store = tmp_path / "one.store"
    _, err = run("index", "build", store, "--out", tmp_path / "two", "--decode", "fast")
    assert f"--decode is for images: {store} is a store, embedded with --decode exact" in err
    assert VectorIndex.open(tmp_path / "two").decode == "exact"


def test_several_paths_and_patterns_are_one_store(run, colour_folder, tiny_checkpoint, tmp_path):
    model = ["--model", tiny_checkpoint]
    reds = sorted(colour_folder.glob("red*.png"))
    for name, given in (("list", reds), ("pattern", [colour_folder / "red*.png"])):
        run("embed", *given, *model, "--out", tmp_path / name)
        assert EmbeddingStore.open(tmp_path / name).keys == [path.name for path in reds]
    blue = colour_folder / "more" / "blue.png"
    blue.parent.mkdir()
    blue.write_bytes((colour_folder / "blue-1.png").read_bytes())
    out, _ = run("index", "build", *reds, blue.parent, *model, "--out", tmp_path / "i", "--json")
    assert json.loads(out)["vectors"] == len(reds) + 1
    assert VectorIndex.open(tmp_path / "i").keys == ["more/blue.png", *(p.name for p in reds)]
    _, err = run("embed", *reds, colour_folder / "no.png", *model, "--out", "x", code=1)
    assert "no.png does not exist" in err
    _, err = run("embed", colour_folder / "*.gif", *model, "--out", "x", code=1)
    assert "no file matches the pattern" in err


def test_index_sync_takes_columns(run, colour_folder, tiny_checkpoint, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("file,first,second\nred-0.png,one,two\nblue-0.png,three,four\n")
    columns = ["--image-column", "file", "--image-root", colour_folder]
    words = ["--out", tmp_path / "index", "--model", tiny_checkpoint, "--caption-column", "first"]
    run("index", "build", table, *columns, *words)

    def captions():
        return sorted(VectorIndex.open(tmp_path / "index").records()["captions"].to_pylist())

    assert captions() == [["one"], ["three"]]
    out, _ = run("index", "sync", tmp_path / "index", "--caption-column", "second", "--json")
    assert json.loads(out)["changed"] == 2
    assert captions() == [["four"], ["two"]]
    out, _ = run("index", "sync", tmp_path / "index", "--json")
    assert json.loads(out)["unchanged"] == 2


@pytest.mark.parametrize(("given", "tried"), [("5", [5, 5, 2]), ("auto", [12])])
def test_batches_are_as_large_as_asked(embed, monkeypatch, given, tried):
    found, encode = [], batches.AdaptiveBatcher.encode

    def noting(self, pictures):
        found.append(len(pictures))
        return encode(self, pictures)

    monkeypatch.setattr(batches.AdaptiveBatcher, "encode", noting)
    embed("--batch-size", given)
    assert found == tried


@pytest.mark.parametrize(
    "words", [("--batch-size", "0"), ("--batch-size", "many"), ("--decode", "so-so")]
)
def test_what_is_no_such_thing_is_wrong_usage(embed, words):
    _, err = embed(*words, code=2)
    assert words[1] in err
