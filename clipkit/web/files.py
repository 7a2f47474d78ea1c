"""The picture files of an index, and no other file of the machine."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from clipkit.data.hub import HUB
from clipkit.data.images import read_image
from clipkit.errors import ImageError
from clipkit.store.roots import Root, file_of, owner
from clipkit.web.inside import CheckedPictures, Facts
from clipkit.web.pictures import as_jpeg, media_type, thumbnail
from clipkit.web.problems import RequestError

Result = TypeVar("Result")
MAX_FILE = 256 << 20
"""Bytes of the largest file that is read: decoding runs two at a time, so this bounds memory."""


def readable(key: str, read: Callable[[], Result]) -> Result:
    """What ``read`` returns; raises RequestError (415) where it meets no picture."""
    try:
        return read()
    except ImageError as error:
        raise RequestError(415, f"{key} cannot be read, it {error}") from None


class PictureFiles:
    """Reads the file of a key below the folder it was indexed from, or out of a table or tar.

    Args:
        roots: those folders, tables and tars.
        facts: gives the record of a key, by which a picture inside something is known again.
    """

    def __init__(self, roots: list[Root], facts: Callable[[str], Facts]) -> None:
        self._roots = roots
        self._inside = CheckedPictures(roots, facts, MAX_FILE)

    def missing(self, key: str) -> str | None:
        """Why a key has neither a file nor something that should hold its picture; else None."""
        if self._is_inside(key):
            return self._inside.missing(key)
        return self._missing(key) if file_of(self._roots, key) is None else None

    def path(self, key: str) -> Path:
        """The file of a key, its links followed.

        Raises:
            RequestError: there is none (404), or it lies outside of the key's folder.
        """
        path = file_of(self._roots, key)
        if path is None:
            raise RequestError(404, self._missing(key))
        return path

    def stamp(self, key: str) -> str:
        """A text that changes when the picture of a key does; raises as ``path``."""
        if self._is_inside(key):
            return self._inside.stamp(key)
        path = self.path(key)
        try:
            status = path.stat()
        except OSError:
            raise RequestError(404, self._missing(key)) from None
        return f"{path}\0{status.st_size}\0{status.st_mtime_ns}"

    def read(self, key: str) -> bytes:
        """The content of a picture as its file holds it.

        Raises:
            RequestError: as ``path``; or it is no regular file (404), or too large (413).
        """
        if self._is_inside(key):
            return self._inside.read(key)
        path = self.path(key)
        try:
            # The path holds no link any more; not waiting keeps a named pipe from holding us up.
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise RequestError(404, self._missing(key)) from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise RequestError(404, f"{key} is no regular file any more")
        with os.fdopen(file, "rb") as stream:
            data = stream.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise RequestError(413, f"the file of {key} has more than {MAX_FILE >> 20} MiB")
        return data

    def shown(self, key: str) -> tuple[bytes, str]:
        """What a browser shows of a key, and its media type: the file, or a JPEG made of it.

        Raises:
            RequestError: as ``read``; or the file is no picture that can be read (415).
        """
        data = self.read(key)
        kind = media_type(data)
        if kind is not None:
            return data, kind
        return as_jpeg(readable(key, lambda: read_image(data))), "image/jpeg"

    def thumbnail(self, key: str) -> bytes:
        """A small JPEG of a key; raises as ``shown``."""
        data = self.read(key)
        return readable(key, lambda: thumbnail(data))

    def _is_inside(self, key: str) -> bool:
        # A table may name some files and hold other pictures itself.
        return self._inside.hold(key) and file_of(self._roots, key) is None

    def _missing(self, key: str) -> str:
        where = owner(self._roots, key).where
        if where.startswith(HUB):
            return f"{key} has no file on this machine: it lies in the data set {where} of the hub"
        return (
            f"the file of {key} is not there any more, or a link leads out of the index's folder; "
            "bring the index up to date"
        )
