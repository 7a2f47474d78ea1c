"""Tune an index with the queries it is for: its spec and search-time knobs by measured recall.

Image vectors make poor test queries: an image lies among images, where a caption lies far from all
of them, so that knobs at which images find their neighbours find few for captions. Here recall is
measured for vectors of captions, against exact search.

Build an index whose spec and knobs are chosen by what captions find: ``--spec auto``.
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
from clipkit.index.faiss_factory import parts, set_knobs
from clipkit.index.sample_queries import Questions, keep_questions
from clipkit.index.search import REFINE, rescored, search_index, split_knobs
from clipkit.index.segments import search_segments
from clipkit.index.vector_index import VectorIndex, describe
from clipkit.store.embedding_store import EmbeddingStore

AUTO = "auto"
RECALL = 0.95
"""Recall@10 that is wanted of an index: of the ten best for a caption, 9.5 are found on average."""
K = 10
SMALL = 2**25
"""Bytes of vectors that exact search walks in about 5 ms; nothing is gained by less."""
REFINES = (1, 2, 4, 8, 16, 32, 64)
"""Candidates tried, in units of k."""
TIMED = 50
"""Queries that are timed, one by one."""
Ask = Callable[[Floats, int], Integers]
"""Queries and k to row numbers, int64 [m, at most k]."""


@dataclass(frozen=True)
class Wish:
    """What is wanted of an index.

    Attributes:
        recall: recall@10 of text queries.
        memory: the most bytes it may take in memory; None: half of the machine's. Vectors that stay
            on disk, of which a search reads a few, do not count.
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
    """What was measured of an index.

    Attributes:
        recall: share of the exact ten best that were found, mean over the queries.
        milliseconds: median time of a query asked alone.
        queries: how many were asked.
    """

    recall: float
    milliseconds: float
    queries: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data, rounded for a manifest."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def measure(ask: Ask, queries: Floats, truth: Integers) -> Measured:
    """Measure what queries find.

    Args:
        ask: what is measured.
        queries: float32 [m, dim], at least one.
        truth: int64 [m, k], the exact best rows of each.
    """
    seconds = []
    for query in queries[:TIMED]:
        start = time.perf_counter()
        ask(query[None], truth.shape[1])
        seconds.append(time.perf_counter() - start)
    return Measured(recall(ask, queries, truth), 1000 * float(np.median(seconds)), len(queries))


def recall(ask: Ask, queries: Floats, truth: Integers) -> float:
    """The share of the true best rows that are found."""
    if not truth.size:
        return 1.0  # nothing is to be found
    found = ask(queries, truth.shape[1])
    # A row number and its query as one number, so that one look-up serves all.
    base = 1 + max(int(truth.max(initial=0)), int(found.max(initial=0)))
    own = np.arange(len(queries))[:, None] * base
    return float(np.isin(own + truth, (own + found)[found >= 0]).mean())


def candidates(count: int, dim: int, memory: int) -> list[str]:
    """Specs for so many vectors that fit the memory, in the order in which they are to be tried.

    The order is that of speed as ``scripts/benchmarks/search/tuned.py --families`` measures it:
    with 30,000 vectors like CLIP's, text queries at a recall of 0.91 take 0.5 ms with an IVF of
    product-quantised rows, 12 ms with ``HNSW32``. All but ``Flat`` and ``HNSW32`` are refined from
    disk. RaBitQ is not among them: of the ten best of 20,000, its 160 candidates held 6.4 at best,
    those of a product quantiser of the same size 6.8.

    Args:
        count: how many vectors.
        dim: their width.
        memory: bytes that the index may take.

    Raises:
        SpecError: not even the smallest codes fit.
    """
    if 4 * dim * count <= min(SMALL, memory):
        return ["Flat"]
    lists = 2 ** round(np.log2(4 * count**0.5))
    coarse = 4 * dim * (lists + 16)  # and the codebooks
    specs, least = [], coarse
    for parts_of_row in (dim // 2, dim // 4, dim // 8):
        # Fast-scan codes stand in blocks of 32 rows, of which each list leaves half a one empty.
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


def choose_knobs(
    index: Any, vectors: NDArray[Any] | None, queries: Floats, truth: Integers, wanted: float
) -> dict[str, int]:
    """The knobs at which an index answers fastest with the recall wanted, else with its highest.

    For each number of candidates the least effort that reaches the recall is found by bisection,
    because more effort never finds less; of those the fastest is taken.

    Args:
        index: a trained and filled FAISS index, whose ids are row numbers.
        vectors: its exact vectors, float32 [n, dim], where they are not in the index.
        queries: float32 [m, dim].
        truth: int64 [m, k], the exact best rows of each.
        wanted: recall, from 0 to 1.
    """
    name, values = effort(index)
    best: tuple[float, float, dict[str, int]] = (-1.0, 0.0, {})
    for refine in REFINES if vectors is not None else (1,):

        def settings(place: int, refine: int = refine) -> dict[str, int]:
            chosen = {REFINE: refine} if vectors is not None else {}
            return chosen | ({name: values[place]} if name else {})

        def reached(place: int) -> float:
            knobs = settings(place)
            return min(wanted, recall(asker(index, vectors, knobs), queries, truth))

        place = bisect_left(range(len(values) - 1), wanted, key=reached)
        knobs = settings(place)
        found = measure(asker(index, vectors, knobs), queries, truth)
        best = max(
            best, (min(wanted, found.recall), -found.milliseconds, knobs), key=itemgetter(0, 1)
        )
    return best[2]


def asker(index: Any, vectors: NDArray[Any] | None, knobs: dict[str, int]) -> Ask:
    """What asks an index with these knobs; they stay set."""
    refine, own = split_knobs(knobs)
    set_knobs(index, own)

    def ask(queries: Floats, k: int) -> Integers:
        if vectors is None:
            return search_index(index, queries, k)[1]
        wide = min(k * refine, index.ntotal)
        return rescored(index.search(queries, wide)[1], vectors, queries, k)[1]

    return ask


def effort(index: Any) -> tuple[str | None, list[int]]:
    """The knob that trades speed for recall, and values to try, ascending; None where none does."""
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
    knobs: dict[str, int]
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        size, _ = self.built.parts.files[self.built.parts.index]
        return {"spec": self.spec, "bytes": size, **self.knobs, **self.measured.to_dict()}


def build_tuned(
    store: EmbeddingStore,
    path: str | Path,
    questions: Questions,
    wish: Wish,
    *,
    replace: bool = False,
) -> VectorIndex:
    """Build the first of the specs that fit the memory which finds what is wanted.

    One half of the questions chooses the knobs, the other measures what stands in the manifest.
    Where no spec reaches the recall, the one that comes closest is built.

    Args:
        store: the vectors.
        path: where the index shall stand.
        questions: captions to tune with.
        wish: recall and memory.
        replace: allow a finished index to stand there; it stays until the new one is finished.

    Raises:
        SpecError: the memory is too little.
        ArtifactError: ``path`` is taken, the store is damaged, or the disk is full.
    """
    path = Path(path)
    truth = search_exact(questions.captions, (block for block, _ in store.shards()), K)[1]
    specs = candidates(len(store), store.dim, wish.bytes)
    with ArtifactWriter(path, "index", replace=replace) as artifact:
        tried: list[_Attempt] = []
        for spec in specs:
            try:
                tried.append(_attempt(artifact.temp, store, spec, path, questions, truth, wish))
            except SpecError:
                if spec == specs[-1] and not tried:
                    raise
                continue
            if tried[-1].measured.recall >= wish.recall:
                break
        chosen = max(tried, key=lambda one: min(wish.recall, one.measured.recall))
        if chosen is not tried[-1]:
            chosen = _attempt(artifact.temp, store, chosen.spec, path, questions, truth, wish)
        measured = chosen.measured.to_dict()
        tuning = {
            "wanted": wish.recall,
            "memory": wish.bytes,
            "source": questions.source,
            **measured,
            "tried": [one.to_dict() for one in tried],
        }
        detail = describe(chosen.spec, chosen.built)
        detail |= {"search": chosen.knobs, "tuning": tuning, "measured": measured}
        try:
            keep_questions(artifact.temp, _halves(questions.captions)[1])
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
    questions: Questions,
    truth: Integers,
    wish: Wish,
) -> _Attempt:
    """Build one spec in a folder, which is emptied first, and tune it."""
    shutil.rmtree(folder)
    folder.mkdir()
    built = write_segment(folder, store, spec, path)
    name = built.parts.vectors
    vectors = None if name is None else np.load(folder / name, mmap_mode="r", allow_pickle=False)
    halves = list(zip(_halves(questions.captions), _halves(truth), strict=True))
    knobs = choose_knobs(built.index, vectors, *halves[0], wish.recall)
    return _Attempt(spec, built, knobs, measure(asker(built.index, vectors, knobs), *halves[1]))


def _halves(rows: NDArray[Any]) -> list[NDArray[Any]]:
    """One half to choose by, one to measure."""
    return [rows[::2], rows[1::2]]


def remeasure(index: VectorIndex, queries: Floats) -> Measured:
    """What queries find in an index as it stands now, with all that was added and removed.

    Args:
        index: any index that keeps its vectors.
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
