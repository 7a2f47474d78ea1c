"""ThumbCache: thumbnails on disk, made once, in a directory that never outgrows its bound."""

import hashlib
import os
import tempfile
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

LIMIT = 500_000_000
"""Bytes of all thumbnails together: about 25,000 of them."""
_SUFFIX = ".jpg"


class ThumbCache:
    """Keeps what was made for a name; what was not asked for longest goes first.

    A directory that cannot be written to is no error: then each is made anew. Safe to use from
    several threads.

    Args:
        folder: where the files lie, made if need be, for its owner's eyes only.
        limit: most bytes to keep.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self.used = 0
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for file in sorted(folder.glob(f"*{_SUFFIX}"), key=lambda f: f.stat().st_mtime_ns):
                self._sizes[file.name] = file.stat().st_size
        self.used = sum(self._sizes.values())

    def find(self, name: str) -> bytes | None:
        """What is kept for a name."""
        file = self._file(name)
        try:
            data = file.read_bytes()
        except OSError:
            return None
        with self._lock:
            if file.name in self._sizes:
                self._sizes.move_to_end(file.name)
        return data

    def keep(self, name: str, data: bytes) -> None:
        """Keep something for a name, if the disk lets us."""
        if len(data) <= self.limit:
            with suppress(OSError):
                self._write(self._file(name), data)

    def _file(self, name: str) -> Path:
        # A digest, so that no key can name a place outside of the directory.
        return self.folder / (hashlib.sha256(name.encode()).hexdigest() + _SUFFIX)

    def _write(self, file: Path, data: bytes) -> None:
        number, temp = tempfile.mkstemp(prefix=".new-", dir=self.folder)
        try:
            with os.fdopen(number, "wb") as stream:
                stream.write(data)
            os.replace(temp, file)
        except BaseException:
            os.unlink(temp)
            raise
        with self._lock:
            self.used += len(data) - self._sizes.pop(file.name, 0)
            self._sizes[file.name] = len(data)
            while self.used > self.limit:
                oldest, size = self._sizes.popitem(last=False)
                self.used -= size
                (self.folder / oldest).unlink(missing_ok=True)
