"""Search among some rows of a FAISS index: the others are left out while FAISS searches.

A selector is pushed into FAISS where its class takes one, wherever it lies inside the index
(its wiki, "Setting search parameters for one query"); where it takes none, more is asked for and
the rest is thrown away.

Refinement from disk: what a compressed index offers is scored by the exact vectors.

FAISS's ``RFlat`` holds every exact vector in memory for it. Here they stay in a memory-mapped file
of which a search reads the candidates' rows alone: an index of 128 bytes an image answers as
exactly as one of 2,048.

Indexes that hold plain rows are searched by ``search_exact``, not by FAISS's walk over them.

Search the segments of an index, all their rows or chosen ones: few of these exactly.
"""

from typing import Any

import faiss as typed_faiss
import numpy as np
from numpy.typing import NDArray

from clipkit.errors import SpecError
from clipkit.index.exact import Floats, Integers, products, search_exact, search_halves
from clipkit.index.faiss_factory import held_vectors, searched
from clipkit.index.faiss_gpu import ENOUGH, to_card

# Its stubs know neither the keyword arguments nor all classes.
faiss: Any = typed_faiss


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


CONVERTED = 32
"""Queries from which float16 rows are worth converting: 100,000 × 512 take FAISS 7 ms a query, the
conversion 0.1 s once."""


def search_index(index: Any, queries: Floats, k: int) -> tuple[Floats, Integers]:
    """As ``index.search``, with equal results and, for plain rows, in less time.

    Args:
        index: a FAISS index of inner products.
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


def search_halved(
    index: Any, vectors: NDArray[Any] | None, queries: Floats, k: int
) -> tuple[Floats, Integers] | None:
    """The exact best of a batch from an ``SQfp16`` index and its vectors on disk.

    Returns:
        as ``search_halves``; None for another index, few queries, or without vectors.
    """
    if vectors is None or len(queries) < CONVERTED:
        return None
    rows = plain_rows(index)
    if rows is None or rows.dtype != np.float16:
        return None
    return search_halves(queries, [rows], vectors, k)


def plain_rows(index: Any) -> NDArray[Any] | None:
    """The rows of a ``Flat`` or ``SQfp16`` index as it holds them; None for any other.

    Returns:
        float32 or float16 [n, dim], a view that lives as long as the index and is not to be
        written to.
    """
    index = faiss.downcast_index(index)
    shape = (index.ntotal, index.d)
    if not index.ntotal:
        return None
    if isinstance(index, faiss.IndexFlat):
        return held_vectors(index)
    if (
        isinstance(index, faiss.IndexScalarQuantizer)
        and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    ):
        codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
        return np.asarray(codes).view(np.float16).reshape(shape)
    return None


Scores = NDArray[np.float32]
RowNumbers = NDArray[np.int64]


class FaissSearcher:
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


Chosen = NDArray[np.bool_]
"""True for the rows that a search may find."""
FEW = 2**15
"""Rows up to which exact search takes a hundredth of a second, whatever the spec; an IVF probes
lists in which few chosen rows may not lie at all."""
_BLOCK = 2**13


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
