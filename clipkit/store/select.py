"""Search among some rows of a FAISS index: the others are left out while FAISS searches.

A selector is pushed into FAISS where its class takes one, wherever it lies inside the index
(its wiki, "Setting search parameters for one query"); where it takes none, more is asked for and
the rest is thrown away.
"""

from typing import Any

import faiss as typed_faiss
import numpy as np
from numpy.typing import NDArray

from clipkit.store.device import ENOUGH, to_card
from clipkit.store.flat import search_index

# Its stubs know neither the keyword arguments nor all classes.
faiss: Any = typed_faiss

Scores = NDArray[np.float32]
RowNumbers = NDArray[np.int64]


class Searcher:
    """Searches one FAISS index: on the CPU, and on a card, if there is one, after some queries.

    Args:
        index: FAISS index, whose ids are row numbers.
    """

    def __init__(self, index: Any) -> None:
        self._index, self._asked, self._card = index, 0, None

    def search(
        self, queries: Scores, k: int, live: NDArray[np.bool_] | None
    ) -> tuple[Scores, RowNumbers]:
        """As ``search_rows``."""
        before, self._asked = self._asked, self._asked + len(queries)
        if before < ENOUGH <= self._asked:
            self._card = to_card(self._index)
        if self._card is not None:
            try:
                return search_rows(self._card, queries, k, live)
            except RuntimeError:  # more hits or cells than a card can do
                self._card = None
        return search_rows(self._index, queries, k, live)


def search_rows(
    index: Any, queries: Scores, k: int, live: NDArray[np.bool_] | None
) -> tuple[Scores, RowNumbers]:
    """Scores and row numbers of the best ``k`` rows that are live, best first; -1 where none is.

    Args:
        index: FAISS index, whose ids are row numbers.
        queries: float32 [n, dim].
        k: how many, from 1 to the number of rows.
        live: bool [rows], True for those to find; None: all.
    """
    if live is None:
        return search_index(index, queries, k)
    count = int(np.count_nonzero(live))
    if not count:
        return _nothing(len(queries), k)
    bits = np.packbits(live, bitorder="little")
    selector = faiss.IDSelectorBitmap(bits)
    try:
        params = _parameters(index, selector, len(live) / count)
        return index.search(queries, k, params=params)  # type: ignore[no-any-return]
    except RuntimeError:  # this class of FAISS's takes no selector
        return _ask_for_more(index, queries, k, live, count)


def _parameters(index: Any, selector: Any, widen: float) -> Any:
    """FAISS's parameters of one search: the selector for the innermost, the index's own knobs.

    ``widen``: rows over live rows. A walk through a graph visits the dead too, and lists hold them,
    so that so many more have to be visited.
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


def _ask_for_more(
    index: Any, queries: Scores, k: int, live: NDArray[np.bool_], count: int
) -> tuple[Scores, RowNumbers]:
    """Search among all rows for as many as it takes to have ``k`` live ones of each query."""
    wanted, most = min(k, count), len(live)
    asked = min(most, k + 2 * k * (most - count) // count + 1)
    while True:
        scores, rows = index.search(queries, asked)
        found = (rows >= 0) & live[rows]
        if asked == most or np.all(found.sum(1) >= wanted):
            break
        asked = min(most, 2 * asked)
    # Live ones to the front, in the order they came.
    order = np.argsort(~found, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(found, order, 1)
    best, worst = np.take_along_axis(scores, order, 1), np.float32(-np.inf)
    return np.where(kept, best, worst), np.where(kept, np.take_along_axis(rows, order, 1), -1)


def _nothing(queries: int, k: int) -> tuple[Scores, RowNumbers]:
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1)
