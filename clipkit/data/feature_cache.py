"""Features of a locked tower, computed once and kept on disk, memory-mapped.

A directory ``image-HASH`` or ``caption-HASH`` with ``features.npy``, ``float32 [n, views, …]``; the
hash is over all that decides the features, so that equal features are found again and others are
made beside them. Its rows are those of the table they were made of, in the same order.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from clipkit.artifacts import (
    ArtifactWriter,
    Manifest,
    ModelRef,
    is_complete,
    read_manifest,
    write_json,
)
from clipkit.errors import ArtifactError, ImageError

FEATURES_FILE = "features.npy"
PROGRESS_FILE = "progress.json"
SAVED_ROWS = 1000
"""Rows between two notes of how far the features have come, from where they can go on."""

Encoded = tuple[NDArray[np.float32], dict[str, str]]
"""Features of some rows, float32 [m, views, …], and why rows could not be read, by key; such rows
hold zeros."""


@dataclass(frozen=True)
class Features:
    """Stored features, found by key.

    Attributes:
        values: float32 [n, views, …], memory-mapped.
        rows: the row of each key.
        skipped: why an item has no features, by key.
    """

    values: NDArray[np.float32]
    rows: dict[str, int]
    skipped: dict[str, str]

    def draw(self, key: str, generator: random.Random) -> NDArray[np.float32]:
        """One view's features of an item, float32 […]; raises ImageError where it has none."""
        if key in self.skipped:
            raise ImageError(self.skipped[key])
        views = self.values.shape[1]
        view = generator.randrange(views) if views > 1 else 0
        features: NDArray[np.float32] = self.values[self.rows[key], view]
        return features


def stored_features(
    folder: Path,
    kind: str,
    model: ModelRef,
    facts: dict[str, Any],
    keys: Sequence[str],
    encode: Callable[[int], Iterator[Encoded]],
) -> Features:
    """The features of some items: read where they are stored, else computed and stored.

    An interrupted computation goes on where it stopped.

    Args:
        folder: holds one directory for each different set of features.
        kind: "image" or "caption".
        model: the tower that makes them.
        facts: what else decides them but the keys, as plain data.
        keys: of the items, in order; each once.
        encode: the features from a row on, batch by batch.

    Raises:
        ArtifactError: they cannot be written, or what is there is damaged.
    """
    names = sha256("\0".join(keys).encode("utf-8", "surrogatepass")).hexdigest()
    facts = facts | {"tower": model.fingerprint, "keys": names}
    digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = folder / f"{kind}-{digest[:16]}"
    if not is_complete(path):
        _compute(path, model, facts, len(keys), encode)
    skipped = read_manifest(path, "features").detail["skipped"]
    try:
        values = np.load(path / FEATURES_FILE, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if values.dtype != np.float32 or len(values) != len(keys):
        raise _damaged(path, f"{values.dtype} {list(values.shape)}, {len(keys)} rows expected")
    return Features(values, {key: row for row, key in enumerate(keys)}, skipped)


def _compute(
    path: Path,
    model: ModelRef,
    facts: dict[str, Any],
    count: int,
    encode: Callable[[int], Iterator[Encoded]],
) -> None:
    with ArtifactWriter(path, "features", resume=True) as writer:
        progress = _read_progress(writer.temp, facts)
        done, skipped = progress["done"], progress["skipped"]
        file = writer.temp / FEATURES_FILE
        try:
            with file.open("r+b" if done else "wb") as stream:
                saved = done
                for values, bad in encode(done) if done < count else ():
                    _write_rows(stream, values, done, count)
                    done += len(values)
                    skipped |= bad
                    if done - saved >= SAVED_ROWS:
                        stream.flush()
                        saved = done
                        note = {"facts": facts, "done": done, "skipped": skipped}
                        write_json(writer.temp / PROGRESS_FILE, note)
            (writer.temp / PROGRESS_FILE).unlink(missing_ok=True)
            detail = facts | {"skipped": skipped}
            writer.finish(Manifest("features", model, count, detail=detail))
        except OSError as error:
            raise ArtifactError(
                f"the features {path} cannot be written ({error.strerror}); make room, or name "
                "another place in data.feature_dir"
            ) from None


def _read_progress(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    try:
        progress: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        progress = {}
    fits = progress.get("facts") == facts and (folder / FEATURES_FILE).is_file()
    return progress if fits else {"done": 0, "skipped": {}}


def _write_rows(stream: BinaryIO, values: NDArray[np.float32], start: int, count: int) -> None:
    """Write rows into a .npy file of ``count`` rows; its header stands before the first."""
    # Not through a memory map, which a full disk would end with a signal instead of an error.
    stream.seek(0)
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, *values.shape[1:])}
    np.lib.format.write_array_header_1_0(stream, header)
    stream.seek(start * values[0].nbytes, 1)
    stream.write(np.ascontiguousarray(values, "<f4").tobytes())


def _damaged(path: Path, found: str) -> ArtifactError:
    return ArtifactError(f"{path / FEATURES_FILE} is damaged ({found}); remove {path} to make anew")
