"""Pairs put together into batches, while the batch before is used."""

import threading

import numpy as np
import pytest
import torch
from test_pairs import loader, row, source

from clipkit.data import loader as collate
from clipkit.data.images import Skipped
from clipkit.data.loader import Gathered, Pair


def pairs(count, dtype=np.uint8):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 4, 5, 3)).astype(dtype)
    return images, [Pair(f"{i}.png", image, f"{i}", 1 + i) for i, image in enumerate(images)]


def as_numbers(captions):
    return np.array([[int(caption)] * 77 for caption in captions], np.int64).reshape(-1, 77)


def test_rows_are_put_together_in_their_order():
    images, (first, *others) = pairs(3)
    bad = Skipped("bad.png", "no image")
    gathered = Gathered.of([first, bad, *others], images[0], pinned=False)
    assert gathered.bad == [bad]
    assert gathered.images.is_contiguous(memory_format=torch.channels_last)
    assert gathered.images.permute(0, 2, 3, 1).numpy().tolist() == images.tolist()
    batch = gathered.read(as_numbers, weighted=True)
    assert batch.keys == ["0.png", "1.png", "2.png"]
    assert batch.tokens[:, 5].tolist() == [0, 1, 2]
    assert batch.weights.tolist() == [1, 2, 3]
    assert gathered.read(as_numbers, weighted=False).weights is None


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_batch_without_pairs_has_the_form_of_others(dtype):
    images, some = pairs(2, dtype)
    full = Gathered.of(some, images[0], pinned=False).read(as_numbers, weighted=False)
    empty = Gathered.of([], images[0], pinned=False).read(as_numbers, weighted=False)
    assert len(empty) == 0
    assert empty.images.shape == (0, *full.images.shape[1:])
    assert empty.images.dtype == full.images.dtype
    assert empty.tokens.shape == (0, 77)


def test_features_stay_as_they_are():
    features, some = pairs(2, np.float32)
    assert Gathered.of(some, features[0], pinned=False).images.tolist() == features.tolist()


def test_the_next_batch_is_put_together_meanwhile(monkeypatch):
    together, done = [], threading.Event()
    as_batch = collate.as_batch

    def watched(pictures, **choice):
        together.append(threading.current_thread())
        if len(together) == 2:
            done.set()
        return as_batch(pictures, **choice)

    monkeypatch.setattr(collate, "as_batch", watched)
    batches = loader(source([row(number) for number in range(40)])).batches(0)
    next(batches)
    assert done.wait(20), "nobody asked for it"
    assert threading.main_thread() not in together
    assert 2 <= len(together) <= 3, "and no further"
    batches.close()
