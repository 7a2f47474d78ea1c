"""An index tuned with text against autofaiss: recall@10 of text queries, latency, memory.

Both index the same made-up vectors with CLIP's gap (gap_vectors.py) within the same memory, and are
asked with the same text vectors, of which none was used for tuning. autofaiss lives in an
environment of its own; without --autofaiss its half is skipped.

python scripts/bench_index.py --count 200000 --memory 100MiB --autofaiss ~/venv-af/bin/python
python scripts/bench_index.py --count 200000 --families     # every kind of index, at three recalls
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from gap_vectors import GapVectors

from clipkit.cli.sizes import parse_size
from clipkit.store.exact import search_exact
from clipkit.store.flat import plain_rows
from clipkit.store.spec import (
    ROWS_PER_CENTROID,
    TRAINING_ROWS,
    new_index,
    train,
    training_rows_needed,
)
from clipkit.store.tune import Measured, Wish, asker, candidates, choose_knobs, effort, measure

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
THEIRS = """
import json, logging, sys
from autofaiss import build_index
folder, out, memory = sys.argv[1:]
build_index(folder, index_path=out, index_infos_path=out + ".json", max_index_memory_usage=memory,
            current_memory_available="8G", metric_type="ip", verbose=logging.ERROR)
"""


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


def theirs(python: Path, folder: Path, memory: int) -> tuple[Built, str]:
    """Build with autofaiss in its own environment, and the knobs it chose."""
    out = folder / "autofaiss.index"
    start = time.perf_counter()
    command = [python, "-c", THEIRS, folder / "vectors", out, f"{memory}B"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"autofaiss failed: {done.stderr.strip().splitlines()[-1]}")
    index = faiss.read_index(str(out))
    infos = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    knobs = str(infos.get("index_param", ""))
    faiss.ParameterSpace().set_index_parameters(index, knobs)
    return Built(str(infos["index_key"]), index, None, time.perf_counter() - start), knobs


def curve(built: Built, queries: np.ndarray, truth: np.ndarray) -> list[tuple[str, Measured]]:
    """What an index finds at every value of its knob for effort."""
    name, values = effort(built.index)
    steps = [({name: value} if name else {}) for value in values]
    return [(str(knobs or ""), built.at(knobs, queries, truth)) for knobs in steps]


def show(name: str, built: Built, knobs: str, found: Measured) -> None:
    """A line of the table."""
    print(
        f"{name:10} {built.name:38} {built.bytes / 2**20:7.0f} MiB  built in {built.seconds:5.0f} s"
        f"  recall@10 {found.recall:.3f}  {found.milliseconds:7.2f} ms a query  {knobs}",
        flush=True,
    )


def main() -> None:
    """Run what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--memory", default="100MiB")
    parser.add_argument("--autofaiss", type=Path, metavar="PYTHON")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--specs", nargs="+", help="with --families: these alone")
    options = parser.parse_args()
    world = GapVectors(options.dim)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vectors").mkdir()
        file = folder / "vectors" / "vectors.npy"
        shape = (options.count, options.dim)
        rows = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        start = 0
        for block in world.images(options.count):
            rows[start : start + len(block)] = block
            start += len(block)
        rows.flush()
        vectors = np.load(file, mmap_mode="r")
        texts = world.texts(1000)
        truth = search_exact(texts, [vectors], 10)[1]
        if options.families:
            families(options, vectors, texts, truth)
        else:
            against(options, folder, vectors, texts, truth)


def families(
    options: argparse.Namespace, vectors: np.ndarray, texts: np.ndarray, truth: np.ndarray
) -> None:
    """Every kind of index, tuned to three recalls."""
    sizes = {
        "lists": 2 ** round(np.log2(4 * options.count**0.5)),
        "half": options.dim // 2,
        "quarter": options.dim // 4,
    }
    for family in options.specs or FAMILIES:
        built = build(family.format(**sizes), vectors)
        for wanted in (0.9, 0.95, 0.99):
            knobs = choose_knobs(built.index, built.vectors, texts[::2], truth[::2], wanted)
            show("", built, str(knobs), built.at(knobs, texts[1::2], truth[1::2]))


def against(
    options: argparse.Namespace,
    folder: Path,
    vectors: np.ndarray,
    texts: np.ndarray,
    truth: np.ndarray,
) -> None:
    """clipkit against autofaiss at equal memory."""
    memory = parse_size(options.memory)
    asked, wanted = texts[1::2], truth[1::2]
    for recall in (0.9, 0.95, 0.99):
        ours = build(candidates(*vectors.shape, Wish(memory=memory).bytes)[0], vectors)
        knobs = choose_knobs(ours.index, ours.vectors, texts[::2], truth[::2], recall)
        show("clipkit", ours, f"{knobs}, tuned for {recall}", ours.at(knobs, asked, wanted))
    if options.autofaiss is None:
        print("autofaiss is skipped: name a Python that has it with --autofaiss")
        return
    peer, knobs = theirs(options.autofaiss, folder, memory)
    found = measure(asker(peer.index, None, {}), asked, wanted)
    show("autofaiss", peer, f"{knobs}, as it chose", found)
    for step, found in curve(peer, asked, wanted):
        show("autofaiss", peer, step, found)


if __name__ == "__main__":
    main()
