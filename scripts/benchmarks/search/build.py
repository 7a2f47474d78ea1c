"""What an index of many vectors costs: a part of bench_search.

Vectors are written as shards, from which the index is built block by block as `clipkit index build`
does; it is opened and asked in a process of its own. From what that took, a thousand times as many
are reckoned on paper.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from bench_life import table
from gap_vectors import GapVectors, unit

from clipkit.artifacts import ModelRef
from clipkit.index.faiss_factory import ROWS_PER_CENTROID
from clipkit.index.tuning import candidates
from clipkit.index.vector_index import VectorIndex, write_index

BLOCK = 2**16
PAPER = 10**9
CORES = 64
"""Of the machine that is reckoned with; a core is taken to be one of those measured on."""
DISK = 2e9
"""Bytes a second that its disks read or write."""


class Shards:
    """Shards of vectors in a folder, float32 or float16, with made-up records."""

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
    """Made-up vectors with CLIP's gap, ``BLOCK`` rows a file."""
    folder.mkdir()
    for number, block in enumerate(GapVectors(dim).images(count, block=BLOCK)):
        kept = block.astype(np.float16) if half else block
        np.save(folder / f"{number:05d}.npy", kept)


def scale(folder: Path, count: int, dim: int, memory: int, half: bool) -> None:
    """Build, open and ask an index of so many, and reckon what a billion would cost."""
    write_shards(folder / "shards", count, dim, half)
    spec = candidates(count, dim, memory)[0]
    built = _apart("build", folder, spec)
    size = sum(file.stat().st_size for file in (folder / "index").iterdir())
    print(
        f"build {spec} of {count} × {dim}: {built['seconds']:.0f} s, {built['peak']:.0f} MiB at "
        f"most (memory-mapped files included), {size / 2**30:.1f} GiB on disk",
        flush=True,
    )
    opened = _apart("open", folder, spec)
    print(
        f"open it in a fresh process: {opened['seconds']:.2f} s, first answer after "
        f"{opened['answer']:.2f} s, then {1000 * opened['next']:.1f} ms each; "
        f"{opened['peak']:.0f} MiB at most",
        flush=True,
    )
    lists = int(spec.partition("IVF")[2].partition(",")[0] or 0)
    if lists:
        _on_paper(count, dim, lists, built["seconds"])


def _apart(what: str, folder: Path, spec: str) -> dict[str, float]:
    command = [sys.executable, __file__, what, str(folder), spec]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts: dict[str, float] = json.loads(done.stdout)
    return facts


def _on_paper(count: int, dim: int, lists: int, seconds: float) -> None:
    """The spec for a billion, its machine and its time, from the time that ``count`` took.

    Almost all of it goes into comparing rows with the centres of lists: ``count`` rows with
    ``lists`` centres, and at least ``ROWS_PER_CENTROID`` rows a centre ten times in training.
    """
    most = 40 * PAPER + 2**33
    spec = candidates(PAPER, dim, most)[0]
    many = int(spec.partition("IVF")[2].partition(",")[0])
    steps = (many * (PAPER + 10 * ROWS_PER_CENTROID * many)) / (
        lists * (count + 10 * ROWS_PER_CENTROID * lists)
    )
    cores = len(os.sched_getaffinity(0))
    hours = seconds * steps * cores / CORES / 3600
    moved = 3 * 4 * dim * PAPER / DISK / 3600  # read to train and to add, written beside the codes
    print(
        f"on paper, {PAPER:,} × {dim}: {spec} within {most / 2**30:.0f} GiB of memory and "
        f"{4 * dim * PAPER / 2**40:.1f} TiB of disk; {hours:.0f} h on {CORES} cores ({steps:,.0f} "
        f"times the work of this one, on {cores}) and {moved:.1f} h of reading and writing at "
        f"{DISK / 1e9:.0f} GB/s: {hours + moved:.0f} machine-hours"
    )


def _peak() -> float:
    """The most memory that this process has held, MiB; getrusage would count the parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _build(folder: Path, spec: str) -> dict[str, float]:
    rows = Shards(folder / "shards")
    model = ModelRef("made up", "", "bench", rows.dim)
    start = time.perf_counter()
    write_index(rows, model, folder / "index", spec, {}, {})
    return {"seconds": time.perf_counter() - start, "peak": _peak()}


def _open(folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    index = VectorIndex.open(folder / "index")
    opened = time.perf_counter()
    texts = GapVectors(index.dim).texts(21)
    asked = time.perf_counter()
    index.search(texts[:1], 10)
    answered = time.perf_counter()
    for text in texts[1:]:
        index.search(text[None], 10)
    ended = time.perf_counter()
    first = opened - start + answered - asked
    return {
        "seconds": opened - start,
        "answer": first,
        "next": (ended - answered) / (len(texts) - 1),
        "peak": _peak(),
    }


def main() -> None:
    """One step in a process of its own; its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["build", "open"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("spec")
    options = parser.parse_args()
    build = options.what == "build"
    print(json.dumps(_build(options.folder, options.spec) if build else _open(options.folder)))


if __name__ == "__main__":
    main()
