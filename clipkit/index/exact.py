"""Exact search that is fast: blocks of rows through one matrix product, and a running top-k.

FAISS's ``Flat`` walks the rows once for each query until there are about 250 of them (of 512
dimensions). Here a block of rows meets all queries in one product of NumPy's BLAS, and only scores
that reach a query's k-th best so far are looked at again, which after the first block are few. No
more than a block of rows and its scores is held at a time, so that memory-mapped vectors of any
number are searched in the same memory.

A BLAS rounds the scores of equal rows differently, depending on where in a block they stand and on
how many queries are asked at once. The scores that are looked at again are therefore computed anew
in float64, in one way for all: equal rows are equal, and come in row order.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import ArtifactError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

QUERIES = 512
"""Queries that meet a block at once: more make a product no faster."""
ROWS, SCORES = 8192, 2**22
"""Rows of a block at least, and scores held at once at most, 16 MiB. Few queries meet more rows at
once: threads wait for each other after every product."""
ONE_BY_ONE = 3
"""Queries that meet the rows one by one: 100,000 rows of 512 take one query 8.5 ms so on one
thread, 15.8 ms in OpenBLAS's product with a vector; three take 26 and 37 ms, four 34 and 36."""
OWN_THREAD = 2**24
"""Bytes of rows that are worth a thread."""
AGAIN = 4096
"""Scores computed anew at once: 32 MiB in float64."""
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
        ArtifactError: the rows have another width than the queries, or ``k`` is below 1.
    """
    if k < 1:
        raise ArtifactError(f"k is {k}, expected at least 1; ask for one hit or more")
    queries = np.ascontiguousarray(queries, np.float32)
    best = _Best(len(queries), k)
    # Held on to: fresh memory for each product costs a tenth of it.
    room = np.empty(SCORES, np.float32)
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
            _search_block(queries, block, start, best, room)
            start += len(block)
    kept = min(k, start)
    return best.scores[:, :kept], best.rows[:, :kept]


def search_halves(
    queries: Floats, halves: Iterable[NDArray[np.float16]], rows: Floats, k: int
) -> tuple[Floats, Integers]:
    """The same from rows held as float16, which takes half the memory: candidates scored again.

    Rounding to float16 moves a component by at most 2⁻¹¹ of itself, or 2⁻²⁵ near zero, and so by
    Cauchy–Schwarz a unit row's score by at most ``e = (2⁻¹¹ + 2⁻²⁵ √dim) |q|``. Rows that lie more
    than 2e below the k-th best rounded score are out; the others are scored again with the exact
    rows. A query for which those may be more than 4k is searched for among the exact rows.

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
    """The inner product of each row with its query, or the one query, the same wherever it stands.

    The sum is made in float64: exact, but for the last rounding to float32.
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


class _Best:
    """The best of each query so far, best first; what is not there yet is row -1 at -inf."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((queries, k), -np.inf, np.float32)
        self.rows = np.full((queries, k), -1, np.int64)

    def add(self, queries: Integers, scores: Floats, rows: Integers) -> None:
        """Let candidates in, each with its query, its score and its row."""
        touched = np.unique(queries)
        owner = np.concatenate([queries, np.repeat(touched, self.k)])
        scores = np.concatenate([scores, self.scores[touched].ravel()])
        rows = np.concatenate([rows, self.rows[touched].ravel()])
        order = np.lexsort((rows, -scores, owner))
        # Each query's run holds at least the k it had before.
        first = np.searchsorted(owner[order], touched)[:, None] + np.arange(self.k)
        self.scores[touched], self.rows[touched] = scores[order[first]], rows[order[first]]


def _search_block(
    queries: Floats, block: NDArray[Any], start: int, best: _Best, room: Floats
) -> None:
    """Let a block's rows, numbered from ``start``, compete for the best of every query.

    ``room`` is where their scores go, float32 [SCORES].
    """
    block = np.asarray(block, np.float32)
    step = max(1, min(QUERIES, SCORES // len(block)))
    for first in range(0, len(queries), step):
        part = queries[first : first + step]
        size = len(block) * len(part)
        place = (room[:size] if size <= len(room) else np.empty(size, np.float32)).reshape(
            len(block), len(part)
        )
        # [rows, queries]: of few queries half the time of the product the other way round.
        scores = _scores(block, part, place)
        # The most that float32 sums are off (Higham 2002, §3.1), for rows of unit length.
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

    # einsum lets go of the interpreter, and rows are read from memory by all cores.
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
    """A number for each query that its k best of these scores all reach, or -inf.

    The k-th best of the maxima of disjoint groups of rows is no more than the k-th best of the
    rows, and many times cheaper to find.
    """
    groups = 2 * CROWD * k
    size = len(scores) // groups
    if not size:
        return np.full(scores.shape[1], -np.inf, np.float32)
    tops = scores[: groups * size].reshape(groups, size, -1).max(axis=1)
    found: Floats = np.partition(tops, groups - k, axis=0)[groups - k]
    return found
