"""Time to open an index, to add and remove ten images, and to compact it.

python -m scripts.benchmarks.search.updates --vectors 1000000
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipkit.artifacts import ModelRef
from clipkit.index.vector_index import VectorIndex, write_index
from clipkit.index.writer import IndexWriter
from scripts.benchmarks.common.timing import spread

BLOCK = 20_000


class RandomRows:
    """Random unit rows with records, generated block by block."""

    def __init__(self, count: int, dim: int) -> None:
        self.count, self.dim = count, dim

    def __len__(self) -> int:
        return self.count

    def shards(self) -> Iterator[tuple[np.ndarray, pa.Table]]:
        for start in range(0, self.count, BLOCK):
            size = min(BLOCK, self.count - start)
            yield unit_rows(size, self.dim, start), table(start, size)


def unit_rows(count: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def table(start: int, count: int) -> pa.Table:
    numbers = np.arange(start, start + count)
    return pa.table(
        {
            "key": [f"folder-{n // 1000}/photo-{n:09d}.jpg" for n in numbers],
            "size": numbers,
            "mtime_ns": numbers,
            "captions": pa.array([[]] * count, pa.list_(pa.string())),
            "label": pa.nulls(count, pa.string()),
            "content_hash": pa.array([f"{n:032x}" for n in numbers]),
        }
    )


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--spec", default="Flat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compact", action="store_true", help="also time compaction")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        rows = RandomRows(options.vectors, options.dim)
        model = ModelRef("random", "", "bench", options.dim)
        built = timed(lambda: write_index(rows, model, path, options.spec, {}, {}))
        print(f"build {options.spec} of {options.vectors} x {options.dim}: {built:.2f} s")
        fresh = iter(range(options.vectors, options.vectors + 10 * options.rounds, 10))

        def add() -> None:
            start = next(fresh)
            with IndexWriter(path) as writer:
                writer.append(unit_rows(10, options.dim, start), table(start, 10))
                writer.commit()

        def remove() -> None:
            with IndexWriter(path) as writer:
                writer.remove(table(next(stale), 10)["key"].to_pylist())
                writer.commit()

        stale = iter(range(0, 10 * options.rounds, 10))
        query = unit_rows(1, options.dim, 1)
        for name, step in (
            ("open", lambda: VectorIndex.open(path)),
            ("open and search once", lambda: VectorIndex.open(path).search_vectors(query, 10)),
            ("add ten", add),
            ("remove ten", remove),
        ):
            times = [timed(step) for _ in range(options.rounds)]
            print(f"{name}: {spread(times, 3)} s")
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"on disk: {size / 2**20:.0f} MiB, {len(list(path.iterdir()))} files")
        if options.compact:

            def compact() -> None:
                with IndexWriter(path) as writer:
                    writer.commit(compact=True)

            print(f"compact: {timed(compact):.2f} s")


if __name__ == "__main__":
    main()
