"""Exact search against FAISS Flat and a plain NumPy argsort, in turn, on the same vectors.

python scripts/bench_exact.py --count 500000 --dim 512 --queries 1 8 64 256
"""

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np

from clipkit.index.exact import search_exact, search_halves

Found = tuple[np.ndarray, np.ndarray]


def unit_rows(count: int, dim: int, seed: int) -> np.ndarray:
    """Random float32 [count, dim] of unit rows."""
    rows = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    return np.divide(rows, np.linalg.norm(rows, axis=1, keepdims=True), out=rows)


def brute_force(queries: np.ndarray, rows: np.ndarray, k: int) -> Found:
    """One whole product and an argpartition, as programs without an index do it."""
    scores = queries @ rows.T
    among = np.argpartition(-scores, k, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, among, axis=1), axis=1, kind="stable")
    best = np.take_along_axis(among, order, axis=1)
    return np.take_along_axis(scores, best, axis=1), best


def check(name: str, found: Found, wanted: Found) -> None:
    """Stop where scores differ by more than rounding, or ids where scores are apart."""
    np.testing.assert_allclose(found[0], wanted[0], atol=2e-6, err_msg=name)
    gaps = np.abs(np.diff(wanted[0], axis=1))
    close = np.pad(gaps, ((0, 0), (1, 0)), constant_values=1) < 2e-6
    close |= np.pad(gaps, ((0, 0), (0, 1)), constant_values=0) < 2e-6  # the next after the last
    assert ((found[1] == wanted[1]) | close).all(), name


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    run(options.count, options.dim, options.queries, options.k, options.rounds)


def run(rows: int, dim: int, queries: Sequence[int], k: int, rounds: int) -> None:
    """Print a line per way and number of queries, and ratios to Flat."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, unit_rows(rows, dim, 0))
        mapped = np.load(file, mmap_mode="r")
        halves = mapped.astype(np.float16)
        flat = faiss.IndexFlatIP(dim)
        flat.add(mapped)
        print(f"{rows} × {dim}, k {k}, {faiss.omp_get_max_threads()} threads")
        for count in queries:
            asked = unit_rows(count, dim, 1)
            ways: dict[str, Callable[[], Found]] = {
                "FAISS Flat": lambda asked=asked: flat.search(asked, k),
                "clipkit": lambda asked=asked: search_exact(asked, [mapped], k),
                "clipkit, float16": lambda asked=asked: search_halves(asked, [halves], mapped, k),
                "NumPy, whole": lambda asked=asked: brute_force(asked, mapped, k),
            }
            measure(ways, count, rounds)


def measure(ways: dict[str, Callable[[], Found]], count: int, rounds: int) -> None:
    """Time the ways in turn and print a line for each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    wanted = ways["FAISS Flat"]()
    for name, way in ways.items():
        check(name, way(), wanted)
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    for name, way in ways.items():
        tracemalloc.start()
        way()
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        ratios = [a / b for a, b in zip(seconds["FAISS Flat"], seconds[name], strict=True)]
        held = "" if name.startswith("FAISS") else f"  {peak:6.0f} MiB beyond the vectors"
        print(
            f"{count:6} queries  {name:18} {statistics.median(seconds[name]):7.3f} s  "
            f"{statistics.median(ratios):5.1f} ({min(ratios):.1f}–{max(ratios):.1f}) "
            f"times as fast as Flat{held}"
        )


if __name__ == "__main__":
    main()
