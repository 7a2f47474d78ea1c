"""Time and memory of retrieval metrics: clipkit and CLIP_benchmark on the same vectors.

    python -m venv PEER && PEER/bin/pip install clip-benchmark==1.6.2
    python -m scripts.benchmarks.evaluation.retrieval --peer-python PEER/bin/python --images 5000
    python -m scripts.benchmarks.evaluation.retrieval --images 100000 --rounds 1 --only clipkit

CLIP_benchmark needs its own environment, as above. Each contender runs in a separate process, in
alternation. Memory is the peak beyond the memory held before, including the vectors read or mapped.
For reference, `product` is the blocked matrix product alone: a lower bound on the time of any
method that computes all scores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.common.memory import peak_memory
from scripts.benchmarks.common.timing import ratios, spread

KS = (1, 5, 10)
BATCH = 64  # images per batch of CLIP_benchmark
ROWS = 1000  # images generated at once


def write_vectors(folder: Path, images: int, captions: int, dim: int) -> None:
    """Write unit vectors of images and of captions, as similar as those of a good model."""
    generator = np.random.default_rng(0)

    def unit(rows: Any) -> Any:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def create(name: str, count: int) -> Any:
        file = folder / f"{name}.npy"
        return np.lib.format.open_memmap(file, "w+", np.float32, (count, dim))

    image_vectors, texts = create("images", images), create("captions", images * captions)
    for start in range(0, images, ROWS):
        size = (min(ROWS, images - start), dim)
        rows = unit(generator.standard_normal(size, np.float32))
        image_vectors[start : start + ROWS] = rows
        rows = np.repeat(rows, captions, axis=0)
        noise = unit(generator.standard_normal(rows.shape, np.float32))
        texts[start * captions : (start + ROWS) * captions] = unit(rows + 5 * noise)
    image_vectors.flush()
    texts.flush()


def mapped(folder: Path) -> list[Any]:
    """Memory-mapped vectors of images and captions."""
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "captions")]


def run_product(folder: Path, _: int) -> dict[str, float]:
    """Compute the scores and discard them."""
    from clipkit.evaluation.retrieval import BLOCK

    images, texts = mapped(folder)
    for top in range(0, len(images), BLOCK[0]):
        for left in range(0, len(texts), BLOCK[1]):
            images[top : top + BLOCK[0]] @ texts[left : left + BLOCK[1]].T
    return {}


def run_clipkit(folder: Path, captions: int) -> dict[str, float]:
    """Recall, median ranks and average precision."""
    from clipkit.evaluation.retrieval import rank_queries, retrieval_metrics

    images, texts = mapped(folder)
    owners = np.repeat(np.arange(len(images)), captions)
    found = rank_queries(images, texts, owners, np.arange(len(texts)))
    figures = retrieval_metrics(found, np.ones((1, len(images))), KS)
    return {name: float(value[0]) for name, value in figures.items()}


def run_clip_benchmark(folder: Path, captions: int) -> dict[str, float]:
    """Recall by CLIP_benchmark's own function, given vectors in place of images and texts."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    images, texts = (
        torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("images", "captions")
    )

    class Vectors:
        def encode_image(self, batch: Any) -> Any:
            return batch

        def encode_text(self, batch: Any) -> Any:
            return texts[batch]

    def batches() -> Any:
        for start in range(0, len(images), BATCH):
            numbers = range(start, min(start + BATCH, len(images)))
            yield (
                images[start : start + BATCH],
                [[n * captions + c for c in range(captions)] for n in numbers],
            )

    found = evaluate(Vectors(), batches(), torch.tensor, "cpu", amp=False, recall_k_list=list(KS))
    names = {"image": "text_to_image", "text": "image_to_text"}
    return {
        f"{names[name.partition('_')[0]]}_r{name.rpartition('@')[2]}": value
        for name, value in found.items()
    }


RUNS = {"clipkit": run_clipkit, "product": run_product, "peer": run_clip_benchmark}


def child(name: str, folder: Path, captions: int) -> None:
    """Run one contender in this process and print its time and memory."""
    RUNS[name](folder / "tiny", captions)  # exclude imports and first calls
    before = peak_memory()
    start = time.perf_counter()
    figures = RUNS[name](folder, captions)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "memory": peak_memory() - before, "figures": figures}))


def measure(python: str, name: str, folder: Path, captions: int) -> dict[str, Any]:
    """Time and memory of one run in a separate process."""
    command = [python, "-m", __spec__.name, "--child", name, "--folder", folder]
    command += ["--captions", captions]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {name} exited with code {done.returncode} (-9: out of memory)")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peer_needs(images: int, captions: int, dim: int) -> float:
    """Estimated peak memory of CLIP_benchmark in MiB: the arrays that its evaluate() creates."""
    texts = images * captions
    scores = 4 * images * texts  # float32
    positive = images * texts  # bool
    vectors = 3 * 4 * dim * (images + texts)  # as read, normalised, concatenated
    one_hot = 2 * 8 * BATCH * max(KS) * texts  # int64, and its product with ``positive``
    return (scores + positive + vectors + one_hot) / 2**20


def available() -> float:
    """MiB available to a new process."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return int(next(one for one in lines if one.startswith("MemAvailable:")).split()[1]) / 1024


def contenders(args: argparse.Namespace) -> dict[str, str]:
    """The contenders, each with its Python."""
    pythons = {"clipkit": sys.executable, "product": sys.executable}
    needed = peer_needs(args.images, args.captions, args.dim)
    if not args.peer_python:
        if args.only == "peer":
            sys.exit("error: --only peer requires --peer-python")
    elif needed > available():
        print(
            f"CLIP_benchmark is skipped: it needs about {needed:,.0f} MiB, and only "
            f"{available():,.0f} MiB are available"
        )
    else:
        pythons["peer"] = args.peer_python
    return {name: python for name, python in pythons.items() if args.only in (None, name)}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print a line for each contender, the ratios and the largest difference in recall."""
    for name, found in runs.items():
        times = [run["seconds"] for run in found]
        print(
            f"{name:15} {spread(times):>24} s  "
            f"{statistics.median(run['memory'] for run in found):9.0f} MiB"
        )
    for one, other, what in (
        ("clipkit", "product", "seconds"),
        ("peer", "clipkit", "seconds"),
        ("peer", "clipkit", "memory"),
    ):
        if one in runs and other in runs:
            above, below = ([run[what] for run in runs[name]] for name in (one, other))
            print(f"{what}: {one} / {other} {spread(ratios(above, [max(v, 1e-9) for v in below]))}")
    if "peer" in runs and "clipkit" in runs:
        theirs, ours = runs["peer"][0]["figures"], runs["clipkit"][0]["figures"]
        worst = max(abs(value - ours[name]) for name, value in theirs.items())
        print(f"largest difference in recall: {worst:.1e}")


def main() -> None:
    """Alternate the contenders and print time, memory and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", help="Python of an environment with CLIP_benchmark")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="per image")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=RUNS, help="run this contender only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder, args.captions)
        return
    texts = args.images * args.captions
    size = 4 * args.dim * (args.images + texts) / 2**20
    print(f"{args.images} images x {texts} captions, {args.dim} dimensions, {size:,.0f} MiB")
    pythons = contenders(args)
    if not pythons:
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny").mkdir()
        write_vectors(folder / "tiny", 70, args.captions, args.dim)
        write_vectors(folder, args.images, args.captions, args.dim)
        for _ in range(args.rounds):
            for peer, python in pythons.items():
                runs[peer].append(measure(python, peer, folder, args.captions))
    summarise(runs)


if __name__ == "__main__":
    main()
