"""Time and memory of retrieval metrics against CLIP_benchmark's, in turn, on the same vectors.

CLIP_benchmark wants an environment of its own:
    python -m venv PEER && PEER/bin/pip install clip-benchmark==1.6.2
    python scripts/bench_eval.py --peer-python PEER/bin/python --images 5000 --rounds 3
    python scripts/bench_eval.py --images 25000 --rounds 1        # clipkit alone
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

KS = (1, 5, 10)


def write_vectors(folder: Path, images: int, captions: int, dim: int) -> None:
    """Unit vectors of images and of captions about as near to them as those of a good model."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(images, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(folder / "images.npy", rows)
    texts = np.lib.format.open_memmap(
        folder / "captions.npy", "w+", np.float32, (images * captions, dim)
    )
    for start in range(0, images, 1000):
        part = np.repeat(rows[start : start + 1000], captions, axis=0)
        noise = generator.normal(size=part.shape).astype(np.float32)
        noisy = part + 5 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
        texts[start * captions : start * captions + len(part)] = noisy


def peak_memory() -> float:
    """MiB this process held at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def run_clipkit(folder: Path, captions: int) -> dict[str, float]:
    """Recall, and beside it median ranks and average precision."""
    from clipkit.metrics import retrieval_figures, retrieved

    images, texts = (np.load(folder / f"{name}.npy") for name in ("images", "captions"))
    owners = np.repeat(np.arange(len(images)), captions)
    found = retrieved(images, texts, owners, np.arange(len(texts)))
    figures = retrieval_figures(found, np.ones((1, len(images))), KS)
    return {name: float(value[0]) for name, value in figures.items()}


def run_clip_benchmark(folder: Path, captions: int) -> dict[str, float]:
    """Recall by CLIP_benchmark's own function, fed with vectors in place of pictures and texts."""
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
        for start in range(0, len(images), 64):
            numbers = range(start, min(start + 64, len(images)))
            yield (
                images[start : start + 64],
                [[n * captions + c for c in range(captions)] for n in numbers],
            )

    found = evaluate(Vectors(), batches(), torch.tensor, "cpu", amp=False, recall_k_list=list(KS))
    names = {"image": "text_to_image", "text": "image_to_text"}
    return {
        f"{names[name.partition('_')[0]]}_r{name.rpartition('@')[2]}": value
        for name, value in found.items()
    }


def child(name: str, folder: Path, captions: int) -> None:
    """Run one of them in this process and print what it took."""
    run = {"clipkit": run_clipkit, "clip_benchmark": run_clip_benchmark}[name]
    tiny = folder / "tiny"
    run(tiny, captions)  # imports and first calls are not counted
    before = peak_memory()
    start = time.perf_counter()
    figures = run(folder, captions)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "memory": peak_memory() - before, "figures": figures}))


def measure(python: str, name: str, folder: Path, captions: int) -> dict[str, Any]:
    """What one run took, in a process of its own."""
    words = [python, __file__, "--child", name, "--folder", folder, "--captions", captions]
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run in turn; print a line each, the ratios and the largest difference of recall."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", help="Python of an environment with CLIP_benchmark.")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="Of each image.")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder, args.captions)
        return
    pythons = {"clipkit": sys.executable}
    if args.peer_python:
        pythons["clip_benchmark"] = args.peer_python
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny").mkdir()
        write_vectors(folder / "tiny", 70, args.captions, args.dim)
        write_vectors(folder, args.images, args.captions, args.dim)
        for _ in range(args.rounds):
            for peer, python in pythons.items():
                runs[peer].append(measure(python, peer, folder, args.captions))
    print(f"{args.images} images x {args.images * args.captions} captions, {args.dim} dimensions")
    for peer, found in runs.items():
        times = [run["seconds"] for run in found]
        print(
            f"{peer:15} {statistics.median(times):9.2f} s ({min(times):.2f} to {max(times):.2f})  "
            f"{statistics.median(run['memory'] for run in found):9.0f} MiB"
        )
    if len(runs) == 2:
        own, peer = runs["clipkit"], runs["clip_benchmark"]
        for what in ("seconds", "memory"):
            ratios = sorted(b[what] / max(a[what], 1e-9) for a, b in zip(own, peer, strict=True))
            print(
                f"{what}: clip_benchmark / clipkit {statistics.median(ratios):.1f} "
                f"({ratios[0]:.1f} to {ratios[-1]:.1f})"
            )
        theirs, ours = peer[0]["figures"], own[0]["figures"]
        worst = max(abs(value - ours[name]) for name, value in theirs.items())
        print(f"largest difference of recall: {worst:.1e}")


if __name__ == "__main__":
    main()
