"""Vectors that were made before, kept in the person's cache directory, found by what made them.

The directory where a person's own files of clipkit are kept from one command to the next.
"""

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PLACE = "CLIPKIT_CACHE"
"""Environment variable: another directory for the cache, or ``off``."""


def cache_folder() -> Path | None:
    """``$CLIPKIT_CACHE``, else ``clipkit`` in the user's cache directory; None if there is none."""
    own = os.environ.get(PLACE)
    if own:
        return None if own == "off" else Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "clipkit"
    except RuntimeError:  # nobody's home is known
        return None


LIMIT = 2 << 30  # bytes; what was not used for the longest time goes first
_SHARE = 4  # one entry takes at most one part in so many of the limit

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Entry:
    """What is kept under a key: arrays by name, and texts beside them."""

    arrays: Arrays
    texts: dict[str, str]


class VectorCache:
    """Arrays by key in a directory of bounded size; an entry is one safetensors file.

    Whatever goes wrong (a full disk, a damaged file, no right to write) costs the work that the
    cache would have saved, and nothing else. Several processes may use it at a time.

    Args:
        folder: made when something is first kept.
        limit: most bytes.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit

    def get(self, key: str) -> Entry | None:
        """What is kept under a key, or None."""
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
        """Keep arrays and texts, if there is room; what was used longest ago makes way."""
        from safetensors.numpy import save

        size = sum(array.nbytes for array in arrays.values())
        if size > self.limit // _SHARE:
            return
        content = save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, texts)
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temp = tempfile.mkstemp(prefix=".", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(content)
                os.replace(temp, self._file(key))
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temp)
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
    """A key that is equal for equal parts: texts, numbers, and lists of them."""
    return blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


def user_cache() -> VectorCache | None:
    """The person's own cache, ``~/.cache/clipkit/vectors`` if not told otherwise; None if off."""
    folder = cache_folder()
    if folder is None:
        return None
    return VectorCache(folder if os.environ.get(PLACE) else folder / "vectors")
