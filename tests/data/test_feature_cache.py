"""Features on disk: found again, made anew when anything differs, resumed where they stopped."""

import errno
import random

import numpy as np
import pytest

from clipkit.artifacts import ModelRef
from clipkit.data import feature_cache as module
from clipkit.data.feature_cache import stored_features
from clipkit.errors import ArtifactError, ImageError

KEYS = [f"{number}.jpg" for number in range(10)]
WANTED = np.arange(10 * 2 * 3, dtype=np.float32).reshape(10, 2, 3)


class Tower:
    """Encodes in batches of three; can stop before a row, as a person pressing Ctrl-C would."""

    def __init__(self, stop=99, bad=()):
        self.stop, self.bad, self.starts = stop, bad, []

    def __call__(self, start):
        self.starts.append(start)
        for at in range(start, 10, 3):
            if at >= self.stop:
                raise KeyboardInterrupt
            bad = {key: "is empty" for key in KEYS[at : at + 3] if key in self.bad}
            yield WANTED[at : at + 3], bad


def stored(folder, tower, fingerprint="tower", keys=KEYS, **facts):
    return stored_features(folder, "image", ModelRef("m", "", fingerprint, 3), facts, keys, tower)


def test_are_what_the_tower_made_and_are_not_made_twice(tmp_path):
    first, second = Tower(), Tower()
    made = stored(tmp_path, first)
    np.testing.assert_array_equal(made.values, WANTED)
    assert isinstance(made.values, np.memmap)
    np.testing.assert_array_equal(stored(tmp_path, second).values, WANTED)
    assert (first.starts, second.starts) == ([0], [])


@pytest.mark.parametrize(
    "other", [{"fingerprint": "other"}, {"precision": "bf16"}, {"keys": KEYS[::-1]}]
)
def test_anything_else_is_made_beside_them(tmp_path, other):
    stored(tmp_path, Tower(), precision="fp32")
    tower = Tower()
    stored(tmp_path, tower, **({"precision": "fp32"} | other))
    assert tower.starts == [0]
    assert len(list(tmp_path.iterdir())) == 2


def test_go_on_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVED_ROWS", 4)
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, Tower(stop=9, bad=["1.jpg"]))
    again = Tower()
    made = stored(tmp_path, again)
    assert again.starts == [6]
    np.testing.assert_array_equal(made.values, WANTED)
    assert made.skipped == {"1.jpg": "is empty"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_view_is_drawn_and_a_bad_image_has_none(tmp_path):
    made = stored(tmp_path, Tower(bad=["2.jpg"]))
    drawn = {made.draw("5.jpg", random.Random(seed))[0] for seed in range(20)}
    assert drawn == {WANTED[5, 0, 0], WANTED[5, 1, 0]}
    with pytest.raises(ImageError, match="is empty"):
        made.draw("2.jpg", random.Random(0))


def test_damage_and_a_full_disk_are_told(tmp_path, monkeypatch):
    stored(tmp_path, Tower())
    (file,) = tmp_path.glob("*/features.npy")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="is damaged"):
        stored(tmp_path, Tower())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write_rows", full)
    with pytest.raises(ArtifactError, match="No space left.*data.feature_dir"):
        stored(tmp_path / "other", Tower())
