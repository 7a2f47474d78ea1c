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
    assert f"--decode is for images: {store} is a store, made with --decode exact" in err
    assert VectorIndex.open(tmp_path / "two").decode == "exact"


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
