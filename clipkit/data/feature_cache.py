"""Features of a locked tower, computed once, stored on disk and memory-mapped.

Each set of features is a directory ``KIND-HASH`` with ``features.npy``, float32 [n, views, …]. Its
rows are in the order of the keys. The hash covers everything that the features depend on, so equal
settings find them again, and different settings are stored next to them.
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
"""Number of rows between two progress records, from which an interrupted computation resumes."""

Encoded = tuple[NDArray[np.float32], dict[str, str]]
"""Features of consecutive rows, float32 [m, views, …], and by key the reasons why rows could not be
read. The features of such rows are zeros."""


@dataclass(frozen=True)
class Features:
    """Stored features by key.

    Attributes:
        values: float32 [n, views, …], memory-mapped.
        rows: row number by key.
        skipped: reason why an item has no features, by key.
    """

    values: NDArray[np.float32]
    rows: dict[str, int]
    skipped: dict[str, str]

    def draw(self, key: str, generator: random.Random) -> NDArray[np.float32]:
        """The features of one random view of an item, float32 […].

        Raises:
            ImageError: the item could not be read and has no features.
        """
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
    """Open the stored features of some items, computing and storing them first if necessary.

    An interrupted computation resumes where it stopped.

    Args:
        folder: contains one directory for each set of features.
        kind: "image" or "text", the prefix of the directory's name.
        model: the tower that computes the features.
        facts: everything else that the features depend on except the keys; JSON-serialisable.
        keys: unique keys of the items, in order.
        encode: yields the features from a given row on, in batches.

    Raises:
        ArtifactError: the features cannot be written, or the stored ones are damaged.
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
                f"cannot write the features {path}: {error.strerror}; free some disk space, or "
                "name another directory in data.feature_dir"
            ) from None


def _read_progress(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    try:
        progress: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        progress = {}
    fits = progress.get("facts") == facts and (folder / FEATURES_FILE).is_file()
    return progress if fits else {"done": 0, "skipped": {}}


def _write_rows(stream: BinaryIO, values: NDArray[np.float32], start: int, count: int) -> None:
    """Write rows into a .npy file of ``count`` rows, after rewriting its header."""
    # Not through a memory map, where a full disk kills the process with SIGBUS.
    stream.seek(0)
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, *values.shape[1:])}
    np.lib.format.write_array_header_1_0(stream, header)
    stream.seek(start * values[0].nbytes, 1)
    stream.write(np.ascontiguousarray(values, "<f4").tobytes())


def _damaged(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        f"{path / FEATURES_FILE} is damaged ({found}); delete {path} to compute the features again"
    )
