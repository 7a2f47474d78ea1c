"""Decoding, encoding and writing at the same time, and what is left when that is cut off."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from clipkit.artifacts import ModelRef, partial_path
from clipkit.data.images import read_image
from clipkit.data.rows import Row
from clipkit.errors import ArtifactError
from clipkit.store import shards as shard_writer
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.tasks.embed import embed
from clipkit.tasks.index import build_index
from tests.helpers.paths import ROOT
from tests.helpers.toys import ColourEncoder, records, soft, unit_rows, write_squares

MODEL = ModelRef("toy", "a", "fingerprint-a", 4)
LONG = 20  # seconds after which something that should happen never will


def test_decoding_goes_on_while_a_batch_is_encoded(tmp_path, monkeypatch):
    keys = write_squares(tmp_path / "photos")
    decoded, seen = set(), threading.Event()
    read = Row.read_image

    def noting(row, reduction=None):
        decoded.add(row.key)
        if keys[5] in decoded:
            seen.set()
        return read(row, reduction)

    class Waiting(ColourEncoder):
        def encode_images(self, images, batch_size=64):
            assert seen.wait(LONG), "an image of the second batch was never read"
            return super().encode_images(images)

    monkeypatch.setattr(Row, "read_image", noting)
    assert len(embed(tmp_path / "photos", tmp_path / "store", Waiting(), batch_size=4)) == 16


def test_encoding_goes_on_while_a_shard_is_written(tmp_path, monkeypatch):
    went_on = threading.Event()
    write = shard_writer.write_shard

    def waiting(*args):
        assert went_on.wait(LONG), "nothing was added while the shard was written"
        write(*args)

    monkeypatch.setattr(shard_writer, "write_shard", waiting)
    with EmbeddingStore.create(tmp_path / "store", MODEL, shard_size=10) as writer:
        writer.append(unit_rows(25, 4)[:13], records(13))
        went_on.set()
        writer.append(unit_rows(25, 4)[13:], records(25)[13:])
        store = writer.finish({})
    np.testing.assert_array_equal(store.vectors(), unit_rows(25, 4))
    assert store.records().to_pylist() == records(25)


def test_a_shard_that_could_not_be_written_is_told_and_tried_again(tmp_path, monkeypatch):
    write, failures = shard_writer.write_shard, iter([OSError(28, "No space left on device")])

    def failing(*args):
        for error in failures:
            raise error
        write(*args)

    monkeypatch.setattr(shard_writer, "write_shard", failing)
    with (
        pytest.raises(ArtifactError, match=r"No space left.*make room"),
        EmbeddingStore.create(tmp_path / "store", MODEL, shard_size=10) as writer,
    ):
        writer.append(unit_rows(25, 4)[:10], records(10))
        writer.append(unit_rows(25, 4)[10:], records(25)[10:])
    with EmbeddingStore.create(tmp_path / "store", MODEL, shard_size=10) as writer:
        assert list(writer.done) == [row["key"] for row in records(25)]
        store = writer.finish({})
    np.testing.assert_array_equal(store.vectors(), unit_rows(25, 4))


WRITE_AND_DIE = """
import os, signal, sys
from tests.helpers.toys import records, unit_rows
from clipkit.store import shards as shard_writer
from clipkit.artifacts import ModelRef
from clipkit.store.embedding_store import EmbeddingStore

write = shard_writer.write_shard
def dying(folder, number, vectors, records):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, number, vectors, records)

shard_writer.write_shard = dying
model = ModelRef("toy", "a", "fingerprint-a", 4)
with EmbeddingStore.create(sys.argv[1], model, shard_size=10) as writer:
    for number in range(45):
        writer.append(unit_rows(45, 4)[number:number + 1], records(1, start=number))
    writer.finish({})
"""


def test_kill_9_while_a_shard_is_written_keeps_those_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, tmp_path / "store"], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert partial_path(tmp_path / "store").is_dir()
    with EmbeddingStore.create(tmp_path / "store", MODEL, shard_size=10) as writer:
        assert list(writer.done) == [row["key"] for row in records(20)]
        writer.append(unit_rows(45, 4)[20:], records(45)[20:])
        store = writer.finish({})
    np.testing.assert_array_equal(store.vectors(), unit_rows(45, 4))


@pytest.fixture
def photos(tmp_path):
    """Six photos large enough to be read smaller, a seventh that is damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        Image.fromarray(soft(300, 200, seed=seed)).save(folder / f"{seed}.jpg", quality=92)
    whole = (folder / "0.jpg").read_bytes()
    (folder / "bad.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_vectors_are_those_of_the_pictures_read_one_by_one(photos, tiny_checkpoint, decode):
    from clipkit.data.transforms import as_batch
    from clipkit.models.loading import load_model

    encoder = load_model(tiny_checkpoint)
    store = embed(photos, photos.with_name("store"), encoder, decode=decode, batch_size=4)
    assert [key for key, _ in store.skipped()] == ["bad.jpg"]
    reduction = encoder.preprocess.reduction(decode)
    pixels = [
        encoder.preprocess.pixels(read_image(photos / key, reduction), decode) for key in store.keys
    ]
    expected = encoder.encode_images(as_batch(pixels))
    np.testing.assert_allclose(store.vectors(), expected, atol=1e-6)
    plain = encoder.encode_images([read_image(photos / key) for key in store.keys])
    if decode == "exact":
        np.testing.assert_allclose(store.vectors(), plain, atol=1e-6)
    else:
        assert (store.vectors() * plain).sum(axis=1).min() > 0.99
        assert np.abs(store.vectors() - plain).max() > 1e-5


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_an_image_is_searched_for_as_those_of_the_index_were_read(photos, tiny_checkpoint, decode):
    from clipkit.models.loading import load_model

    encoder = load_model(tiny_checkpoint)
    index = build_index(photos, photos.with_name("index"), encoder=encoder, decode=decode)
    searcher = index.with_encoder(encoder)
    vectors = EmbeddingStore.open(photos.with_name("index.store")).vectors()
    for key, vector in zip(index.keys, vectors, strict=True):
        (hit,) = searcher.search(image=photos / key, k=1)
        assert hit.key == key
        # Read in the other way, the scores are off by 1e-5 and more.
        assert hit.score == pytest.approx(1, abs=2e-6)
        np.testing.assert_allclose(searcher._encode_image(photos / key), vector, atol=1e-6)
    caption = encoder.encode_text(["a red picture"])[0]
    assert searcher.search("a red picture", k=1)[0].score == pytest.approx(
        float((vectors @ caption).max()), abs=1e-5
    )
