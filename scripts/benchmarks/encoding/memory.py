"""Peak memory of `clipkit embed` as the number of images grows.

    python -m scripts.benchmarks.encoding.memory --images 1000 10000 50000

Uses small files and a tiny model with random weights. Each number of images is measured twice, in
separate processes: encoding all images, and again when none is new.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.benchmarks.common.memory import peak_memory

MODEL = {
    "embed_dim": 32,
    "vision": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text": {"width": 32, "heads": 2, "layers": 1},
}


def save_model(path: Path) -> None:
    """Write a checkpoint of a tiny network."""
    from clipkit.config import parse_config
    from clipkit.models.checkpoint import save_checkpoint
    from clipkit.training.build import build_towers

    towers = build_towers(parse_config({"model": MODEL}).model, 0.07, seed=0)
    save_checkpoint(path, towers, {"step": 1}, {"step": 1})


def write_images(folder: Path, first: int, count: int) -> None:
    """Write small, distinct JPEGs, a thousand per folder."""
    generator = np.random.default_rng(first)
    for number in range(first, count):
        target = folder / f"{number // 1000:03}"
        target.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8)).save(stream, "JPEG")
        (target / f"{number:06}.jpg").write_bytes(stream.getvalue())


def embed_once(photos: str, out: str, model: str) -> None:
    """Embed, then print images, seconds and peak memory in MiB."""
    from clipkit.models.loading import load_model
    from clipkit.tasks.embed import embed

    encoder = load_model(model)
    start = time.perf_counter()
    count = len(embed(photos, out, encoder))
    seconds = time.perf_counter() - start
    print(count, seconds, peak_memory())


def main() -> None:
    """Print two lines for each number of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images", type=int, nargs="*", default=[1000, 10_000, 50_000], help="numbers of images"
    )
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        embed_once(*options.once)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, made = Path(temporary), 0
        save_model(folder / "model")
        for images in sorted(options.images):
            write_images(folder / "photos", made, images)
            made = images
            for what in ("encoding all", "nothing new"):
                paths = [str(folder / name) for name in ("photos", f"store-{images}", "model")]
                command = [sys.executable, "-m", __spec__.name, "--once", *paths]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    sys.exit(done.returncode)
                count, seconds, memory = map(float, done.stdout.split())
                print(
                    f"{count:8.0f} images, {what:12} {count / seconds:8.0f} images/s "
                    f"{memory:7.0f} MiB peak"
                )


if __name__ == "__main__":
    main()
