"""Hits: what a search found, best first, with the pictures where they are files."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from clipkit.data.images import read_image
from clipkit.data.thumbnails import thumbnail
from clipkit.errors import DataError, ImageError
from clipkit.pages.cards import gallery
from clipkit.store.calibration import GOOD
from clipkit.store.pictures import InsidePictures
from clipkit.store.roots import Root, file_of
from clipkit.store.vector_index import Hit


class Hits(list[Hit]):
    """A list of hits that shows itself as pictures in a notebook.

    Attributes:
        query: what was searched for, in words.
        roots: where the images of the index lie.
    """

    def __init__(self, hits: Iterable[Hit], query: str, roots: list[Root]) -> None:
        super().__init__(hits)
        self.query, self.roots = query, roots

    @cached_property
    def _inside(self) -> InsidePictures:
        return InsidePictures(self.roots)

    def picture(self, hit: Hit) -> bytes | None:
        """A small JPEG of a hit; None where its picture is on the hub, gone or unreadable."""
        try:
            found: Path | bytes | None = file_of(self.roots, hit.key)
            if found is None and self._inside.hold(hit.key):
                found = self._inside.read(hit.key)
            return None if found is None else thumbnail(read_image(found))
        except (DataError, ImageError):
            return None

    def _repr_html_(self) -> str:
        items = ((self.picture(hit), _score(hit), hit.key) for hit in self)
        title = f"“{self.query}”" if self.query else f"{len(self)} hits"
        best = max((hit.probability for hit in self if hit.probability is not None), default=None)
        if best is not None and best < GOOD:
            title += ": no good match"
        return gallery(title, items, len(self))


def _score(hit: Hit) -> str:
    return f"{hit.score:.3f}" if hit.probability is None else f"{hit.probability:.0%}"
