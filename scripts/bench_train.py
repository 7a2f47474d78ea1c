"""Training speed and loss curves against open_clip_train, in turn, on the same files.

python scripts/bench_train.py ../shared/data/flickr8k-224-train.parquet --batch-size 64 --steps 12
python scripts/bench_train.py PAIRS --batch-size 64 --steps 90 --rounds 1   # for the curves

Each run is a process of its own through the project's own command line: the same towers from random
weights, one caption a photo, the same rates step by step, the same crops. Needs the `bench` extra.
"""

import argparse
import csv
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from clipkit.model.log import read_log

WARMUP = 5  # steps
SETTLING = 2  # steps whose time does not count: threads, caches and workers are still starting
_LINE = re.compile(r"Batch \(t\): [\d.]+, ([\d.]+)/s.* Loss: ([\d.]+)")


@dataclass(frozen=True)
class Curve:
    """What a run came to, step by step: samples a second, and the loss."""

    speeds: list[float]
    losses: list[float]

    @property
    def speed(self) -> float:
        """Samples a second in the middle step of those that count."""
        return statistics.median(self.speeds[SETTLING:])


def write_pairs(source: Path, folder: Path, count: int) -> Path:
    """JPEG files and a CSV of `count` photos, one caption each, which both sides read."""
    import pyarrow.parquet as pq

    generator = random.Random(0)
    table = pq.read_table(source, columns=["image", "captions"])
    if len(table) < count:
        sys.exit(f"error: {source} has {len(table)} photos, {count} are needed; take fewer --steps")
    rows = table.take(generator.sample(range(len(table)), count)).to_pylist()
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "caption"])
        for number, row in enumerate(rows):
            photo = folder / f"{number:05}.jpg"
            photo.write_bytes(row["image"]["bytes"])
            writer.writerow([photo, generator.choice(row["captions"])])
    return folder / "pairs.csv"


def run_ours(pairs: Path, out: Path, options: argparse.Namespace, precision: str) -> Curve:
    """`clipkit train`."""
    config = out / "config.toml"
    out.mkdir()
    config.write_text(
        f"""
[model]
name = "{options.model}"
[data]
train = "{pairs}"
held_out_share = 0.0
[augment]
crop_scale = [0.9, 1.0]
[optim]
warmup = {WARMUP / options.steps}
[train]
batch_size = {options.batch_size}
epochs = 1
precision = "{precision}"
eval_epochs = 0.0
save_epochs = 0.0
log_steps = 1
seed = {options.seed}
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "clipkit", "train", str(config), "--out", str(out / "run")]
    _run(command)
    steps = [line for line in read_log(out / "run") if "loss" in line]
    return Curve([s["samples_per_second"] for s in steps], [s["loss"] for s in steps])


def run_theirs(pairs: Path, out: Path, options: argparse.Namespace, precision: str) -> Curve:
    """`open_clip_train`."""
    settings = {
        "train-data": pairs,
        "dataset-type": "csv",
        "csv-img-key": "image",
        "csv-caption-key": "caption",
        "csv-separator": ",",
        "model": options.model,
        "batch-size": options.batch_size,
        "epochs": 1,
        "lr": 5e-4,
        "wd": 0.2,
        "warmup": WARMUP,
        "grad-clip-norm": 1.0,
        "precision": precision,
        "device": "cpu",
        "workers": options.workers,
        "seed": options.seed,
        "log-every-n-steps": 1,
        "save-frequency": 0,
        "logs": out,
        "name": "run",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    text = _run([sys.executable, "-m", "open_clip_train.main", *words])
    found = [(float(speed), float(loss)) for speed, loss in _LINE.findall(text)]
    return Curve([speed for speed, _ in found], [loss for _, loss in found])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


RUNNERS = {
    "clipkit": (run_ours, "auto"),
    "open_clip fp32": (run_theirs, "fp32"),
    "open_clip amp_bf16": (run_theirs, "amp_bf16"),
}


def show_ratios(curves: dict[str, list[Curve]]) -> None:
    """Samples a second of each, and ours over theirs round by round."""
    for name, rounds in curves.items():
        speeds = [curve.speed for curve in rounds]
        print(
            f"{name:20} {statistics.median(speeds):7.1f} samples/s "
            f"({min(speeds):.1f}–{max(speeds):.1f})"
        )
    for name, rounds in curves.items():
        if name != "clipkit":
            pairs = zip(curves["clipkit"], rounds, strict=True)
            ratios = [ours.speed / theirs.speed for ours, theirs in pairs]
            print(
                f"clipkit over {name:20} {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f}–{max(ratios):.2f})"
            )


def show_losses(curves: dict[str, list[Curve]], windows: int = 10) -> None:
    """The loss of the first round, mean over each tenth of the run, side by side."""
    steps = min(len(rounds[0].losses) for rounds in curves.values())
    width = max(1, steps // windows)
    print("\nsteps       " + "  ".join(f"{name:>20}" for name in curves))
    for start in range(0, steps - width + 1, width):
        means = [statistics.mean(r[0].losses[start : start + width]) for r in curves.values()]
        print(f"{start:4}–{start + width - 1:<6} " + "  ".join(f"{mean:20.3f}" for mean in means))


def main() -> None:
    """Run all in turn and print speeds, ratios and curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path, help="Parquet with images and captions")
    parser.add_argument("--model", default="ViT-S-32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="open_clip's loader processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(RUNNERS), nargs="*", default=list(RUNNERS))
    options = parser.parse_args()
    curves: dict[str, list[Curve]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "photos").mkdir()
        count = options.batch_size * options.steps
        pairs = write_pairs(options.pairs, folder / "photos", count)
        for number in range(options.rounds):
            for name in options.only:
                runner, precision = RUNNERS[name]
                curves[name].append(
                    runner(pairs, folder / f"{name.replace(' ', '-')}-{number}", options, precision)
                )
                print(f"round {number + 1}: {name} {curves[name][-1].speed:.1f} samples/s")
    if "clipkit" in curves:
        show_ratios(curves)
    show_losses(curves)


if __name__ == "__main__":
    main()
