"""Images kept come back bit for bit, within bounds, and leave nothing behind."""

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from clipkit.config import parse_config
from clipkit.data import image_cache as cache
from clipkit.data.image_cache import ImageCache, open_cache
from clipkit.training.data import image_cache
from tests.helpers.pairs import loader, png, row, same, source
from tests.helpers.toys import soft


def test_what_is_put_comes_back(tmp_path):
    kept = ImageCache(tmp_path, 1 << 30)
    pictures = {n: soft(5 + n, 7 + 2 * n, seed=n) for n in range(40)}
    for number, picture in pictures.items():
        assert kept.get(number) is None
        kept.put(number, picture)
    for number, picture in pictures.items():
        np.testing.assert_array_equal(kept.get(number), picture)
    assert kept.used == sum(picture.nbytes for picture in pictures.values())
    assert os.listdir(tmp_path) == []


def test_pictures_lie_in_many_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_SEGMENT", 1 << 14)
    kept = ImageCache(tmp_path, 1 << 18)
    pictures = {n: soft(30 + n % 7, 40, seed=n) for n in range(60)}
    for number, picture in pictures.items():
        kept.put(number, picture)
    found = [n for n in pictures if kept.get(n) is not None]
    assert 40 < len(found) < 60  # those that fit, and each whole
    for number in found:
        np.testing.assert_array_equal(kept.get(number), pictures[number])
    assert kept.used <= kept.limit
    kept.put(99, soft(200, 100))  # larger than a segment
    assert kept.get(99) is None


def test_a_full_disk_costs_nothing_that_is_kept(tmp_path, monkeypatch):
    kept = ImageCache(tmp_path, 1 << 30)
    kept.put(0, soft(10, 10))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    kept.put(1, soft(10, 10))
    monkeypatch.undo()
    kept.put(2, soft(10, 10))
    np.testing.assert_array_equal(kept.get(0), soft(10, 10))
    assert kept.get(1) is kept.get(2) is None


def test_threads_do_not_write_over_each_other(tmp_path):
    kept = ImageCache(tmp_path, 1 << 30)
    pictures = [soft(9 + n % 5, 8, seed=n) for n in range(200)]
    threads = [
        threading.Thread(target=lambda s=s: [kept.put(n, pictures[n]) for n in range(s, 200, 4)])
        for s in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, picture in enumerate(pictures):
        np.testing.assert_array_equal(kept.get(number), picture)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_same_batches_with_a_cache(tmp_path, workers):
    rows = [row(n, image=b"broken" if n == 3 else png(n)) for n in range(40)]
    plain = loader(source(rows), workers=workers, skip_limit=0.5)
    # Room for some of the pictures only.
    kept = ImageCache(tmp_path, 20 * 6 * 5 * 3)
    cached = loader(source(rows), workers=workers, skip_limit=0.5, cache=kept)
    for epoch in range(3):
        assert same(list(plain.batches(epoch)), list(cached.batches(epoch)))
    assert kept.used == kept.limit
    assert plain.skipped == cached.skipped


def test_a_kept_picture_is_not_read_again(tmp_path, monkeypatch):
    reader = loader(source([row(n) for n in range(16)]), cache=ImageCache(tmp_path, 1 << 20))
    first = list(reader.batches(0))
    monkeypatch.setattr("clipkit.data.rows.read_image", None)
    assert sorted(k for b in reader.batches(1) for k in b.keys) == sorted(
        k for b in first for k in b.keys
    )


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, True),
        ({"cache": "no"}, False),
        ({"epochs": 1}, False),
        ({"epochs": 1, "cache": "yes"}, True),
        ({"steps": 5}, False),
        ({"steps": 6, "epochs": 1}, True),
        ({"streaming": True, "cache": "yes"}, False),
    ],
)
def test_when_a_run_keeps_pictures(tmp_path, settings, kept):
    settings = dict(settings)
    streaming = settings.pop("streaming", False)
    data = {"image_cache": settings.pop("cache")} if "cache" in settings else {}
    config = parse_config({"data": data, "train": settings})
    reader = loader(source([row(n) for n in range(40)], streaming=streaming))
    assert (image_cache(config, reader, tmp_path) is not None) == kept


def test_how_much_of_the_disk_is_used(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=40 << 30)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert open_cache("auto", tmp_path).limit == 2 << 30
    assert open_cache("yes", tmp_path).limit == 10 << 30
    usage.free = 4 << 30
    assert open_cache("auto", tmp_path).limit == 1 << 30
    assert open_cache("no", tmp_path) is None
