"""The user's cache directory, and the vectors cached in it between commands.

Vectors are found by a key of everything they depend on: model, data and settings. Each kind of
file has a folder of its own: ``vectors``, ``models``, ``thumbnails``.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipkit.artifacts import replacing

PLACE = "CLIPKIT_CACHE"
"""Environment variable with the path of the cache directory, or ``off`` to disable caching."""
LIMIT = 2 << 30  # bytes; the least recently used entries are deleted first
_SHARE = 4  # an entry may take at most 1/4 of the limit

Arrays = dict[str, NDArray[np.float32]]


def cache_folder() -> Path | None:
    """``$CLIPKIT_CACHE``, or by default ``~/.cache/clipkit``; None if caching is off."""
    own = os.environ.get(PLACE)
    if own:
        return None if own == "off" else Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "clipkit"
    except RuntimeError:  # the home directory is unknown
        return None


@dataclass(frozen=True)
class Entry:
    """Cached arrays and strings by name."""

    arrays: Arrays
    texts: dict[str, str]


class VectorCache:
    """Arrays by key in a directory of bounded size; an entry is one safetensors file.

    A failure (full disk, damaged file, missing permission) is a cache miss, never an error.
    Several processes may use the same directory.

    Args:
        folder: created by the first ``put``.
        limit: maximum size in bytes.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit

    def get(self, key: str) -> Entry | None:
        """The entry of a key, or None."""
        from safetensors import SafetensorError, safe_open

        file = self._file(key)
        try:
            with safe_open(file, framework="numpy") as stored:
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                texts = dict(stored.metadata() or {})
            os.utime(file)
        except (OSError, SafetensorError, ValueError):
            return None
        return Entry(arrays, texts)

    def put(self, key: str, arrays: Arrays, texts: dict[str, str]) -> None:
        """Store an entry unless it is too large, and evict the least recently used ones."""
        from safetensors.numpy import save

        size = sum(array.nbytes for array in arrays.values())
        if size > self.limit // _SHARE:
            return
        content = save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, texts)
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._file(key), durable=False, shared=True) as temp:
                temp.write_bytes(content)
            self._tidy()

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _tidy(self) -> None:
        found = [(file, file.stat()) for file in self.folder.glob("*.safetensors")]
        total = sum(status.st_size for _, status in found)
        for file, status in sorted(found, key=lambda item: item[1].st_mtime_ns):
            if total <= self.limit:
                return
            file.unlink(missing_ok=True)
            total -= status.st_size


def key_of(*parts: object) -> str:
    """A hash of strings, numbers, and lists of them; equal parts give equal keys."""
    return blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


def user_cache() -> VectorCache | None:
    """The vector cache, by default in ``~/.cache/clipkit/vectors``; None if caching is off."""
    folder = cache_folder()
    return None if folder is None else VectorCache(folder / "vectors")
