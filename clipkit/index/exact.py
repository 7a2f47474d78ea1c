"""Exact search by blocked matrix products and a running top-k.

Each block of rows is multiplied with all queries in one BLAS call. Only scores that reach a query's
k-th best so far, few after the first block, are computed again in float64. A BLAS rounds the scores
of equal rows differently, depending on their place in a block and on the number of queries; in
float64 equal rows score equal, and ties come in row order. Memory holds one block and its scores,
so that memory-mapped vectors of any number can be searched.

FAISS's own product (``distance_compute_blas_threshold`` lowered to 1) is faster for batches and
slower for the common single query. 500,000 × 512, two quiet cores, in ms, FAISS against this
module: 1 query 91–112 and 59–61, 4 queries 102–113 and 136–161, 64 queries 214–225 and 259–265, 256
queries 545–571 and 634–667. It does not replace this module, because it does not order ties and
takes no float16 rows.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.arguments import require_integer
from clipkit.errors import ArtifactError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

QUERIES = 512
"""Queries multiplied with a block at once: more make a product no faster."""
ROWS, SCORES = 8192, 2**22
"""Fewest rows of a block, and most scores in memory, 16 MiB. Few queries get larger blocks, because
threads wait for each other after every product."""
ONE_BY_ONE = 3
"""Queries up to which rows are multiplied with one query at a time: with 100,000 rows of 512 one
query takes 8.5 ms on one thread, 15.8 ms as OpenBLAS's product with a vector; three take 26 and
37 ms, four 34 and 36."""
OWN_THREAD = 2**24
"""Bytes of rows that are worth another thread."""
AGAIN = 4096
"""Scores computed again at once: 32 MiB in float64."""
CROWD = 4
"""Survivors of a block, in units of k for each query, above which a better bound pays."""


def search_exact(
    queries: Floats, blocks: Iterable[NDArray[Any]], k: int
) -> tuple[Floats, Integers]:
    """The ``k`` rows of highest inner product with each query, best first, equal ones in row order.

    Args:
        queries: float32 [m, dim], finite.
        blocks: the rows, of unit length, in order, in arrays of float32 or float16 [rows, dim] of
            any sizes, for example the memory-mapped shards of a store.
        k: how many, at least 1.

    Returns:
        Scores float32 [m, min(k, n)] and row numbers int64 [m, min(k, n)], n being all rows.

    Raises:
        ArtifactError: the rows have another width than the queries.
        ArgumentError: ``k`` is below 1.
    """
    k = require_integer("k", k)
    queries = np.ascontiguousarray(queries, np.float32)
    best = _TopK(len(queries), k)
    # Reused: allocating memory for each product costs a tenth of its time.
    buffer = np.empty(SCORES, np.float32)
    start = 0
    for array in blocks:
        if array.ndim != 2 or array.shape[1] != queries.shape[1]:
            raise ArtifactError(
                f"the rows have shape {list(array.shape)}, expected [n, {queries.shape[1]}] as the "
                "queries have; search with vectors of the same model"
            )
        at_once = max(ROWS, SCORES // max(1, min(QUERIES, len(queries))))
        if array.dtype != np.float32:
            at_once = ROWS  # they are converted, block by block
        for block in _split(array, max(at_once, 2 * CROWD * k)):
            _search_block(queries, block, start, best, buffer)
            start += len(block)
    kept = min(k, start)
    return best.scores[:, :kept], best.rows[:, :kept]


def search_float16(
    queries: Floats, halves: Iterable[NDArray[np.float16]], rows: Floats, k: int
) -> tuple[Floats, Integers]:
    """As ``search_exact``, from float16 rows in half the memory: candidates are scored again.

    Rounding to float16 moves a component by at most 2⁻¹¹ of itself, or 2⁻²⁵ near zero, and so by
    Cauchy–Schwarz a unit row's score by at most ``e = (2⁻¹¹ + 2⁻²⁵ √dim) |q|``. Rows that lie more
    than 2e below the k-th best rounded score are excluded; the others are scored again with the
    exact rows. A query that may have more than 4k of those is searched among the exact rows.

    Args:
        queries: float32 [m, dim], finite.
        halves: the rows as float16, in order, in arrays of any sizes.
        rows: the exact rows, float32 [n, dim] of unit length, memory-mapped or not.
        k: how many, at least 1.

    Returns:
        As ``search_exact(queries, [rows], k)``.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    rounded, candidates = search_exact(queries, halves, 4 * k)
    kept = min(k, len(rows))
    scores, found = np.empty((len(queries), kept), np.float32), candidates[:, :kept].copy()
    slack = 2 * (2**-11 + 2**-25 * rows.shape[1] ** 0.5) * np.linalg.norm(queries, axis=1)
    sure = rounded.shape[1] == len(rows)
    sure |= rounded[:, -1] < rounded[:, kept - 1] - slack
    for number in np.flatnonzero(sure):
        among = np.sort(candidates[number])
        again = products(rows[among], queries[number])
        order = np.argsort(-again, kind="stable")[:kept]
        scores[number], found[number] = again[order], among[order]
    if not sure.all():
        scores[~sure], found[~sure] = search_exact(queries[~sure], [rows], k)
    return scores, found


def products(rows: NDArray[Any], queries: Floats) -> Floats:
    """The inner product of each row with its query, or with one query, whatever its place.

    Summed in float64: exact but for the last rounding to float32.
    """
    doubles = np.asarray(rows, np.float64) * queries
    sums: Floats = doubles.sum(axis=1).astype(np.float32)
    return sums


def take_rows(blocks: Iterable[NDArray[Any]], rows: Integers) -> Floats:
    """Rows by their numbers, float32 [len(rows), dim], in one pass over the blocks they lie in."""
    order = np.argsort(rows, kind="stable")
    ascending, start = rows[order], 0
    taken = np.empty((0, 0), np.float32)
    for block in blocks:
        if not start:
            taken = np.empty((len(rows), block.shape[1]), np.float32)
        first, last = np.searchsorted(ascending, (start, start + len(block)))
        taken[order[first:last]] = block[ascending[first:last] - start]
        start += len(block)
    return taken


def _split(array: NDArray[Any], rows: int) -> Iterable[NDArray[Any]]:
    return (array[start : start + rows] for start in range(0, len(array), rows))


class _TopK:
    """The best rows of each query so far, best first; missing ones are row -1 at -inf."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((queries, k), -np.inf, np.float32)
        self.rows = np.full((queries, k), -1, np.int64)

    def add(self, queries: Integers, scores: Floats, rows: Integers) -> None:
        """Add candidates, each with its query, its score and its row."""
        touched = np.unique(queries)
        owner = np.concatenate([queries, np.repeat(touched, self.k)])
        scores = np.concatenate([scores, self.scores[touched].ravel()])
        rows = np.concatenate([rows, self.rows[touched].ravel()])
        order = np.lexsort((rows, -scores, owner))
        # Each query has at least the k rows it had before.
        first = np.searchsorted(owner[order], touched)[:, None] + np.arange(self.k)
        self.scores[touched], self.rows[touched] = scores[order[first]], rows[order[first]]


def _search_block(
    queries: Floats, block: NDArray[Any], start: int, best: _TopK, buffer: Floats
) -> None:
    """Add a block's rows, numbered from ``start``, to the best of every query.

    ``buffer`` is where their scores go, float32 [SCORES].
    """
    block = np.asarray(block, np.float32)
    step = max(1, min(QUERIES, SCORES // len(block)))
    for first in range(0, len(queries), step):
        part = queries[first : first + step]
        size = len(block) * len(part)
        place = (buffer[:size] if size <= len(buffer) else np.empty(size, np.float32)).reshape(
            len(block), len(part)
        )
        # [rows, queries]: for few queries this takes half the time of the transposed product.
        scores = _scores(block, part, place)
        # Largest error of float32 sums (Higham 2002, §3.1), for rows of unit length.
        slack = block.shape[1] * np.float32(2**-24) * np.linalg.norm(part, axis=1)
        floor = best.scores[first : first + step, -1] - slack
        alive = scores >= floor
        if np.count_nonzero(alive) > CROWD * best.k * len(part):
            alive = scores >= np.maximum(floor, _bound(scores, best.k) - 2 * slack)
        survivors = np.flatnonzero(alive)
        if len(survivors):
            row, query = np.divmod(survivors, len(part))
            again = [
                products(block[row[some]], part[query[some]])
                for some in _split(np.arange(len(survivors)), AGAIN)
            ]
            best.add(first + query, np.concatenate(again), start + row)


def _scores(block: Floats, queries: Floats, out: Floats) -> Floats:
    """Inner products [rows, queries], into ``out``."""
    if len(queries) > ONE_BY_ONE:
        return np.matmul(block, queries.T, out=out)
    from faiss import omp_get_max_threads

    # einsum releases the GIL, so that all cores read rows from memory.
    threads = min(omp_get_max_threads(), 1 + block.nbytes // OWN_THREAD)
    starts = np.linspace(0, len(block), threads + 1).astype(int)

    def multiply(first: int, last: int) -> None:
        for number, query in enumerate(queries):
            np.einsum("ij,j->i", block[first:last], query, out=out[first:last, number])

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(multiply, *pair) for pair in pairwise(starts.tolist())]:
            done.result()
    return out


def _bound(scores: Floats, k: int) -> Floats:
    """A lower bound for each query of the k best of these scores, or -inf.

    The k-th best of the maxima of disjoint groups of rows is at most the k-th best of the rows,
    and many times cheaper to find.
    """
    groups = 2 * CROWD * k
    size = len(scores) // groups
    if not size:
        return np.full(scores.shape[1], -np.inf, np.float32)
    tops = scores[: groups * size].reshape(groups, size, -1).max(axis=1)
    found: Floats = np.partition(tops, groups - k, axis=0)[groups - k]
    return found
