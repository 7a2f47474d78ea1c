import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import clipkit
from clipkit.data.images import read_image
from clipkit.errors import (
    ArtifactError,
    CaptionError,
    DataError,
    ImageError,
    ModelError,
    ModelMismatchError,
    SpecError,
)
from clipkit.index.vector_index import VectorIndex
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks.embed import embed
from clipkit.tasks.index import build_index
from clipkit.tasks.search import search
from tests.helpers.toys import COLOURS, ColourEncoder, square, write_squares


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "photos"
    write_squares(folder, per_colour=3)
    return folder


@pytest.fixture(scope="module")
def index(photos):
    return build_index(photos, photos.with_name("index"), encoder=ColourEncoder())


@pytest.fixture
def opened(index):
    return index.with_encoder(ColourEncoder())


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_word_finds_the_squares_of_that_colour(opened, colour):
    hits = opened.search(f"a {colour} square", k=3)
    assert [hit.key for hit in hits] == [f"{colour}/{colour}-{n}.png" for n in range(3)]
    assert hits[0].score == pytest.approx(1, abs=1e-6)
    assert hits[0].score > hits[1].score > hits[2].score


def test_an_image_finds_its_like_by_path_and_as_a_picture(opened, photos):
    path = photos / "blue" / "blue-1.png"
    for image in (path, str(path), Image.open(path).convert("RGB")):
        hits = opened.search(image=image, k=2)
        assert hits[0].key == "blue/blue-1.png"
        assert hits[0].score == pytest.approx(1, abs=1e-6)


def test_caption_and_image_add_up_to_what_lies_between(opened):
    # Red (1, 0, 0) and green (0, 1, 0), less grey, add up to (0, 0, -1): whatever lacks blue.
    hits = opened.search("red", image=square("green"), k=24)
    expected = opened.search(np.array([0, 0, -1], np.float32), k=24)
    assert {hit.key.split("/")[0] for hit in hits[:12]} == {"red", "green", "yellow", "black"}
    scores = {hit.key: hit.score for hit in expected}
    for hit in hits:
        assert hit.score == pytest.approx(scores[hit.key], abs=1e-6)


def test_hits_are_ranked_high_to_low(opened):
    scores = [hit.score for hit in opened.search("magenta", k=100)]
    assert len(scores) == 24
    assert scores == sorted(scores, reverse=True)


def test_vectors_need_no_model_and_texts_load_it(index):
    opened = VectorIndex.open(index.path)
    assert opened.search(np.array([1, 0, 0], np.float32), k=1)[0].key.endswith(".png")
    with pytest.raises(ModelError, match="colours/toy"):  # which open_clip does not know
        opened.search("red")


def test_several_queries_give_several_lists(index, photos):
    opened, path = VectorIndex.open(index.path, encoder=ColourEncoder()), photos / "blue/blue-1.png"
    vector = np.array([0, 0, -1], np.float32)
    image = read_image(path)
    queries = ["red", path, vector, image, np.array(image)]
    results = opened.search(queries, k=4)
    assert results == [opened.search(query, k=4) for query in queries]
    assert results[1] == results[3] == results[4] == opened.search(image=str(path), k=4)
    assert [hits.query for hits in results[:3]] == ["red", f"like {path}", "a vector"]
    assert opened.search(np.stack([vector, -vector]), k=2)[0] == opened.search(vector, k=2)
    assert opened.search([], k=2) == []
    assert search(index.path, ["red"], 4, encoder=ColourEncoder()) == results[:1]
    assert search(opened, "red", 4) == results[0]


def test_queries_of_a_wrong_type_are_refused(opened):
    for query in (1, {"a": 1}, {"red"}, [["red"], 2.5]):
        with pytest.raises(TypeError, match="expected text"):
            opened.search(query)
    with pytest.raises(TypeError, match="uint8"):
        opened.search(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(TypeError, match="like holds a int"):
        opened.search("red", like=[3])


def test_hits_are_an_immutable_sequence_and_a_data_frame(opened):
    hits = opened.search("red", k=3)
    assert (len(hits), hits[-1], hits[:2].items) == (3, hits.items[2], hits.items[:2])
    assert isinstance(hits[:2], type(hits))
    with pytest.raises(TypeError):
        hits[0] = hits[1]
    frame = hits.to_pandas()
    assert frame["key"].tolist() == [hit.key for hit in hits]
    assert list(frame) == ["key", "score", "probability", "captions", "label"]
    assert frame["label"].tolist() == ["red"] * 3
    assert opened.search("red", k=3, where="label = 'nothing'").to_pandas().empty


def test_vectors_from_elsewhere_are_indexed(tmp_path):
    rows = np.random.default_rng(0).normal(size=(40, 3)) * 7
    keys = [f"item {number}" for number in range(40)]
    metadata = {"year": np.arange(40) + 1980, "captions": ["a", ["b", "c"]] * 20}
    index = VectorIndex.from_vectors(rows, keys, metadata=metadata)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    hits = index.search(unit[5] * 3, k=40)
    order = np.argsort(-(unit @ unit[5]))
    assert [hit.key for hit in hits] == [keys[n] for n in order]
    assert [hit.score for hit in hits] == pytest.approx((unit @ unit[5])[order], abs=1e-6)
    assert hits[0].score == pytest.approx(1)
    assert hits[:1].records() == [{"captions": ["b", "c"], "label": None, "more": {"year": 1985}}]
    found = index.search(unit[5], k=40, where="year > 2009")
    assert {hit.key for hit in found} == set(keys[30:])
    assert hits._repr_html_().count("item 5") == 1
    assert index.manifest.source["origin"] == "external"
    with pytest.raises(ModelError, match=r"came from outside clipkit.*--model, or encoder="):
        index.search("red")
    assert len(index.with_encoder(ColourEncoder()).search("red", k=2)) == 2
    assert len(VectorIndex.open(index.path, encoder=ColourEncoder()).search(like=keys[0])) == 10

    store = EmbeddingStore.from_vectors(rows, keys, tmp_path / "store", metadata=metadata)
    built = build_index(store, tmp_path / "index", ColourEncoder(), spec="HNSW8")
    assert [hit.key for hit in built.search(unit[5], k=5)] == [hit.key for hit in hits[:5]]
    assert build_index(tmp_path / "store", tmp_path / "index").model == store.model
    frame = pd.DataFrame(metadata)
    with_model = VectorIndex.from_vectors(
        rows, keys, metadata=frame, model=ColourEncoder().model, path=tmp_path / "mine"
    )
    assert VectorIndex.open(tmp_path / "mine").model == with_model.model == ColourEncoder().model
    assert with_model.records().to_pylist() == index.records().to_pylist()


def test_vectors_from_elsewhere_must_make_sense():
    rows = np.eye(3)
    for vectors, keys, metadata, message in (
        (rows[0], ["a"], None, r"shape \[3\], expected \[n, dim\]"),
        (rows, ["a", "b"], None, "2 keys for 3 vectors"),
        (rows, ["a", "b", "a"], None, "'a' is repeated"),
        (rows * [[1], [0], [1]], ["a", "b", "c"], None, "'b' has length 0"),
        (rows * np.nan, ["a", "b", "c"], None, "'a' has length nan"),
        (rows, ["a", "b", "c"], {"year": [1]}, "'year' has 1 values, expected 3"),
        (rows, ["a", "b", "c"], {"id": [1, 2, 3]}, "reserved"),
    ):
        with pytest.raises(DataError, match=message):
            VectorIndex.from_vectors(vectors, keys, metadata=metadata)
    for keys in ("abc", [1, 2, 3]):
        with pytest.raises(TypeError, match="expected (a|str)"):
            VectorIndex.from_vectors(rows, keys)
    with pytest.raises(DataError, match="dimension 4"):
        VectorIndex.from_vectors(np.eye(4), list("abcd"), model=ColourEncoder().model)


def test_another_model_is_refused_with_both_names_and_the_repair(index):
    with pytest.raises(ModelMismatchError, match=r"colours/toy.*other/toy.*clipkit index build"):
        VectorIndex.open(index.path, encoder=ColourEncoder("other"))


def test_queries_without_meaning_are_refused(opened, tmp_path):
    with pytest.raises(CaptionError, match="empty"):
        opened.search("  ")
    with pytest.raises(DataError, match="nothing to search for"):
        opened.search()
    with pytest.raises(DataError, match="cancel each other out"):
        opened.search("red", image=square("cyan"))
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"cannot search with .*bad\.jpg"):
        opened.search(image=tmp_path / "bad.jpg")
    with pytest.raises(ArtifactError, match=r"\[1, 4\], expected \[n, 3\]"):
        opened.search(np.zeros(4, np.float32))


def test_a_folder_is_embedded_beside_the_index_and_a_store_is_indexed_as_it_is(photos, tmp_path):
    encoder = ColourEncoder()
    first = build_index(photos, tmp_path / "index", spec="SQ8", encoder=encoder)
    assert (first.spec, first.model, len(first)) == ("SQ8", encoder.model, 24)
    store = EmbeddingStore.open(tmp_path / "index.store")
    assert store.keys == first.keys

    second = build_index(store.path, tmp_path / "second")
    expected = EmbeddingStore.open(tmp_path / "index.store").vectors() @ np.eye(3)[0]
    hits = second.search_vectors(np.eye(1, 3, dtype=np.float32), 24)[0]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1], atol=1e-6)

    build_index(photos, tmp_path / "index", encoder=encoder)
    assert VectorIndex.open(tmp_path / "index").spec == "Flat"
    assert encoder.encoded == 24


def test_without_an_encoder_the_default_model_or_that_of_the_store_is_loaded(
    photos, tmp_path, monkeypatch
):
    from clipkit.models import loading

    loaded, encoder = [], ColourEncoder()
    monkeypatch.setattr(loading, "load_model", lambda: loaded.append("default") or encoder)
    named = lambda model, what, **_: loaded.append((model, what)) or encoder  # noqa: E731
    monkeypatch.setattr(loading, "load_model_ref", named)
    build_index(photos, tmp_path / "index")
    build_index(photos, tmp_path / "index")
    assert loaded == ["default", (encoder.model, f"the store {tmp_path / 'index.store'}")]


@pytest.mark.parametrize("spec", ["Bogus", "IVF25,Flat", "PQ2x4"])
def test_an_impossible_spec_is_refused_before_encoding(photos, tmp_path, spec):
    encoder = ColourEncoder()
    with pytest.raises(SpecError):
        build_index(photos, tmp_path / "index", spec=spec, encoder=encoder)
    assert encoder.encoded == 0
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused_before_encoding(photos, tmp_path):
    encoder = ColourEncoder()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "diary.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not a clipkit index"):
        build_index(photos, tmp_path / "index", encoder=encoder)
    assert encoder.encoded == 0
    assert (tmp_path / "index" / "diary.txt").read_text() == "mine"


def test_a_half_written_store_is_no_source(photos, tmp_path):
    class Interrupted(ColourEncoder):
        def encode_images(self, images, batch_size=64):
            if self.encoded:
                raise KeyboardInterrupt
            return super().encode_images(images)

    with pytest.raises(KeyboardInterrupt):
        embed(photos, tmp_path / "store", Interrupted(), batch_size=8)
    with pytest.raises(ArtifactError, match="half-written"):
        build_index(tmp_path / "store", tmp_path / "index")


def test_an_index_is_no_source_for_an_index(index, tmp_path):
    with pytest.raises(ArtifactError, match="holds a clipkit index, expected a clipkit store"):
        build_index(index.path, tmp_path / "index")


def test_a_real_network_finds_each_picture_by_itself(colour_folder, tiny_checkpoint, tmp_path):
    from clipkit.models.loading import load_model

    encoder = load_model(tiny_checkpoint)
    index = build_index(colour_folder, tmp_path / "index", spec="HNSW8", encoder=encoder)
    assert index.model == encoder.model
    pictures = [read_image(colour_folder / key) for key in index.keys]
    vectors = EmbeddingStore.open(tmp_path / "index.store").vectors()
    np.testing.assert_allclose(encoder.encode_images(pictures), vectors, atol=1e-5)
    opened = index.with_encoder(load_model(tiny_checkpoint))
    scores = encoder.encode_text(["a red picture"])[0] @ vectors.T
    (best, *_) = opened.search("a red picture")
    assert best.score == pytest.approx(float(scores.max()), abs=1e-5)
    for key in index.keys:
        assert opened.search(image=colour_folder / key, k=1)[0].score == pytest.approx(1, abs=1e-5)


def test_the_command_names_the_model_of_vectors_from_outside(run, tiny_checkpoint, tmp_path):
    encoder = clipkit.load_model(tiny_checkpoint)
    words = ["red", "green", "blue", "white", "black"]
    clipkit.VectorIndex.from_vectors(encoder.encode_text(words), words, path=tmp_path / "index")
    _, err = run("search", tmp_path / "index", "green", code=1)
    assert "name it (--model, or encoder= in Python)" in err
    out, _ = run("search", tmp_path / "index", "green", "--model", tiny_checkpoint, "--json")
    assert json.loads(out.splitlines()[0])["key"] == "green"
    _, err = run("map", tmp_path / "index", "--html", tmp_path / "map.html", "--labels", "")
    assert "files that were not used" not in err


def test_an_empty_path_is_not_this_directory():
    with pytest.raises(DataError, match="the path is empty"):
        clipkit.open_source("")
