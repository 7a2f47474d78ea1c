"""Models known to lie unchanged on this machine: their fingerprints need no second reading.

A fingerprint takes reading all weights. When a model was loaded whole, a note is kept of the file
whose weights it stands for; the file is taken to be unchanged while its size, its inode and the
times of its last change are, of which the kernel sets one itself.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from clipkit.data.user_cache import cache_folder
from clipkit.manifest import ModelRef, write_json

EPSILON = 1e-5
"""Of the layer norms of a tower that is noted, and that is run from a note."""


@dataclass(frozen=True)
class KnownTower:
    """A text tower on disk, and what shapes its result beside its weights.

    Attributes:
        file: a .safetensors file.
        stamp: what ``stamp`` said of it when it was read.
        prefix: of the names of the tower's weights in it.
        heads: of attention.
        layers: how many blocks.
        activation: "gelu" or "quick_gelu".
    """

    file: str
    stamp: list[int]
    prefix: str
    heads: int
    layers: int
    activation: str


def stamp(file: str | Path) -> list[int]:
    """What changes when a file does; raises OSError where there is none."""
    status = os.stat(file)
    return [
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
    ]


def note(model: ModelRef, tower: KnownTower) -> None:
    """Keep a note of where a model's text tower lies; without a place for it, none is kept."""
    file = _file(model)
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"model": [model.name, model.weights], "tower": asdict(tower)})


def recall(model: ModelRef) -> KnownTower | None:
    """Where a model's text tower lies unchanged; None where that is not known."""
    file = _file(model)
    if file is None or not re.fullmatch("[0-9a-f]{64}", model.fingerprint):
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        tower = KnownTower(**kept["tower"])
        same = kept["model"] == [model.name, model.weights] and stamp(tower.file) == tower.stamp
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tower if same else None


def _file(model: ModelRef) -> Path | None:
    folder = cache_folder()
    return folder / "models" / f"{model.fingerprint}.json" if folder else None
