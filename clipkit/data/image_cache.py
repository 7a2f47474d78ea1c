"""A cache of the decoded images of a training run, in a memory-mapped temporary file."""

import mmap
import os
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Literal

import numpy as np

from clipkit.data.transforms import Pixels

Setting = Literal["auto", "yes", "no"]
AUTO_LIMIT = 2 << 30  # bytes
_DISK_SHARE = 4  # at most 1/4 of the free disk space
_SEGMENT = 64 << 20  # bytes mapped at a time


class ImageCache:
    """Images by row number, each stored when it is first decoded, until the run ends.

    Cached images are identical to decoded ones, so the results of a run do not depend on how many
    fit. The file is unlinked at once: it disappears with the process, however that ends, and can
    neither be stale nor belong to another run. The first epoch fills it, without a pass of its own.
    Thread-safe.

    Args:
        folder: directory for the temporary file.
        limit: maximum size in bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.limit, self.used = limit, 0
        file, name = tempfile.mkstemp(prefix=".images-", dir=folder)
        os.unlink(name)
        self._file = file
        self._close = weakref.finalize(self, os.close, file)
        self._lock = threading.Lock()
        self._segments: list[mmap.mmap] = []
        self._places: dict[int, tuple[int, int, tuple[int, ...]]] = {}

    def get(self, row: int) -> Pixels | None:
        """The image of a row, uint8 [h, w, 3], read-only; None if it is not cached."""
        place = self._places.get(row)
        if place is None:
            return None
        segment, start, shape = place
        size = shape[0] * shape[1] * shape[2]
        return np.frombuffer(self._segments[segment], np.uint8, size, start).reshape(shape)

    def put(self, row: int, pixels: Pixels) -> None:
        """Store an image, uint8 [h, w, 3], if there is room for it."""
        with self._lock:
            start = self._reserve(pixels.nbytes)
        if start is None:
            return
        try:
            # Not through the memory map, where a full disk kills the process with SIGBUS.
            written = os.pwrite(self._file, np.ascontiguousarray(pixels).data, start)
        except OSError:
            written = 0
        if written == pixels.nbytes:
            self._places[row] = (start // _SEGMENT, start % _SEGMENT, pixels.shape)
        else:
            self.limit = 0  # the disk is full: keep what is cached and add nothing more

    def _reserve(self, size: int) -> int | None:
        """Offset of ``size`` free bytes within one segment; None if there is no room."""
        left = -self.used % _SEGMENT
        start = self.used if size <= left else self.used + left
        if size > _SEGMENT or start + size > self.limit:
            return None
        if start == len(self._segments) * _SEGMENT:
            # A sparse file: it uses no disk space until it is written to.
            os.ftruncate(self._file, start + _SEGMENT)
            self._segments.append(
                mmap.mmap(self._file, _SEGMENT, prot=mmap.PROT_READ, offset=start)
            )
        self.used = start + size
        return start


def open_cache(setting: Setting, folder: Path) -> ImageCache | None:
    """Open a cache in ``folder`` that takes at most 1/4 of the free disk space; None for "no".

    "auto" limits it further, to ``AUTO_LIMIT`` bytes.
    """
    if setting == "no":
        return None
    limit = shutil.disk_usage(folder).free // _DISK_SHARE
    return ImageCache(folder, min(limit, AUTO_LIMIT) if setting == "auto" else limit)
