"""Search results: hits in order of score, which read their images and records on demand."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from clipkit.data.images import read_image
from clipkit.data.random_access import ImageReader, holds_images, open_image_reader
from clipkit.display.dataframe import data_frame
from clipkit.display.html import gallery
from clipkit.display.thumbnails import thumbnail
from clipkit.errors import DataError, ImageError
from clipkit.index.roots import Root, file_of, owner


@dataclass(frozen=True)
class Hit:
    """An item of an index found by a search.

    Attributes:
        key: the item's key.
        score: inner product with the query, -1 to 1; higher is better.
        id: the item's number, which stays the same if the key changes.
        probability: probability that the image matches the query text; None unless the index is
            calibrated with captions of its images.
    """

    key: str
    score: float
    id: int = field(default=-1, compare=False)
    probability: float | None = field(default=None, compare=False)


Record = dict[str, Any]
"""The record of a hit: ``captions``, ``label``, and all other columns under ``more``."""


@dataclass(frozen=True)
class Hits(Sequence[Hit]):
    """The hits of one query, best first: an immutable sequence, shown as images in a notebook.

    Attributes:
        items: the hits.
        query: a description of the query.
        roots: the roots of the index, to find the images.
        read_records: reads the records of hits; None for hits without an index.
        any_match: probability that any of the ten best hits matches the query text; None as for
            ``Hit.probability``.
        matched: False if there is no good match: ``any_match`` is below 0.5, or, in an index
            calibrated without captions, random words score as high. True if ``any_match`` is at
            least 0.5; else None.
    """

    items: tuple[Hit, ...]
    query: str = field(default="", compare=False)
    roots: tuple[Root, ...] = field(default=(), compare=False, repr=False)
    read_records: Callable[[Sequence[Hit]], list[Record]] | None = field(
        default=None, compare=False, repr=False
    )
    any_match: float | None = field(default=None, compare=False)
    matched: bool | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> "Hits": ...
    def __getitem__(self, place: int | slice) -> "Hit | Hits":
        if isinstance(place, slice):
            return replace(self, items=self.items[place])
        return self.items[place]

    def records(self) -> list[Record]:
        """Captions, label and metadata of every hit, read from the index on disk."""
        if self.read_records is None:
            return [{"captions": [], "label": None, "more": {}} for _ in self]
        return self.read_records(self.items)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` of key, score, probability, captions, label and metadata.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        records = self.records()
        columns: dict[str, list[Any]] = {
            "key": [hit.key for hit in self],
            "score": [hit.score for hit in self],
            "probability": [hit.probability for hit in self],
            "captions": [record["captions"] for record in records],
            "label": [record["label"] for record in records],
        }
        for name in records[0]["more"] if records else ():
            columns[name if name not in columns else f"more_{name}"] = [
                record["more"][name] for record in records
            ]
        return data_frame(columns)

    def thumbnail(self, hit: Hit) -> bytes | None:
        """A JPEG thumbnail of a hit; None if its image is on the hub, missing or unreadable."""
        try:
            found: Path | bytes | None = file_of(self.roots, hit.key)
            if found is None and self._inside.hold(hit.key):
                found = self._inside.read(hit.key)
            return None if found is None else thumbnail(read_image(found))
        except (DataError, ImageError):
            return None

    @cached_property
    def _inside(self) -> "EmbeddedImages":
        return EmbeddedImages(self.roots)

    def _repr_html_(self) -> str:
        items = ((self.thumbnail(hit), _score(hit), hit.key) for hit in self)
        title = f"“{self.query}”" if self.query else f"{len(self)} hits"
        if self.matched is False:
            title += ": no good match"
        return gallery(title, items, len(self))


def _score(hit: Hit) -> str:
    return f"{hit.score:.3f}" if hit.probability is None else f"{hit.probability:.0%}"


class EmbeddedImages:
    """Reads images inside tables, tars and saved datasets; opens each container once.

    No part of a key is used as a path. Thread-safe.

    Args:
        roots: the roots of the index.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        self._roots = roots
        self._opened: dict[str, ImageReader] = {}
        self._lock = threading.Lock()

    def hold(self, key: str) -> bool:
        """Whether the image of a key, if it exists, is inside a container."""
        root = owner(self._roots, key)
        return not root.folder and holds_images(root.where)

    def open(self, key: str) -> ImageReader:
        """Open the container of a key's image; raises DataError if that fails."""
        where = owner(self._roots, key).where
        with self._lock:
            if where not in self._opened:
                self._opened[where] = open_image_reader(where)
            return self._opened[where]

    def read(self, key: str) -> bytes | None:
        """The bytes of an image; None if the container does not have the key.

        Raises:
            DataError: the container is missing or damaged.
        """
        return self.open(key).read(key[len(owner(self._roots, key).key("")) :])
