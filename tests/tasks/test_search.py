import numpy as np
import pytest
from PIL import Image

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
from clipkit.tasks.search import Searcher
from tests.helpers.toys import COLOURS, ColourEncoder, square, write_squares


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "photos"
    write_squares(folder, per_colour=3)
    return folder


@pytest.fixture(scope="module")
def index(photos):
    return build_index(photos, photos.with_name("index"), load=ColourEncoder)


@pytest.fixture
def searcher(index):
    return Searcher(index, ColourEncoder())


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_word_finds_the_squares_of_that_colour(searcher, colour):
    hits = searcher.by_caption(f"a {colour} square", k=3)
    assert [hit.key for hit in hits] == [f"{colour}/{colour}-{n}.png" for n in range(3)]
    assert hits[0].score == pytest.approx(1, abs=1e-6)
    assert hits[0].score > hits[1].score > hits[2].score


def test_an_image_finds_its_like_by_path_and_as_a_picture(searcher, photos):
    path = photos / "blue" / "blue-1.png"
    for image in (path, str(path), Image.open(path).convert("RGB")):
        hits = searcher.by_image(image, k=2)
        assert hits[0].key == "blue/blue-1.png"
        assert hits[0].score == pytest.approx(1, abs=1e-6)


def test_caption_and_image_add_up_to_what_lies_between(searcher):
    # Red (1, 0, 0) and green (0, 1, 0), less grey, add up to (0, 0, -1): whatever lacks blue.
    hits = searcher.search(caption="red", image=square("green"), k=24)
    expected = searcher.by_vector(np.array([0, 0, -1], np.float32), k=24)
    assert {hit.key.split("/")[0] for hit in hits[:12]} == {"red", "green", "yellow", "black"}
    scores = {hit.key: hit.score for hit in expected}
    for hit in hits:
        assert hit.score == pytest.approx(scores[hit.key], abs=1e-6)


def test_hits_are_ranked_high_to_low(searcher):
    scores = [hit.score for hit in searcher.by_caption("magenta", k=100)]
    assert len(scores) == 24
    assert scores == sorted(scores, reverse=True)


def test_vectors_need_no_encoder_and_captions_do(index):
    searcher = Searcher(index)
    assert searcher.by_vector(np.array([1, 0, 0], np.float32), k=1)[0].key.endswith(".png")
    with pytest.raises(ModelError, match=r"colours/toy.*give Searcher its encoder"):
        searcher.by_caption("red")


def test_another_model_is_refused_with_both_names_and_the_repair(index):
    with pytest.raises(ModelMismatchError, match=r"colours/toy.*other/toy.*clipkit index build"):
        Searcher(index, ColourEncoder("other"))


def test_queries_without_meaning_are_refused(searcher, tmp_path):
    with pytest.raises(CaptionError, match="empty"):
        searcher.by_caption("  ")
    with pytest.raises(DataError, match="nothing to search for"):
        searcher.search()
    with pytest.raises(DataError, match="opposites"):
        searcher.search(caption="red", image=square("cyan"))
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"bad\.jpg cannot be searched with"):
        searcher.by_image(tmp_path / "bad.jpg")
    with pytest.raises(ArtifactError, match=r"\[1, 4\], expected \[n, 3\]"):
        searcher.by_vector(np.zeros(4, np.float32))


def test_a_folder_is_embedded_beside_the_index_and_a_store_is_indexed_as_it_is(photos, tmp_path):
    encoder = ColourEncoder()
    first = build_index(photos, tmp_path / "index", spec="SQ8", load=lambda: encoder)
    assert (first.spec, first.model, len(first)) == ("SQ8", encoder.model, 24)
    store = EmbeddingStore.open(tmp_path / "index.store")
    assert store.keys == first.keys

    second = build_index(store.path, tmp_path / "second")
    expected = EmbeddingStore.open(tmp_path / "index.store").vectors() @ np.eye(3)[0]
    hits = second.search(np.eye(1, 3, dtype=np.float32), 24)[0]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1], atol=1e-6)

    build_index(photos, tmp_path / "index", load=lambda: encoder)
    assert VectorIndex.open(tmp_path / "index").spec == "Flat"
    assert encoder.encoded == 24


def test_images_without_a_model_are_refused(photos, tmp_path):
    with pytest.raises(ModelError, match=r"no clipkit store.*--model"):
        build_index(photos, tmp_path / "index")


@pytest.mark.parametrize("spec", ["Bogus", "IVF25,Flat", "PQ2x4"])
def test_an_impossible_spec_is_refused_before_encoding(photos, tmp_path, spec):
    encoder = ColourEncoder()
    with pytest.raises(SpecError):
        build_index(photos, tmp_path / "index", spec=spec, load=lambda: encoder)
    assert encoder.encoded == 0
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused_before_encoding(photos, tmp_path):
    encoder = ColourEncoder()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "diary.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is no clipkit index"):
        build_index(photos, tmp_path / "index", load=lambda: encoder)
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
    from clipkit.data.images import read_image
    from clipkit.models.loading import load_model

    encoder = load_model(tiny_checkpoint)
    index = build_index(colour_folder, tmp_path / "index", spec="HNSW8", load=lambda: encoder)
    assert index.model == encoder.model
    pictures = [read_image(colour_folder / key) for key in index.keys]
    vectors = EmbeddingStore.open(tmp_path / "index.store").vectors()
    np.testing.assert_allclose(encoder.encode_images(pictures), vectors, atol=1e-5)
    searcher = Searcher(index, load_model(tiny_checkpoint))
    scores = encoder.encode_text(["a red picture"])[0] @ vectors.T
    (best, *_) = searcher.by_caption("a red picture")
    assert best.score == pytest.approx(float(scores.max()), abs=1e-5)
    for key in index.keys:
        assert searcher.by_image(colour_folder / key, k=1)[0].score == pytest.approx(1, abs=1e-5)
