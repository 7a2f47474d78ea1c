"""The vector cache: exact values, separate keys for other models and data, bounded size."""

import os

import numpy as np
import pytest

import clipkit
from clipkit.data.open_source import open_source
from clipkit.models import embed_source as module
from clipkit.models.embed_source import cached_pairs
from clipkit.user_cache import VectorCache, key_of, user_cache
from tests.helpers.toys import unit_rows


def test_round_trip(tmp_path):
    cache = VectorCache(tmp_path / "a" / "b")
    assert cache.get("one") is None
    cache.put("one", {"x": unit_rows(3, 4)}, {"what": "drei Äpfel"})
    found = cache.get("one")
    np.testing.assert_array_equal(found.arrays["x"], unit_rows(3, 4))
    assert found.texts == {"what": "drei Äpfel"}
    assert cache.get("two") is None


def test_the_least_recently_used_entry_is_evicted(tmp_path):
    cache = VectorCache(tmp_path, limit=4 * 5000)
    for number in range(4):
        cache.put(str(number), {"x": np.zeros(1100, np.float32)}, {})
        os.utime(cache._file(str(number)), (number, number))
    assert cache.get("0") is not None  # and with that it is the last one used
    cache.put("4", {"x": np.zeros(1100, np.float32)}, {})
    held = [number for number in range(5) if cache._file(str(number)).exists()]
    assert held == [0, 2, 3, 4]
    cache.put("large", {"x": np.zeros(1300, np.float32)}, {})
    assert cache.get("large") is None  # more than a quarter of all


def test_a_failure_is_a_cache_miss(tmp_path):
    cache = VectorCache(tmp_path)
    cache.put("one", {"x": unit_rows(2, 4)}, {})
    cache._file("one").write_bytes(b"damaged")
    assert cache.get("one") is None
    (tmp_path / "file").write_text("in the way")
    VectorCache(tmp_path / "file").put("one", {"x": unit_rows(2, 4)}, {})
    assert VectorCache(tmp_path / "file").get("one") is None


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPKIT_CACHE", "off")
    assert user_cache() is None
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path))
    assert user_cache().folder == tmp_path / "vectors"
    monkeypatch.delenv("CLIPKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert user_cache().folder == tmp_path / "x" / "clipkit" / "vectors"


def test_keys_of_different_parts_differ():
    parts = [("a", ["b", "c"]), ("a", ["bc"]), ("a", ["b"], ["c"]), ("ab", ["c"])]
    assert len({key_of(*part) for part in parts}) == 4


@pytest.fixture
def encodings(monkeypatch, tmp_path):
    """An empty cache that keeps even small sets, and how often a set was encoded since."""
    done = []
    original = module.encode_pairs
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "FEWEST", 1)
    monkeypatch.setattr(
        module, "encode_pairs", lambda *a, **k: (done.append(1), original(*a, **k))[1]
    )
    return done


@pytest.mark.parametrize("with_captions", [False, True])
def test_pairs_are_encoded_once(encodings, colour_folder, tiny_checkpoint, with_captions):
    (colour_folder / "red-1.txt").write_text("red\n" + "very " * 90 + "red\n")
    (colour_folder / "red-2.txt").unlink()
    (colour_folder / "bad.png").write_bytes(b"")
    (colour_folder / "bad.txt").write_text("bad")
    encoder = clipkit.load_model(tiny_checkpoint)
    first, second = (
        cached_pairs(
            encoder, open_source(colour_folder), with_captions=with_captions, progress=False
        )
        for _ in range(2)
    )
    assert len(encodings) == 1
    for name in ("images", "captions", "owners"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name in ("keys", "texts", "labels", "skipped", "report"):
        assert getattr(first, name) == getattr(second, name), name
    assert len(first.keys) == (11 if with_captions else 12)
    # A caption that is written anew at the same time and of the same length is noticed, too.
    file = colour_folder / "blue-1.txt"
    before = file.stat()
    file.write_text("a bleu picture\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    third = cached_pairs(
        encoder, open_source(colour_folder), with_captions=with_captions, progress=False
    )
    assert len(encodings) == (2 if with_captions else 1)
    assert ("a bleu picture" in third.texts) == with_captions


def test_a_subset_of_a_source_has_its_own_entry(encodings, colour_folder, tiny_checkpoint):
    from dataclasses import replace

    encoder, source = clipkit.load_model(tiny_checkpoint), open_source(colour_folder)
    cached_pairs(encoder, source, progress=False)
    part = replace(source, rows=source.rows.select([3, 5]))  # of the same fingerprint
    assert len(cached_pairs(encoder, part, progress=False).keys) == 2
    assert len(encodings) == 2
