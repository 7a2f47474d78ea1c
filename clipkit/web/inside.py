"""Pictures of an index that lie inside tables and tars, and are what was indexed."""

from collections.abc import Callable

from clipkit.data.content import content_hash
from clipkit.errors import DataError, ImageError
from clipkit.store.pictures import InsidePictures
from clipkit.store.roots import Root, owner
from clipkit.web.problems import RequestError

Facts = tuple[int, str | None]
"""Bytes of a picture when it was indexed, and the hash of its content, where that was noted."""


class CheckedPictures:
    """Reads pictures by the keys of an index from the sources that its manifest names.

    No part of a key becomes a path, and what is read is checked against the index's record, so
    that a source that changed since never shows another picture.

    Args:
        roots: the sources.
        facts: gives the record of a key.
        most: bytes of the largest picture that is read.
    """

    def __init__(self, roots: list[Root], facts: Callable[[str], Facts], most: int) -> None:
        self._roots, self._facts, self._most = roots, facts, most
        self._inside = InsidePictures(roots)
        self.hold = self._inside.hold

    def missing(self, key: str) -> str | None:
        """Why what should hold the picture of a key cannot be opened; None where it can."""
        try:
            self._inside.open(key)
        except DataError as error:
            return f"{key} cannot be shown: {error}"
        return None

    def stamp(self, key: str) -> str:
        """A text that changes when the picture of a key does."""
        size, digest = self._facts(key)
        return f"{owner(self._roots, key).where}\0{key}\0{size}\0{digest}"

    def read(self, key: str) -> bytes:
        """The content of a picture.

        Raises:
            RequestError: it is not there any more (404), or too large (413).
        """
        size, digest = self._facts(key)
        if size > self._most:
            raise RequestError(413, f"{key} has more than {self._most >> 20} MiB")
        try:
            data = self._inside.read(key)
            same = data is not None and len(data) == size
            if data is not None and same and (digest is None or content_hash(data) == digest):
                return data
        except (DataError, ImageError) as error:
            raise RequestError(404, f"{key} cannot be shown: {error}") from None
        raise RequestError(
            404,
            f"what holds {key} has changed since it was indexed; bring the index up to date",
        )
