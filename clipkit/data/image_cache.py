"""Decoded pictures of a run, kept in a file that is mapped into memory."""

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
_DISK_SHARE = 4  # at most one part in so many of the free disk
_SEGMENT = 64 << 20  # bytes mapped at a time


class ImageCache:
    """Pictures by row number, each kept when it is first decoded, for as long as the run lasts.

    A picture that comes from here is the one that was put in, bit for bit, so that a run does not
    depend on what fits. The file has no name: it goes with the process, however that ends, and
    can never be another run's or out of date. Filling it costs no pass of its own, for the first
    epoch decodes every picture in any case. Safe to use from several threads.

    Args:
        folder: where the file lies.
        limit: most bytes to keep.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.limit, self.used = limit, 0
        file, name = tempfile.mkstemp(prefix=".pictures-", dir=folder)
        os.unlink(name)
        self._file = file
        self._close = weakref.finalize(self, os.close, file)
        self._lock = threading.Lock()
        self._segments: list[mmap.mmap] = []
        self._places: dict[int, tuple[int, int, tuple[int, ...]]] = {}

    def get(self, row: int) -> Pixels | None:
        """The picture of a row, uint8 [h, w, 3], not to be written to; None if it is not kept."""
        place = self._places.get(row)
        if place is None:
            return None
        segment, start, shape = place
        size = shape[0] * shape[1] * shape[2]
        return np.frombuffer(self._segments[segment], np.uint8, size, start).reshape(shape)

    def put(self, row: int, picture: Pixels) -> None:
        """Keep a picture, uint8 [h, w, 3], if there is room for it."""
        with self._lock:
            start = self._reserve(picture.nbytes)
        if start is None:
            return
        try:
            # Not through the map: there a full disk ends the process, here it is an error.
            written = os.pwrite(self._file, np.ascontiguousarray(picture).data, start)
        except OSError:
            written = 0
        if written == picture.nbytes:
            self._places[row] = (start // _SEGMENT, start % _SEGMENT, picture.shape)
        else:
            self.limit = 0  # the disk is full: what is kept stays, nothing more is

    def _reserve(self, size: int) -> int | None:
        """Where so many bytes may lie, in one segment; None where there is no room."""
        left = -self.used % _SEGMENT
        start = self.used if size <= left else self.used + left
        if size > _SEGMENT or start + size > self.limit:
            return None
        if start == len(self._segments) * _SEGMENT:
            # A file with a hole: it takes no disk before it is written to.
            os.ftruncate(self._file, start + _SEGMENT)
            self._segments.append(
                mmap.mmap(self._file, _SEGMENT, prot=mmap.PROT_READ, offset=start)
            )
        self.used = start + size
        return start


def open_cache(setting: Setting, folder: Path) -> ImageCache | None:
    """A cache in ``folder`` as the setting wants it, in at most a quarter of the free disk."""
    if setting == "no":
        return None
    limit = shutil.disk_usage(folder).free // _DISK_SHARE
    return ImageCache(folder, min(limit, AUTO_LIMIT) if setting == "auto" else limit)
