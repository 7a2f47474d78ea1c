"""What an index knows of its hits: their records, their vectors, and which are near-duplicates.

One query vector from several: what is wanted, less what is not.

Pictures that lie inside the tables and tars an index was built of, by its keys.

Hits: what a search found, best first, with the pictures where they are files.
"""

import math
import threading
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.images import read_image
from clipkit.data.random_access import Pictures, holds_pictures, open_pictures
from clipkit.display.html import gallery
from clipkit.display.thumbnails import thumbnail
from clipkit.errors import ArtifactError, DataError, ImageError
from clipkit.index.calibration import GOOD
from clipkit.index.roots import Root, file_of, owner
from clipkit.index.segments import ID, Segment
from clipkit.index.vector_index import Hit, VectorIndex
from clipkit.index.writer import MOST_COMPARED
from clipkit.store.shards import SCHEMA, Vectors

NEAR = 0.95
"""Cosine of two images from which one is taken for a near-duplicate of the other. Of 2,428 photos
(ViT-B/32) two are so near to another; the nearest other one has a median of 0.81."""


def records_of(index: VectorIndex, hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """For each hit its captions, its label, and its metadata as ``more``; read from disk.

    Values are those that JSON has: days and times are texts, infinite numbers None.
    """
    columns = {name for segment in index.segments for name in segment.schema.names}
    names = sorted(columns - {*SCHEMA.names, ID.name})
    described = []
    for hit in hits:
        segment, row = _place(index, hit)
        record = segment.record(row)
        more = {name: plain(record.get(name)) for name in names}
        captions = record.get("captions") or []
        described.append({"captions": captions, "label": record.get("label"), "more": more})
    return described


def plain(value: Any) -> str | int | float | bool | None:
    """A value of any column as JSON has it."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def distinct(index: VectorIndex, hits: Sequence[Hit]) -> list[Hit]:
    """The hits, best first, without those that are near-duplicates of one kept before.

    Raises:
        ArtifactError: an older clipkit kept no exact vectors.
    """
    vectors = np.array([_vector(index, *_place(index, hit)) for hit in hits])
    kept: list[int] = []
    for number in range(len(hits)):
        if not kept or float((vectors[kept] @ vectors[number]).max()) < NEAR:
            kept.append(number)
    return [hits[number] for number in kept]


def vector_of(index: VectorIndex, key: str) -> Vectors:
    """The vector of an image of the index, float32 [dim].

    Raises:
        DataError: the index has no such key.
        ArtifactError: an older clipkit kept no exact vectors.
    """
    import pyarrow.compute as pc

    for segment in index.segments:
        rows = np.flatnonzero(np.asarray(pc.equal(segment.keys, key)))
        if segment.live is not None:
            rows = rows[segment.live[rows]]
        if len(rows):
            return _vector(index, segment, int(rows[0]))
    close = get_close_matches(key, index.keys[:MOST_COMPARED], 1)
    hint = f"did you mean {close[0]!r}" if close else "a search shows keys as they are"
    raise DataError(f"{index.path} has no image {key!r} ({hint}); name one that it has")


def _place(index: VectorIndex, hit: Hit) -> tuple[Segment, int]:
    for segment in index.segments:
        own = segment.ids == hit.id
        rows = np.flatnonzero(own if segment.live is None else own & segment.live)
        if len(rows):
            return segment, int(rows[0])
    raise ArtifactError(f"{index.path} has no image of id {hit.id}; search anew")


def _vector(index: VectorIndex, segment: Segment, row: int) -> Vectors:
    if segment.vectors is None:
        raise ArtifactError(
            f"{index.path} was built by an older clipkit, which kept its vectors only "
            "approximately; build the index again"
        )
    return np.array(segment.vectors[row], np.float32)


MINUS = 0.5
"""Weight of what is not wanted: a whole one, which has most of its direction in common with what
is wanted (text vectors of CLIP have a mean cosine of 0.74), would leave little but noise."""


def weighted(text: str, default: float) -> tuple[str, float]:
    """A text and its weight, where it ends in one: ``people:0.8``.

    Raises:
        DataError: the weight is none above 0.
    """
    words, _, number = text.rpartition(":")
    try:
        weight = float(number) if words else default
    except ValueError:
        return text, default
    if not 0 < weight < np.inf:
        raise DataError(f"{text!r} has the weight {weight}, expected a number above 0")
    return (words if words else text), weight


def combined(plus: Sequence[Vectors], minus: Sequence[Vectors] = ()) -> Vectors:
    """The direction of a sum of unit vectors, float32 [dim], of unit length.

    Args:
        plus: what is wanted, each float32 [dim].
        minus: what is not wanted; each is taken away with the weight ``MINUS``.

    Raises:
        DataError: they cancel each other out.
    """
    total = np.sum([*plus, *(-MINUS * vector for vector in minus)], axis=0, dtype=np.float32)
    length = float(np.linalg.norm(total))
    if length < 1e-3:
        raise DataError(
            "what is searched for are opposites, so that their sum has no direction; search for "
            "fewer of them"
        )
    return np.asarray(total / length, np.float32)


class InsidePictures:
    """Pictures inside tables, tars and saved data sets; each of these is opened once.

    No part of a key becomes a path. Safe to ask from several threads.

    Args:
        roots: where the images of the index lie.
    """

    def __init__(self, roots: list[Root]) -> None:
        self._roots = roots
        self._opened: dict[str, Pictures] = {}
        self._lock = threading.Lock()

    def hold(self, key: str) -> bool:
        """Whether the picture of a key, if there is any, lies inside something."""
        root = owner(self._roots, key)
        return not root.folder and holds_pictures(root.where)

    def open(self, key: str) -> Pictures:
        """What should hold the picture of a key; raises DataError where it cannot be opened."""
        where = owner(self._roots, key).where
        with self._lock:
            if where not in self._opened:
                self._opened[where] = open_pictures(where)
            return self._opened[where]

    def read(self, key: str) -> bytes | None:
        """The content of a picture; None where there is none of that key.

        Raises:
            DataError: what should hold it is not there any more, or damaged.
        """
        return self.open(key).read(key[len(owner(self._roots, key).key("")) :])


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
