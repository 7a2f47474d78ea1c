"""Build an index whose spec and knobs are chosen by what captions find: ``--spec auto``."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import SpecError
from clipkit.manifest import ArtifactWriter, Manifest
from clipkit.store.build import Built, cannot_write, write_segment
from clipkit.store.embeddings import EmbeddingStore
from clipkit.store.exact import Floats, Integers, search_exact
from clipkit.store.questions import Questions
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
        tuning = {
            "wanted": wish.recall,
            "memory": wish.bytes,
            "source": questions.source,
            **chosen.measured.to_dict(),
            "tried": [one.to_dict() for one in tried],
        }
        detail = describe(chosen.spec, chosen.built) | {"search": chosen.knobs, "tuning": tuning}
        try:
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
    halves = [(questions.captions[n::2], truth[n::2]) for n in range(2)]
    knobs = choose_knobs(built.index, vectors, *halves[0], wish.recall)
    return _Attempt(spec, built, knobs, measure(asker(built.index, vectors, knobs), *halves[1]))


def remeasure(index: VectorIndex, queries: Floats) -> Measured:
    """What queries find in an index as it stands now, with all that was added and removed.

    Args:
        index: any index that keeps its vectors.
        queries: float32 [m, dim].
    """
    ids = np.concatenate([s.ids if s.live is None else s.ids[s.live] for s in index.segments])
    truth = ids[search_exact(queries, (block for block, _ in index.shards()), K)[1]]

    def ask(queries: Floats, k: int) -> Integers:
        found = np.full((len(queries), k), -1)
        for row, hits in zip(found, index.search(queries, k), strict=True):
            row[: len(hits)] = [hit.id for hit in hits]
        return found

    return measure(ask, queries, truth)
