"""Exact search: clipkit, FAISS Flat and plain NumPy, in alternation, on the same vectors.

python -m scripts.benchmarks.search.exact --count 500000 --dim 512 --queries 1 8 64 256
"""

import argparse
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np

from clipkit.index.exact import search_exact, search_float16
from scripts.benchmarks.common.timing import alternate, ratios, spread

Found = tuple[np.ndarray, np.ndarray]


def unit_rows(count: int, dim: int, seed: int) -> np.ndarray:
    """Random unit rows, float32 [count, dim]."""
    rows = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    return np.divide(rows, np.linalg.norm(rows, axis=1, keepdims=True), out=rows)


def brute_force(queries: np.ndarray, rows: np.ndarray, k: int) -> Found:
    """One full matrix product and an argpartition, as in programs without an index."""
    scores = queries @ rows.T
    top = np.argpartition(-scores, k, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
    best = np.take_along_axis(top, order, axis=1)
    return np.take_along_axis(scores, best, axis=1), best


def check(name: str, found: Found, expected: Found) -> None:
    """Fail if scores differ by more than rounding, or ids differ without a tie."""
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6, err_msg=name)
    gaps = np.abs(np.diff(expected[0], axis=1))
    close = np.pad(gaps, ((0, 0), (1, 0)), constant_values=1) < 2e-6
    close |= (
        np.pad(gaps, ((0, 0), (0, 1)), constant_values=0) < 2e-6
    )  # the last may tie with the next
    assert ((found[1] == expected[1]) | close).all(), name


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500_000, help="vectors")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 256], help="per search")
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    run(options.count, options.dim, options.queries, options.k, options.rounds)


def run(rows: int, dim: int, queries: Sequence[int], k: int, rounds: int) -> None:
    """Print time and ratio to Flat for each method and number of queries."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, unit_rows(rows, dim, 0))
        mapped = np.load(file, mmap_mode="r")
        halves = mapped.astype(np.float16)
        flat = faiss.IndexFlatIP(dim)
        flat.add(mapped)
        print(f"{rows} × {dim}, k {k}, {faiss.omp_get_max_threads()} threads")
        for count in queries:
            batch = unit_rows(count, dim, 1)
            methods: dict[str, Callable[[], Found]] = {
                "FAISS Flat": lambda batch=batch: flat.search(batch, k),
                "clipkit": lambda batch=batch: search_exact(batch, [mapped], k),
                "clipkit, float16": lambda batch=batch: search_float16(batch, [halves], mapped, k),
                "NumPy": lambda batch=batch: brute_force(batch, mapped, k),
            }
            measure(methods, count, rounds)


def measure(methods: dict[str, Callable[[], Found]], count: int, rounds: int) -> None:
    """Alternate the methods and print a line for each."""
    expected = methods["FAISS Flat"]()
    for name, method in methods.items():
        check(name, method(), expected)
    seconds = alternate(methods, rounds, warmup=0)
    for name, method in methods.items():
        tracemalloc.start()
        method()
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        memory = "" if name.startswith("FAISS") else f"  {peak:6.0f} MiB beyond the vectors"
        speed = spread(ratios(seconds["FAISS Flat"], seconds[name]), 1)
        print(
            f"{count:6} queries  {name:18} {statistics.median(seconds[name]):7.3f} s  "
            f"{speed} times as fast as Flat{memory}"
        )


if __name__ == "__main__":
    main()
