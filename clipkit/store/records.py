"""What an index knows of its hits: their records, their vectors, and which are near-duplicates."""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from clipkit.errors import ArtifactError, DataError
from clipkit.store.hit import Hit
from clipkit.store.segments import ID, Segment
from clipkit.store.shards import SCHEMA, Vectors
from clipkit.store.vector_index import VectorIndex
from clipkit.store.writer import MOST_COMPARED

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
