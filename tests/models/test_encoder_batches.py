"""Batches that fit: memory that does not suffice makes them smaller and changes nothing else."""

import numpy as np
import pytest
import torch

from clipkit.data.open_source import open_source
from clipkit.errors import ModelError
from clipkit.models.embed_source import encoded_batches
from clipkit.models.encoder import AdaptiveBatcher, largest_batch
from clipkit.tasks.embed import embed
from tests.helpers.toys import ColourEncoder, soft, square, write_squares


class Cramped(ColourEncoder):
    """Has room for so many pictures at a time; `tried` lists the batches it was given."""

    def __init__(self, room):
        super().__init__()
        self.room, self.tried = room, []

    def encode_images(self, images, batch_size=64):
        assert batch_size == len(images)
        self.tried.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        return super().encode_images(images)


def pixels(encoder, count):
    from PIL import Image

    return [
        encoder.preprocess.pixels(Image.fromarray(soft(20, 10, seed=seed))) for seed in range(count)
    ]


def test_memory_that_is_full_halves_the_batch_and_the_vectors_stay(capsys):
    encoder = Cramped(room=5)
    some = pixels(encoder, 23)
    batcher = AdaptiveBatcher(encoder, 16)
    vectors = batcher.encode(some)
    assert encoder.tried == [16, 8, 4, 4, 4, 4, 4, 3]
    assert batcher.size == 4
    np.testing.assert_array_equal(vectors, AdaptiveBatcher(ColourEncoder(), 64).encode(some))
    said = capsys.readouterr().err
    assert "out of memory: continuing with batches of 8 images" in said
    assert "batches of 4 images" in said
    encoder.tried.clear()
    batcher.encode(some[:9])
    assert encoder.tried == [4, 4, 1]


def test_one_image_that_does_not_fit_is_an_error():
    encoder = Cramped(room=0)
    said = r"a single image .* memory of cpu \(CUDA out of memory\. .*GiB\.\); free some memory"
    with pytest.raises(ModelError, match=said):
        AdaptiveBatcher(encoder, 4).encode(pixels(encoder, 4))
    assert encoder.tried == [4, 2, 1]


def test_a_walk_over_images_goes_on_in_smaller_batches(tmp_path):
    photos = tmp_path / "photos"
    write_squares(photos)
    encoder = Cramped(room=3)
    walk = encoded_batches(
        encoder, open_source(photos).rows, batch_size=8, workers=2, on_skip=pytest.fail
    )
    batches = [(vectors, [row.key for row in rows]) for vectors, rows in walk]
    # What was gathered for the first batch is encoded whole, in parts.
    assert encoder.tried == [8, 4, 2, 2, 2, 2] + 4 * [2]
    expected = embed(photos, tmp_path / "store", ColourEncoder())
    assert [key for _, keys in batches for key in keys] == expected.keys
    np.testing.assert_array_equal(np.concatenate([v for v, _ in batches]), expected.vectors())


def test_what_is_not_memory_is_not_tried_again():
    class Broken(ColourEncoder):
        def encode_images(self, images, batch_size=64):
            self.encoded += 1
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    encoder = Broken()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        AdaptiveBatcher(encoder, 8).encode(pixels(encoder, 8))
    assert encoder.encoded == 1


@pytest.mark.parametrize(
    ("free", "need", "size"),
    [(10_000, 100, 64), (10_000, 69, 64), (10_000, 54, 128), (1 << 40, 1, 1024), (10, 100, 1)],
)
def test_the_batch_fills_seven_tenths_of_the_free_memory(free, need, size):
    assert largest_batch(free, need) == size
    assert size in (1, 1024) or size * need <= 0.7 * free < 2 * size * need


def test_auto_is_64_on_a_cpu():
    assert AdaptiveBatcher(ColourEncoder(), "auto").size == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_fits_a_card(tiny_checkpoint):
    from clipkit.models.loading import load_model

    encoder = load_model(tiny_checkpoint, device="cuda")
    batcher = AdaptiveBatcher(encoder, "auto")
    assert batcher.size == 1024
    some = [encoder.preprocess.pixels(square("red", shade=n % 200)) for n in range(2000)]
    expected = load_model(tiny_checkpoint, device="cpu").encode_images([square("red", shade=7)])
    np.testing.assert_allclose(batcher.encode(some)[7], expected[0], atol=1e-4)
