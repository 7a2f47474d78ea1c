"""An index tuned with text beside those of autofaiss and clip-retrieval: a part of bench_search.

All index the same vectors within the same memory and are asked with the same text vectors, of which
none was used for tuning, one at a time. The index that clipkit builds refines its candidates from
the vectors on disk, of which a search reads a few; those of the peers have none to refine from.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from search_peers import Peer, autofaiss, clip_retrieval

from clipkit.index.exact import search_exact
from clipkit.index.faiss_factory import (
    ROWS_PER_CENTROID,
    TRAINING_ROWS,
    new_index,
    train,
    training_rows_needed,
)
from clipkit.index.search import REFINE, plain_rows
from clipkit.index.tuning import Measured, asker, candidates, choose_knobs, effort, measure

FAMILIES = [
    "Flat",
    "SQfp16",
    "SQ8",
    "HNSW32",
    "IVF{lists},Flat",
    "IVF{lists},SQ8",
    "IVF{lists},PQ{half}x4fs",
    "IVF{lists},PQ{quarter}x4fs",
    "IVF{lists},RaBitQ",
    "IVF{lists},RaBitQfs",
    "PQ{half}x4fs",
    "PQ{quarter}x4fs",
    "RaBitQfs",
]
RECALLS = (0.9, 0.95)
"""What clipkit's index is tuned to, as its users do."""
REFINED = (2, 8, 32, 64)
"""Candidates in units of k, with each of which its curve is measured."""
Curve = list[tuple[str, Measured]]


class Built:
    """An index that can be asked: a FAISS index and, where it is refined from disk, vectors."""

    def __init__(self, name: str, index: Any, vectors: np.ndarray | None, seconds: float) -> None:
        self.name, self.index, self.vectors, self.seconds = name, index, vectors, seconds
        self.bytes = len(faiss.serialize_index(index))

    def at(self, knobs: dict[str, int], queries: np.ndarray, truth: np.ndarray) -> Measured:
        """Measure it with these knobs."""
        return measure(asker(self.index, self.vectors, knobs), queries, truth)


def build(spec: str, vectors: np.ndarray) -> Built:
    """Build as `clipkit index build` does."""
    start = time.perf_counter()
    index = new_index(spec, vectors.shape[1], len(vectors))
    if not index.is_trained:
        count = max(TRAINING_ROWS, ROWS_PER_CENTROID * training_rows_needed(index))
        random = np.random.default_rng(0)
        chosen = random.choice(len(vectors), min(count, len(vectors)), replace=False)
        train(index, vectors[np.sort(chosen)])
    for first in range(0, len(vectors), 2**14):
        index.add(np.ascontiguousarray(vectors[first : first + 2**14]))
    seconds = time.perf_counter() - start
    holds = isinstance(index, faiss.IndexHNSWFlat | faiss.IndexIVFFlat) or (
        (rows := plain_rows(index)) is not None and rows.dtype == np.float32
    )
    return Built(spec, index, None if holds else vectors, seconds)


def families(vectors: np.ndarray, texts: np.ndarray, specs: Sequence[str] | None) -> None:
    """Every kind of index, tuned to three recalls."""
    count, dim = vectors.shape
    sizes = {"lists": 2 ** round(np.log2(4 * count**0.5)), "half": dim // 2, "quarter": dim // 4}
    truth = search_exact(texts, [vectors], 10)[1]
    for family in specs or FAMILIES:
        built = build(family.format(**sizes), vectors)
        for wanted in (0.9, 0.95, 0.99):
            knobs = choose_knobs(built.index, built.vectors, texts[::2], truth[::2], wanted)
            show("clipkit", built, str(knobs), built.at(knobs, texts[1::2], truth[1::2]))


def against(
    folder: Path,
    vectors: np.ndarray,
    texts: np.ndarray,
    memory: int,
    pythons: dict[str, Path | None],
    limit: float,
) -> None:
    """clipkit against the peers at equal memory: at their own settings, and along their curves.

    Args:
        folder: holds the vectors in ``img_emb/*.npy``.
        vectors: the same, float32 [n, dim].
        texts: float32 [m, dim].
        memory: bytes that an index may take.
        pythons: of the environments of the peers, by name; None leaves one out.
        limit: seconds that a peer may take.
    """
    truth = search_exact(texts, [vectors], 10)[1]
    asked, wanted = texts[1::2], truth[1::2]
    ours = build(candidates(*vectors.shape, memory)[0], vectors)
    curve: Curve = []
    for recall in RECALLS:
        knobs = choose_knobs(ours.index, ours.vectors, texts[::2], truth[::2], recall)
        curve.append((f"{knobs}, tuned for {recall}", ours.at(knobs, asked, wanted)))
        show("clipkit", ours, *curve[-1])
    knob, values = effort(ours.index)
    for refine in REFINED if ours.vectors is not None else (1,):
        for value in values:
            knobs = {REFINE: refine} if ours.vectors is not None else {}
            knobs |= {knob: value} if knob else {}
            curve.append((str(knobs), ours.at(knobs, asked, wanted)))
    for name, run in (("autofaiss", autofaiss), ("clip-retrieval", clip_retrieval)):
        python = pythons[name]
        if python is None:
            print(f"{name} is left out: name a Python that has it with --{name}")
            continue
        peer = run(python, folder, memory, limit)
        if isinstance(peer, str):
            print(peer, flush=True)
        else:
            _compare(name, peer, curve, asked, wanted)


def _compare(name: str, peer: Peer, curve: Curve, asked: np.ndarray, wanted: np.ndarray) -> None:
    built = Built(peer.key, peer.index, None, peer.seconds)
    chosen = measure(asker(built.index, None, {}), asked, wanted)
    points: Curve = [(f"{peer.knobs}, as it chose", chosen)]
    knob, values = effort(built.index)
    if knob is not None:
        points += [(f"{knob}={value}", built.at({knob: value}, asked, wanted)) for value in values]
    for knobs, found in points:
        show(name, built, knobs, found)
        print(f"{'':10} {beside(found, [one for _, one in curve])}")


def beside(theirs: Measured, ours: Sequence[Measured]) -> str:
    """What clipkit finds in no more time than a peer, and how long it takes for no less recall."""
    quick = [one.recall for one in ours if one.milliseconds <= theirs.milliseconds]
    good = [one.milliseconds for one in ours if one.recall >= theirs.recall]
    at_time = f"recall {max(quick):.3f} for {theirs.recall:.3f}" if quick else "is never so quick"
    at_recall = (
        f"{min(good):.2f} ms for {theirs.milliseconds:.2f} ({theirs.milliseconds / min(good):.1f}×)"
        if good
        else "never finds so much"
    )
    return f"clipkit in that time: {at_time}; at that recall: {at_recall}"


def show(name: str, built: Built, knobs: str, found: Measured) -> None:
    """A line of the table."""
    print(
        f"{name:14} {built.name:38} {built.bytes / 2**20:7.0f} MiB  built in {built.seconds:5.0f} s"
        f"  recall@10 {found.recall:.3f}  {found.milliseconds:7.2f} ms a query  {knobs}",
        flush=True,
    )
