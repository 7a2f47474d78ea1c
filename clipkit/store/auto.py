"""Build an index whose spec and knobs are chosen by what captions find: ``--spec auto``."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import SpecError
from clipkit.manifest import ArtifactWriter, Manifest
from clipkit.store.build import Built, cannot_write, write_segment
from clipkit.store.chosen import search_segments
from clipkit.store.embeddings import EmbeddingStore
from clipkit.store.exact import Floats, Integers, search_exact
from clipkit.store.questions import Questions, keep_questions
from clipkit.store.tune import K, Measured, Wish, asker, candidates, choose_knobs, measure
from clipkit.store.vector_index import VectorIndex, describe


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
