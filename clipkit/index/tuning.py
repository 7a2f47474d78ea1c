"""Choose the spec and the search parameters of an index by measured recall: ``--spec auto``.

Recall is measured for text queries against exact search. Image vectors make poor test queries: an
image is close to other images, a caption is far from all of them, so that search parameters at
which images find their neighbours find few for captions.
"""

import os
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from clipkit.artifacts import ArtifactWriter, Manifest
from clipkit.errors import SpecError
from clipkit.index.build import Built, cannot_write, write_segment
from clipkit.index.exact import Floats, Integers, search_exact
from clipkit.index.faiss_factory import parts, set_search_parameters
from clipkit.index.sample_queries import SampleQueries, write_sample_queries
from clipkit.index.search import RERANK, rerank, search_index, split_search_parameters
from clipkit.index.segments import search_segments
from clipkit.index.vector_index import VectorIndex, describe
from clipkit.store.embedding_store import EmbeddingStore

AUTO = "auto"
RECALL = 0.95
"""Default target of recall@10: of the ten best for a caption, 9.5 are found on average."""
K = 10
SMALL = 2**25
"""Bytes of vectors that exact search reads in about 5 ms; a smaller index gains nothing."""
RERANK_FACTORS = (1, 2, 4, 8, 16, 32, 64)
"""Candidates tried, in units of k."""
TIMED = 50
"""Queries that are timed, one by one."""
SearchFunction = Callable[[Floats, int], Integers]
"""Queries and k to row numbers, int64 [m, at most k]."""


@dataclass(frozen=True)
class TuningTarget:
    """What tuning aims at.

    Attributes:
        recall: recall@10 of text queries.
        memory: the most bytes of memory for the index; None: half of the machine's. Vectors on
            disk, of which a search reads a few, do not count.
    """

    recall: float = RECALL
    memory: int | None = None

    @property
    def bytes(self) -> int:
        """The memory in bytes."""
        if self.memory is not None:
            return self.memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@dataclass(frozen=True)
class Measured:
    """Recall and time of an index.

    Attributes:
        recall: share of the exact ten best that were found, mean over the queries.
        milliseconds: median time of a single query.
        queries: how many were measured.
    """

    recall: float
    milliseconds: float
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data, rounded for a manifest."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def measure(ask: SearchFunction, queries: Floats, truth: Integers) -> Measured:
    """Measure recall and time.

    Args:
        ask: the search to measure.
        queries: float32 [m, dim], at least one.
        truth: int64 [m, k], the exact best rows of each.
    """
    seconds = []
    for query in queries[:TIMED]:
        start = time.perf_counter()
        ask(query[None], truth.shape[1])
        seconds.append(time.perf_counter() - start)
    return Measured(recall(ask, queries, truth), 1000 * float(np.median(seconds)), len(queries))


def recall(ask: SearchFunction, queries: Floats, truth: Integers) -> float:
    """The share of the exact best rows that are found."""
    if not truth.size:
        return 1.0  # there is nothing to find
    found = ask(queries, truth.shape[1])
    # A row number and its query as one number, so that one lookup serves all.
    base = 1 + max(int(truth.max(initial=0)), int(found.max(initial=0)))
    own = np.arange(len(queries))[:, None] * base
    return float(np.isin(own + truth, (own + found)[found >= 0]).mean())


def candidates(count: int, dim: int, memory: int) -> list[str]:
    """Specs that fit the memory, in the order in which to try them.

    The order is that of speed as ``scripts/benchmarks/search/tuned.py --families`` measures it:
    with 30,000 vectors like CLIP's, text queries at a recall of 0.91 take 0.5 ms with an IVF of
    product-quantised rows, 12 ms with ``HNSW32``. All but ``Flat`` and ``HNSW32`` are re-ranked
    from disk. RaBitQ is left out: of the ten best of 20,000, its 160 candidates held 6.4 at best,
    those of a product quantiser of the same size 6.8.

    Args:
        count: how many vectors.
        dim: their width.
        memory: the most bytes for the index.

    Raises:
        SpecError: not even the smallest codes fit.
    """
    if 4 * dim * count <= min(SMALL, memory):
        return ["Flat"]
    lists = 2 ** round(np.log2(4 * count**0.5))
    coarse = 4 * dim * (lists + 16)  # and the codebooks
    specs, least = [], coarse
    for parts_of_row in (dim // 2, dim // 4, dim // 8):
        # Fast-scan codes are in blocks of 32 rows; each list leaves half a block empty.
        least = coarse + (count + 16 * lists) * parts_of_row // 2 + 8 * count
        if least <= memory and dim % parts_of_row == 0:
            specs += [f"IVF{lists},PQ{parts_of_row}x4fs", f"PQ{parts_of_row}x4fs"]
            break
    specs += [
        spec
        for spec, row in (("HNSW32", 4 * dim + 272), ("SQ8", dim), ("Flat", 4 * dim))
        if row * count <= memory
    ]
    if not specs:
        raise SpecError(
            f"{count} vectors of dimension {dim} take at least {least / 2**20:.0f} MiB of memory, "
            f"but {memory / 2**20:.0f} MiB are allowed; raise --memory"
        )
    return specs


def choose_search_parameters(
    index: Any, vectors: NDArray[Any] | None, queries: Floats, truth: Integers, wanted: float
) -> dict[str, int]:
    """The fastest search parameters that reach a recall; if none does, those with the highest.

    For each number of candidates, bisection finds the least effort that reaches the recall, because
    more effort never finds less; the fastest of these wins.

    Args:
        index: a trained and filled FAISS index whose ids are row numbers.
        vectors: its exact vectors, float32 [n, dim], if they are not in the index.
        queries: float32 [m, dim].
        truth: int64 [m, k], the exact best rows of each.
        wanted: recall, from 0 to 1.
    """
    name, values = effort(index)
    best: tuple[float, float, dict[str, int]] = (-1.0, 0.0, {})
    for factor in RERANK_FACTORS if vectors is not None else (1,):

        def settings(place: int, factor: int = factor) -> dict[str, int]:
            own = {RERANK: factor} if vectors is not None else {}
            return own | ({name: values[place]} if name else {})

        def reached(place: int) -> float:
            parameters = settings(place)
            return min(wanted, recall(search_with(index, vectors, parameters), queries, truth))

        place = bisect_left(range(len(values) - 1), wanted, key=reached)
        parameters = settings(place)
        found = measure(search_with(index, vectors, parameters), queries, truth)
        best = max(
            best, (min(wanted, found.recall), -found.milliseconds, parameters), key=itemgetter(0, 1)
        )
    return best[2]


def search_with(
    index: Any, vectors: NDArray[Any] | None, parameters: dict[str, int]
) -> SearchFunction:
    """A search of an index with these parameters, which stay set."""
    factor, own = split_search_parameters(parameters)
    set_search_parameters(index, own)

    def ask(queries: Floats, k: int) -> Integers:
        if vectors is None:
            return search_index(index, queries, k)[1]
        wide = min(k * factor, index.ntotal)
        return rerank(index.search(queries, wide)[1], vectors, queries, k)[1]

    return ask


def effort(index: Any) -> tuple[str | None, list[int]]:
    """The parameter that trades speed for recall and its values, ascending; None: no parameter."""
    for part in parts(index):
        if isinstance(part, faiss.IndexIVF):
            return "nprobe", [2**n for n in range(part.nlist.bit_length() - 1)] + [part.nlist]
        if isinstance(part, faiss.IndexHNSW):
            return "efSearch", [16 * 2**n for n in range(8)]
    return None, [0]


@dataclass(frozen=True)
class _Attempt:
    spec: str
    built: Built
    parameters: dict[str, int]
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        size, _ = self.built.parts.files[self.built.parts.index]
        return {"spec": self.spec, "bytes": size, **self.parameters, **self.measured.to_dict()}


def build_tuned(
    store: EmbeddingStore,
    path: str | Path,
    queries: SampleQueries,
    target: TuningTarget,
    *,
    replace: bool = False,
) -> VectorIndex:
    """Build the first spec that fits the memory and reaches the recall; else the closest one.

    One half of the queries chooses the search parameters, the other gives the recall and time that
    the manifest records.

    Args:
        store: the vectors.
        path: directory of the index.
        queries: captions to tune with.
        target: recall and memory.
        replace: allow a finished index there; it is replaced once the new one is complete.

    Raises:
        SpecError: the memory is too small.
        ArtifactError: ``path`` is taken, the store is damaged, or the disk is full.
    """
    path = Path(path)
    truth = search_exact(queries.captions, (block for block, _ in store.shards()), K)[1]
    specs = candidates(len(store), store.dim, target.bytes)
    with ArtifactWriter(path, "index", replace=replace) as artifact:
        tried: list[_Attempt] = []
        for spec in specs:
            try:
                tried.append(_attempt(artifact.temp, store, spec, path, queries, truth, target))
            except SpecError:
                if spec == specs[-1] and not tried:
                    raise
                continue
            if tried[-1].measured.recall >= target.recall:
                break
        chosen = max(tried, key=lambda one: min(target.recall, one.measured.recall))
        if chosen is not tried[-1]:
            chosen = _attempt(artifact.temp, store, chosen.spec, path, queries, truth, target)
        measured = chosen.measured.to_dict()
        tuning = {
            "wanted": target.recall,
            "memory": target.bytes,
            "source": queries.source,
            **measured,
            "tried": [one.to_dict() for one in tried],
        }
        detail = describe(chosen.spec, chosen.built)
        detail |= {"search": chosen.parameters, "tuning": tuning, "measured": measured}
        try:
            write_sample_queries(artifact.temp, _halves(queries.captions)[1])
            source = {**store.manifest.source, "store": str(store.path)}
            artifact.finish(Manifest("index", store.model, len(store), source, detail))
        except OSError as error:
            raise cannot_write(path, error) from None
    return VectorIndex.open(path)


def _attempt(
    folder: Path,
    store: EmbeddingStore,
    spec: str,
    path: Path,
    queries: SampleQueries,
    truth: Integers,
    target: TuningTarget,
) -> _Attempt:
    """Build one spec in a folder, which is emptied first, and choose its search parameters."""
    shutil.rmtree(folder)
    folder.mkdir()
    built = write_segment(folder, store, spec, path)
    name = built.parts.vectors
    vectors = None if name is None else np.load(folder / name, mmap_mode="r", allow_pickle=False)
    halves = list(zip(_halves(queries.captions), _halves(truth), strict=True))
    parameters = choose_search_parameters(built.index, vectors, *halves[0], target.recall)
    return _Attempt(
        spec, built, parameters, measure(search_with(built.index, vectors, parameters), *halves[1])
    )


def _halves(rows: NDArray[Any]) -> list[NDArray[Any]]:
    """One half to choose with, one to measure with."""
    return [rows[::2], rows[1::2]]


def remeasure(index: VectorIndex, queries: Floats) -> Measured:
    """Recall and time of an index in its present state, after all additions and removals.

    Args:
        index: any index that stores its vectors.
        queries: float32 [m, dim].
    """
    truth = index.places[search_exact(queries, (block for block, _ in index.shards()), K)[1]]

    def ask(queries: Floats, k: int) -> Integers:
        scores, places = search_segments(index.segments, queries, k)
        if places.shape[1] <= k:
            return places
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(places, best, axis=1)

    return measure(ask, queries, truth)


def exact_milliseconds(index: VectorIndex, queries: Floats) -> float:
    """Median time of exact search for one query, of three."""
    seconds = []
    for query in queries[:3]:
        start = time.perf_counter()
        search_exact(query[None], (block for block, _ in index.shards()), K)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds))
