"""Recall@10 and latency of text queries at equal memory: clipkit, autofaiss and clip-retrieval.

    python -m scripts.benchmarks.search.tuned --autofaiss PYTHON --clip-retrieval PYTHON
    python -m scripts.benchmarks.search.tuned --families  # every kind of index, at three recalls

All index the same synthetic vectors with CLIP's modality gap (gap_vectors.py) within the same
memory. They answer the same text queries one at a time; none of these was used for tuning. The
index of clipkit re-ranks its candidates with a few vectors from disk. Those of the peers have no
vectors to re-rank with.

By default there are two memory limits: half a byte per dimension, which requires compression, and
enough for a graph over full vectors. The peers run in their own environments, each for at most
``--limit`` seconds.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from clipkit.cli.index import parse_size
from clipkit.index.exact import search_exact
from clipkit.index.faiss_factory import (
    ROWS_PER_CENTROID,
    TRAINING_ROWS,
    new_index,
    train,
    training_rows_needed,
)
from clipkit.index.search import RERANK, plain_rows
from clipkit.index.tuning import (
    Measured,
    candidates,
    choose_search_parameters,
    effort,
    measure,
    search_with,
)
from scripts.benchmarks.search.build import write_shards
from scripts.benchmarks.search.gap_vectors import GapVectors
from scripts.benchmarks.search.peers import Peer, autofaiss, clip_retrieval

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
"""Target recalls that the index of clipkit is tuned for."""
RERANKED = (2, 8, 32, 64)
"""Re-ranked candidates, in multiples of k, for the recall–latency curve."""
Curve = list[tuple[str, Measured]]


class Built:
    """A FAISS index and, if it re-ranks from disk, the vectors."""

    def __init__(self, name: str, index: Any, vectors: np.ndarray | None, seconds: float) -> None:
        self.name, self.index, self.vectors, self.seconds = name, index, vectors, seconds
        self.bytes = len(faiss.serialize_index(index))

    def at(self, parameters: dict[str, int], queries: np.ndarray, truth: np.ndarray) -> Measured:
        """Recall and latency with these search parameters."""
        return measure(search_with(self.index, self.vectors, parameters), queries, truth)


def build(spec: str, vectors: np.ndarray) -> Built:
    """Build as `clipkit index build` does."""
    start = time.perf_counter()
    index = new_index(spec, vectors.shape[1], len(vectors))
    if not index.is_trained:
        count = max(TRAINING_ROWS, ROWS_PER_CENTROID * training_rows_needed(index))
        random = np.random.default_rng(0)
        sample = random.choice(len(vectors), min(count, len(vectors)), replace=False)
        train(index, vectors[np.sort(sample)])
    for first in range(0, len(vectors), 2**14):
        index.add(np.ascontiguousarray(vectors[first : first + 2**14]))
    seconds = time.perf_counter() - start
    exact = isinstance(index, faiss.IndexHNSWFlat | faiss.IndexIVFFlat) or (
        (rows := plain_rows(index)) is not None and rows.dtype == np.float32
    )
    return Built(spec, index, None if exact else vectors, seconds)


def families(vectors: np.ndarray, texts: np.ndarray, specs: Sequence[str] | None) -> None:
    """Tune every kind of index to three target recalls."""
    count, dim = vectors.shape
    sizes = {"lists": 2 ** round(np.log2(4 * count**0.5)), "half": dim // 2, "quarter": dim // 4}
    truth = search_exact(texts, [vectors], 10)[1]
    for family in specs or FAMILIES:
        built = build(family.format(**sizes), vectors)
        for recall in (0.9, 0.95, 0.99):
            parameters = choose_search_parameters(
                built.index, built.vectors, texts[::2], truth[::2], recall
            )
            show("clipkit", built, str(parameters), built.at(parameters, texts[1::2], truth[1::2]))


def against(
    folder: Path,
    vectors: np.ndarray,
    texts: np.ndarray,
    memory: int,
    pythons: dict[str, Path | None],
    limit: float,
) -> None:
    """Compare clipkit with the peers at equal memory, at their own settings and at others.

    Args:
        folder: folder with the vectors in ``img_emb/*.npy``.
        vectors: the same vectors, float32 [n, dim].
        texts: text vectors, float32 [m, dim]; the even rows are for tuning.
        memory: memory limit of an index, in bytes.
        pythons: the Python of each peer's environment; None skips the peer.
        limit: time limit of a peer, in seconds.
    """
    truth = search_exact(texts, [vectors], 10)[1]
    queries, expected = texts[1::2], truth[1::2]
    ours = build(candidates(*vectors.shape, memory)[0], vectors)
    curve: Curve = []
    for recall in RECALLS:
        parameters = choose_search_parameters(
            ours.index, ours.vectors, texts[::2], truth[::2], recall
        )
        curve.append((f"{parameters}, tuned for {recall}", ours.at(parameters, queries, expected)))
        show("clipkit", ours, *curve[-1])
    parameter, values = effort(ours.index)
    for refine in RERANKED if ours.vectors is not None else (1,):
        for value in values:
            parameters = {RERANK: refine} if ours.vectors is not None else {}
            parameters |= {parameter: value} if parameter else {}
            curve.append((str(parameters), ours.at(parameters, queries, expected)))
    for name, run in (("autofaiss", autofaiss), ("clip-retrieval", clip_retrieval)):
        python = pythons[name]
        if python is None:
            print(f"{name} is skipped: give --{name} PYTHON")
            continue
        peer = run(python, folder, memory, limit)
        if isinstance(peer, str):
            print(peer, flush=True)
        else:
            _compare(name, peer, curve, queries, expected)


def _compare(
    name: str, peer: Peer, curve: Curve, queries: np.ndarray, expected: np.ndarray
) -> None:
    built = Built(peer.key, peer.index, None, peer.seconds)
    own = measure(search_with(built.index, None, {}), queries, expected)
    points: Curve = [(f"{peer.parameters}, its own choice", own)]
    parameter, values = effort(built.index)
    if parameter is not None:
        points += [
            (f"{parameter}={value}", built.at({parameter: value}, queries, expected))
            for value in values
        ]
    for parameters, found in points:
        show(name, built, parameters, found)
        print(f"{'':10} {against_curve(found, [one for _, one in curve])}")


def against_curve(theirs: Measured, ours: Sequence[Measured]) -> str:
    """The recall of clipkit in at most the same time, and its time for at least the same recall."""
    quick = [one.recall for one in ours if one.milliseconds <= theirs.milliseconds]
    good = [one.milliseconds for one in ours if one.recall >= theirs.recall]
    at_time = f"recall {max(quick):.3f} for {theirs.recall:.3f}" if quick else "is never as fast"
    at_recall = (
        f"{min(good):.2f} ms for {theirs.milliseconds:.2f} ({theirs.milliseconds / min(good):.1f}×)"
        if good
        else "never reaches it"
    )
    return f"clipkit in that time: {at_time}; at that recall: {at_recall}"


def show(name: str, built: Built, parameters: str, found: Measured) -> None:
    """Print a line of the table."""
    print(
        f"{name:14} {built.name:38} {built.bytes / 2**20:7.0f} MiB  built in {built.seconds:5.0f} s"
        f"  recall@10 {found.recall:.3f}  {found.milliseconds:7.2f} ms per query  {parameters}",
        flush=True,
    )


def main() -> None:
    """Create the vectors, then compare with the peers or tune every kind of index."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="vectors")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--memory", nargs="+", help="memory limits, such as 50MiB")
    parser.add_argument("--autofaiss", type=Path, metavar="PYTHON")
    parser.add_argument("--clip-retrieval", type=Path, metavar="PYTHON")
    parser.add_argument("--limit", type=float, default=90, help="seconds for each peer")
    parser.add_argument("--families", action="store_true", help="tune every kind of index instead")
    parser.add_argument("--specs", nargs="+", help="with --families: only these kinds")
    options = parser.parse_args()
    row = options.dim * options.count
    limits = [parse_size(text) for text in options.memory or [f"{row // 2}B", f"{6 * row}B"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "img_emb", options.count, options.dim, half=False)
        files = sorted((folder / "img_emb").glob("*.npy"))
        vectors = np.concatenate([np.load(file) for file in files])
        texts = GapVectors(options.dim).texts(1000)
        if options.families:
            families(vectors, texts, options.specs)
            return
        pythons = {"autofaiss": options.autofaiss, "clip-retrieval": options.clip_retrieval}
        for memory in limits:
            print(f"within {memory / 2**20:.0f} MiB of memory:", flush=True)
            against(folder, vectors, texts, memory, pythons, options.limit)


if __name__ == "__main__":
    main()
