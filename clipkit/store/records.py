"""The records of hits, as people and programs read them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipkit.store.hit import Hit
from clipkit.store.segments import ID
from clipkit.store.shards import SCHEMA
from clipkit.store.vector_index import VectorIndex


def records_of(index: VectorIndex, hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """For each hit its captions, its label, and its metadata as ``more``; read from disk.

    Values are those that JSON has: days and times are texts, infinite numbers None.
    """
    columns = {name for segment in index.segments for name in segment.schema.names}
    names = sorted(columns - {*SCHEMA.names, ID.name})
    described = []
    for hit in hits:
        for segment in index.segments:
            own = segment.ids == hit.id
            rows = np.flatnonzero(own if segment.live is None else own & segment.live)
            if len(rows):
                record = segment.record(int(rows[0]))
                break
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
