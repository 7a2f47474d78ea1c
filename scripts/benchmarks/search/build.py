"""Time and memory to build and open a large index, with an estimate for a billion vectors.

    python -m scripts.benchmarks.search.build --count 1000000
    python -m scripts.benchmarks.search.build --count 10000000 --half  # 33 GB of disk
    python -m scripts.benchmarks.search.build --step build --folder FOLDER --spec SPEC

Writes synthetic vectors with CLIP's modality gap (gap_vectors.py) as shards and builds the index
block by block, as `clipkit index build` does. A separate process opens and searches it. From these
times it estimates the cost of a billion vectors. `--step` runs one step on the shards in
FOLDER/shards.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipkit.artifacts import ModelRef
from clipkit.cli.index import parse_size
from clipkit.index.faiss_factory import ROWS_PER_CENTROID
from clipkit.index.tuning import candidates
from clipkit.index.vector_index import VectorIndex, write_index
from scripts.benchmarks.common.memory import peak_memory
from scripts.benchmarks.common.timing import run_command
from scripts.benchmarks.search.gap_vectors import GapVectors, unit
from scripts.benchmarks.search.updates import table

MODULE = "scripts.benchmarks.search.build"
BLOCK = 2**16
BILLION = 10**9
CORES = 64
"""Cores of the machine in the estimate, each as fast as one of this machine."""
DISK = 2e9
"""Bytes/s that its disks read or write."""


class Shards:
    """Shards of vectors in a folder, float32 or float16, with synthetic records."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.npy"))
        heads = [np.load(file, mmap_mode="r") for file in self.files]
        self.counts, self.dim = [len(head) for head in heads], heads[0].shape[1]

    def __len__(self) -> int:
        return sum(self.counts)

    def shards(self) -> Iterator[tuple[np.ndarray, pa.Table]]:
        start = 0
        for file, count in zip(self.files, self.counts, strict=True):
            rows = np.load(file, mmap_mode="r")
            whole = rows if rows.dtype == np.float32 else unit(rows.astype(np.float32))
            yield whole, table(start, count)
            start += count


def write_shards(folder: Path, count: int, dim: int, half: bool) -> None:
    """Write synthetic vectors, ``BLOCK`` rows per file."""
    folder.mkdir()
    for number, block in enumerate(GapVectors(dim).images(count, block=BLOCK)):
        rows = block.astype(np.float16) if half else block
        np.save(folder / f"{number:05d}.npy", rows)


def scale(folder: Path, count: int, dim: int, memory: int, half: bool) -> None:
    """Build, open and search an index of ``count`` vectors, and estimate a billion."""
    write_shards(folder / "shards", count, dim, half)
    spec = candidates(count, dim, memory)[0]
    built = _run_step("build", folder, spec)
    size = sum(file.stat().st_size for file in (folder / "index").iterdir())
    print(
        f"build {spec} of {count} × {dim}: {built['seconds']:.0f} s, {built['peak']:.0f} MiB peak "
        f"(memory-mapped files included), {size / 2**30:.1f} GiB on disk",
        flush=True,
    )
    opened = _run_step("open", folder, spec)
    print(
        f"open in a fresh process: {opened['seconds']:.2f} s, first answer after "
        f"{opened['answer']:.2f} s, then {1000 * opened['next']:.1f} ms each; "
        f"{opened['peak']:.0f} MiB peak",
        flush=True,
    )
    lists = int(spec.partition("IVF")[2].partition(",")[0] or 0)
    if lists:
        _print_estimate(count, dim, lists, built["seconds"])


def _run_step(step: str, folder: Path, spec: str) -> dict[str, float]:
    command = [sys.executable, "-m", MODULE, "--step", step, "--folder", str(folder)]
    figures: dict[str, float] = json.loads(run_command([*command, "--spec", spec])[0])
    return figures


def _print_estimate(count: int, dim: int, lists: int, seconds: float) -> None:
    """Estimate spec, machine and time for a billion vectors from the time for ``count``.

    Almost all the work is comparing rows with list centroids: all rows once, and in training at
    least ``ROWS_PER_CENTROID`` rows per centroid ten times.
    """
    memory = 40 * BILLION + 2**33
    spec = candidates(BILLION, dim, memory)[0]
    many = int(spec.partition("IVF")[2].partition(",")[0])
    steps = (many * (BILLION + 10 * ROWS_PER_CENTROID * many)) / (
        lists * (count + 10 * ROWS_PER_CENTROID * lists)
    )
    cores = len(os.sched_getaffinity(0))
    hours = seconds * steps * cores / CORES / 3600
    # Vectors are read for training and for adding, and written next to the codes.
    transfer = 3 * 4 * dim * BILLION / DISK / 3600
    print(
        f"estimate for {BILLION:,} × {dim}: {spec} within {memory / 2**30:.0f} GiB of memory and "
        f"{4 * dim * BILLION / 2**40:.1f} TiB of disk; {hours:.0f} h on {CORES} cores "
        f"({steps:,.0f} times the work of this build on {cores}) and {transfer:.1f} h of disk "
        f"transfer at {DISK / 1e9:.0f} GB/s: {hours + transfer:.0f} machine-hours"
    )


def _build(folder: Path, spec: str) -> dict[str, float]:
    rows = Shards(folder / "shards")
    model = ModelRef("synthetic", "", "bench", rows.dim)
    start = time.perf_counter()
    write_index(rows, model, folder / "index", spec, {}, {})
    return {"seconds": time.perf_counter() - start, "peak": peak_memory()}


def _open(folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    index = VectorIndex.open(folder / "index")
    opened = time.perf_counter()
    texts = GapVectors(index.dim).texts(21)
    started = time.perf_counter()
    index.search_vectors(texts[:1], 10)
    answered = time.perf_counter()
    for text in texts[1:]:
        index.search_vectors(text[None], 10)
    ended = time.perf_counter()
    first = opened - start + answered - started
    return {
        "seconds": opened - start,
        "answer": first,
        "next": (ended - answered) / (len(texts) - 1),
        "peak": peak_memory(),
    }


def main() -> None:
    """Run everything, or one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="vectors")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--memory", help="memory limit of the index, such as 50MiB")
    parser.add_argument("--half", action="store_true", help="write shards in float16")
    parser.add_argument("--step", choices=["build", "open"], help="run one step, print JSON")
    parser.add_argument("--folder", type=Path, help="with --step: folder of shards and index")
    parser.add_argument("--spec", help="with --step build: FAISS factory string")
    options = parser.parse_args()
    if options.step:
        if options.folder is None or (options.step == "build" and options.spec is None):
            parser.error("--step takes --folder, and --step build takes --spec")
        build = options.step == "build"
        print(json.dumps(_build(options.folder, options.spec) if build else _open(options.folder)))
        return
    memory = parse_size(options.memory or f"{options.dim * options.count // 2}B")
    with tempfile.TemporaryDirectory() as name:
        scale(Path(name), options.count, options.dim, memory, options.half)


if __name__ == "__main__":
    main()
