"""Search one FAISS index: all rows or masked ones, re-ranked by exact vectors, on a GPU if any.

Three things are added to ``index.search`` of FAISS. Plain rows (``Flat``, ``SQfp16``) are searched
by ``exact``. A mask becomes a FAISS selector, pushed into the innermost index (FAISS wiki, "Setting
search parameters for one query"); classes without selectors are asked for more hits, which are
filtered. The candidates of compressed indexes are re-ranked by exact vectors in a memory-mapped
file: FAISS's ``RFlat`` would hold these in memory, 2,048 bytes an image instead of 128.
"""

from typing import Any

import faiss as typed_faiss
import numpy as np
from numpy.typing import NDArray

from clipkit.errors import SpecError
from clipkit.index.exact import Floats, Integers, products, search_exact, search_float16
from clipkit.index.faiss_factory import searched, stored_vectors
from clipkit.index.faiss_gpu import MIN_QUERIES, to_gpu

# The stubs know neither the keyword arguments nor all classes.
faiss: Any = typed_faiss

RERANK = "rerank"
"""The search parameter of the number of candidates, in units of k."""
CONVERTED = 32
"""Queries from which float16 rows are worth converting: 100,000 × 512 take FAISS 7 ms a query, the
conversion 0.1 s once."""
MAX_MASKED = 2**15
"""Rows up to which a mask is searched exactly, in a hundredth of a second whatever the spec; the
lists that an IVF probes may hold none of so few rows."""
_BLOCK = 2**13


class FaissSearcher:
    """Searches one FAISS index on the CPU, and after some queries on a GPU if there is one.

    Args:
        index: FAISS index whose ids are row numbers.
    """

    def __init__(self, index: Any) -> None:
        self._index, self._queries, self._on_gpu = index, 0, None

    def search(
        self, queries: Floats, k: int, mask: NDArray[np.bool_] | None
    ) -> tuple[Floats, Integers]:
        """As ``search_rows``."""
        before, self._queries = self._queries, self._queries + len(queries)
        if before < MIN_QUERIES <= self._queries:
            self._on_gpu = to_gpu(self._index)
        if self._on_gpu is not None:
            try:
                return search_rows(self._on_gpu, queries, k, mask)
            except RuntimeError:  # more hits or lists than the GPU supports
                self._on_gpu = None
        return search_rows(self._index, queries, k, mask)


def search_rows(
    index: Any, queries: Floats, k: int, mask: NDArray[np.bool_] | None
) -> tuple[Floats, Integers]:
    """Scores and row numbers of the best ``k`` masked rows, best first; -1 if there are fewer.

    Args:
        index: FAISS index whose ids are row numbers.
        queries: float32 [n, dim].
        k: how many, from 1 to the number of rows.
        mask: bool [rows], True for rows to return; None: all.
    """
    if mask is None:
        return search_index(index, queries, k)
    count = int(np.count_nonzero(mask))
    if not count:
        return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    bits = np.packbits(mask, bitorder="little")
    selector = faiss.IDSelectorBitmap(bits)
    try:
        params = _parameters(index, selector, len(mask) / count)
        return index.search(queries, k, params=params)  # type: ignore[no-any-return]
    except RuntimeError:  # this FAISS class takes no selector
        return _search_and_filter(index, queries, k, mask, count)


def search_index(index: Any, queries: Floats, k: int) -> tuple[Floats, Integers]:
    """As ``index.search``, with equal results, and faster for plain rows.

    Args:
        index: FAISS index of inner products.
        queries: float32 [m, dim], C-contiguous and finite.
        k: how many, from 1 to the number of its rows.

    Returns:
        Scores float32 [m, k] and ids int64 [m, k].
    """
    rows = plain_rows(searched(index))
    if rows is None or (rows.dtype == np.float16 and len(queries) < CONVERTED):
        found: tuple[Floats, Integers] = index.search(queries, k)
        return found
    scores, numbers = search_exact(queries, [rows], k)
    with_ids = isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2)
    return scores, faiss.vector_to_array(index.id_map)[numbers] if with_ids else numbers


def search_float16_index(
    index: Any, vectors: NDArray[Any] | None, queries: Floats, k: int
) -> tuple[Floats, Integers] | None:
    """The exact best of a batch, from an ``SQfp16`` index and its vectors on disk.

    Returns:
        As ``search_float16``; None for another index, few queries, or without vectors.
    """
    if vectors is None or len(queries) < CONVERTED:
        return None
    rows = plain_rows(index)
    if rows is None or rows.dtype != np.float16:
        return None
    return search_float16(queries, [rows], vectors, k)


def search_masked(
    vectors: NDArray[Any], mask: NDArray[np.bool_], queries: Floats, k: int
) -> tuple[Floats, Integers]:
    """The exact best ``k`` of the masked rows: scores and row numbers, [m, min(k, masked)].

    Args:
        vectors: float32 [n, dim], memory-mapped or not.
        mask: bool [n].
        queries: float32 [m, dim].
        k: how many, at least 1.
    """
    rows = np.flatnonzero(mask)
    blocks = (vectors[rows[at : at + _BLOCK]] for at in range(0, len(rows), _BLOCK))
    scores, found = search_exact(queries, blocks, k)
    return scores, rows[found]


def rerank(
    candidates: Integers, vectors: NDArray[Any], queries: Floats, k: int
) -> tuple[Floats, Integers]:
    """The best ``k`` of each query's candidates by exact inner product, equal ones in row order.

    Args:
        candidates: int64 [m, c], row numbers; -1 for none.
        vectors: float32 [n, dim], memory-mapped or not.
        queries: float32 [m, dim].
        k: how many.

    Returns:
        Scores float32 [m, min(k, c)], -inf for none, and row numbers, -1 for none.
    """
    count = min(k, candidates.shape[1])
    scores = np.full((len(queries), count), -np.inf, np.float32)
    rows = np.full((len(queries), count), -1, np.int64)
    for number, (query, found) in enumerate(zip(queries, candidates, strict=True)):
        own = np.sort(found[found >= 0])
        exact = products(vectors[own], query)
        order = np.argsort(-exact, kind="stable")[:count]
        scores[number, : len(order)], rows[number, : len(order)] = exact[order], own[order]
    return scores, rows


def split_search_parameters(parameters: dict[str, int]) -> tuple[int, dict[str, int]]:
    """The number of candidates in units of k, and FAISS's own search parameters.

    Raises:
        SpecError: the first is not a whole number from 1.
    """
    factor = parameters.get(RERANK, 1)
    if not isinstance(factor, int) or factor < 1:
        raise SpecError(
            f"the search parameter {RERANK}={factor!r} does not fit this index, expected a whole "
            "number from 1; build the index again"
        )
    return factor, {name: value for name, value in parameters.items() if name != RERANK}


def plain_rows(index: Any) -> NDArray[Any] | None:
    """The rows of a ``Flat`` or ``SQfp16`` index as it stores them; None for any other.

    Returns:
        float32 or float16 [n, dim], a read-only view that lives as long as the index.
    """
    index = faiss.downcast_index(index)
    if not index.ntotal:
        return None
    if isinstance(index, faiss.IndexFlat):
        return stored_vectors(index)
    if (
        isinstance(index, faiss.IndexScalarQuantizer)
        and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    ):
        codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
        return np.asarray(codes).view(np.float16).reshape(index.ntotal, index.d)
    return None


def _parameters(index: Any, selector: Any, widen: float) -> Any:
    """FAISS's parameters for one search: the selector for the innermost index, and its own.

    ``widen`` is rows over masked rows: graph walks visit the other rows too and lists contain them,
    so that proportionally more have to be visited.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        return _parameters(index.index, selector, widen)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(index.index, selector, widen)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(index.base_index, selector, widen)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexHNSW):
        wide = min(index.ntotal, int(np.ceil(index.hnsw.efSearch * widen)))
        return faiss.SearchParametersHNSW(sel=selector, efSearch=max(wide, index.hnsw.efSearch))
    if isinstance(index, faiss.IndexIVF):
        lists = min(index.nlist, int(np.ceil(index.nprobe * widen)))
        pq = isinstance(index, faiss.IndexIVFPQ)
        kind = faiss.IVFPQSearchParameters if pq else faiss.SearchParametersIVF
        return kind(sel=selector, nprobe=lists, max_codes=index.max_codes)
    return faiss.SearchParameters(sel=selector)


def _search_and_filter(
    index: Any, queries: Floats, k: int, mask: NDArray[np.bool_], count: int
) -> tuple[Floats, Integers]:
    """Search all rows, for more and more hits, until each query has ``k`` masked ones."""
    wanted, rows_of_index = min(k, count), len(mask)
    asked = min(rows_of_index, k + 2 * k * (rows_of_index - count) // count + 1)
    while True:
        scores, rows = index.search(queries, asked)
        found = (rows >= 0) & mask[rows]
        if asked == rows_of_index or np.all(found.sum(1) >= wanted):
            break
        asked = min(rows_of_index, 2 * asked)
    # Masked rows first, in the order they came.
    order = np.argsort(~found, axis=1, kind="stable")[:, :k]
    valid = np.take_along_axis(found, order, 1)
    best, worst = np.take_along_axis(scores, order, 1), np.float32(-np.inf)
    return np.where(valid, best, worst), np.where(valid, np.take_along_axis(rows, order, 1), -1)
