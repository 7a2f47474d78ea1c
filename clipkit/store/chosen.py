"""Search the segments of an index, all their rows or chosen ones: few of these exactly."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import ArtifactError
from clipkit.store.exact import Floats, Integers, search_exact

if TYPE_CHECKING:
    from clipkit.store.segments import Segment

Chosen = NDArray[np.bool_]
"""True for the rows that a search may find."""
FEW = 2**15
"""Rows up to which exact search takes a hundredth of a second, whatever the spec; an IVF probes
lists in which few chosen rows may not lie at all."""
_BLOCK = 2**13


def by_segment(segments: Sequence["Segment"], chosen: Chosen | None) -> list[Chosen | None]:
    """For each segment which of its rows are chosen, removed ones never; None: all are.

    Args:
        segments: of an index.
        chosen: bool [n], in the order of its records.

    Raises:
        ArtifactError: they are not as many as the records.
    """
    if chosen is None:
        return [None] * len(segments)
    total = sum(map(len, segments))
    if chosen.shape != (total,):
        raise ArtifactError(
            f"the choice of rows has shape {list(chosen.shape)}, expected one for each of the "
            f"{total} records; choose anew from the index as it is"
        )
    masks: list[Chosen | None] = []
    start = 0
    for segment in segments:
        own = chosen[start : start + len(segment)]
        start += len(own)
        if segment.live is not None:
            mask = np.zeros(segment.rows, bool)
            mask[segment.live] = own
            own = mask
        masks.append(own)
    return masks


def search_segments(
    segments: Sequence["Segment"], queries: Floats, k: int, chosen: Chosen | None = None
) -> tuple[Floats, Integers]:
    """Scores and places of the best ``k`` rows of each segment, beside each other; -1 where none.

    Args:
        segments: of an index; places are counted over all of them, removed rows included.
        queries: float32 [m, dim].
        k: how many, at least 1.
        chosen: as of ``by_segment``, with its errors.
    """
    scores, places, start = [], [], 0
    for segment, mask in zip(segments, by_segment(segments, chosen), strict=True):
        if segment.rows:
            found, rows = segment.search(queries, k, mask)
            scores.append(found)
            places.append(np.where(rows < 0, -1, rows + start))
        start += segment.rows
    return np.concatenate(scores, axis=1), np.concatenate(places, axis=1)


def search_few(
    vectors: NDArray[Any], chosen: Chosen, queries: Floats, k: int
) -> tuple[Floats, Integers]:
    """The exact best ``k`` of the chosen rows: scores and row numbers, [m, min(k, chosen)].

    Args:
        vectors: float32 [n, dim], memory-mapped or not.
        chosen: bool [n].
        queries: float32 [m, dim].
        k: how many, at least 1.
    """
    rows = np.flatnonzero(chosen)
    blocks = (vectors[rows[at : at + _BLOCK]] for at in range(0, len(rows), _BLOCK))
    scores, found = search_exact(queries, blocks, k)
    return scores, rows[found]
