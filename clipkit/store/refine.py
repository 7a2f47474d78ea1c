"""Refinement from disk: what a compressed index offers is scored by the exact vectors.

FAISS's ``RFlat`` holds every exact vector in memory for it. Here they stay in a memory-mapped file
of which a search reads the candidates' rows alone: an index of 128 bytes an image answers as
exactly as one of 2,048.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import SpecError
from clipkit.store.exact import Floats, Integers, products

REFINE = "refine"
"""The search-time knob: candidates in units of k."""


def split_knobs(knobs: dict[str, int]) -> tuple[int, dict[str, int]]:
    """Candidates in units of k, and the knobs that are FAISS's own.

    Raises:
        SpecError: the first is no whole number from 1.
    """
    refine = knobs.get(REFINE, 1)
    if not isinstance(refine, int) or refine < 1:
        raise SpecError(
            f"the search setting {REFINE}={refine!r} does not fit this index, expected a whole "
            "number from 1; build the index again"
        )
    return refine, {name: value for name, value in knobs.items() if name != REFINE}


def rescored(
    candidates: Integers, vectors: NDArray[Any], queries: Floats, k: int
) -> tuple[Floats, Integers]:
    """The best ``k`` of each query's candidates by exact inner product, equal ones in row order.

    Args:
        candidates: int64 [m, c], row numbers, -1 where there is none.
        vectors: float32 [n, dim], memory-mapped or not.
        queries: float32 [m, dim].
        k: how many.

    Returns:
        Scores float32 [m, min(k, c)], -inf where there is none, and row numbers, -1 there.
    """
    kept = min(k, candidates.shape[1])
    scores = np.full((len(queries), kept), -np.inf, np.float32)
    rows = np.full((len(queries), kept), -1, np.int64)
    for number, (query, offered) in enumerate(zip(queries, candidates, strict=True)):
        among = np.sort(offered[offered >= 0])
        exact = products(vectors[among], query)
        order = np.argsort(-exact, kind="stable")[:kept]
        scores[number, : len(order)], rows[number, : len(order)] = exact[order], among[order]
    return scores, rows
