"""Training speed and loss curves of clipkit and open_clip_train, in alternation, on the same files.

    python -m scripts.benchmarks.training.speed PAIRS.parquet --batch-size 64 --steps 12
    python -m scripts.benchmarks.training.speed PAIRS.parquet --steps 90 --rounds 1  # loss curves
    bash scripts/benchmarks/gpu.sh PAIRS.parquet  # batches of 4,096 on a GPU

Each run is a separate process that uses the project's own command line. Both train the same towers
from random weights with one caption per photo, the same learning rate at each step and the same
crops. Needs the `bench` extra.

If the table has fewer photos than batch size × steps, photos repeat with their next caption, and
captions repeat once all have been used. Each row is a separate file. clipkit then counts duplicates
as negatives, as open_clip always does.

The output also gives the share of the machine's fastest matrix product, measured just before. It
counts the FLOPs that the samples need: 2 per multiply-add forward, twice that backward, captions at
their real length. Extra work such as padding or a second forward pass does not count, and skipped
work is not subtracted.
"""

import argparse
import re
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clipkit.training.log import read_log
from scripts.benchmarks.common.flops import matrix_peaks, share_of_peak, training_flops
from scripts.benchmarks.common.timing import ratios, run_command, spread
from scripts.benchmarks.training.pairs import write_pairs

WARMUP = 5  # steps
SETTLING = 2  # untimed steps at the start, while threads, caches and workers start up
_LINE = re.compile(r"Batch \(t\): [\d.]+, ([\d.]+)/s.* Loss: ([\d.]+)")


@dataclass(frozen=True)
class Curve:
    """Throughput and loss of a run, step by step, and the precision it used.

    Attributes:
        speeds: samples/s.
        losses: training loss.
        precision: "fp32" or "bf16".
        counted: the timed steps: the last epoch without the settling steps.
        waited: share of the timed steps spent waiting for data, if known.
    """

    speeds: list[float]
    losses: list[float]
    precision: str
    counted: slice
    waited: float | None = None

    @property
    def speed(self) -> float:
        """Median samples/s of the timed steps."""
        return statistics.median(self.speeds[self.counted])


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
val_fraction = 0.0
[augment]
crop_scale = [0.9, 1.0]
[optim]
warmup = {WARMUP / (options.steps * options.epochs)}
[train]
batch_size = {options.batch_size}
micro_batch_size = {options.chunk_size}
epochs = {options.epochs}
precision = "{precision}"
duplicates = "{options.duplicates}"
eval_every_epochs = 0.0
save_every_epochs = 0.0
log_every_steps = 1
seed = {options.seed}
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "clipkit", "train", str(config), "--out", str(out / "run")]
    command += [word for setting in options.set for word in ("--set", setting)]
    run_command(command, environment(options))
    steps = [line for line in read_log(out / "run") if "loss" in line]
    resolved = tomllib.loads((out / "run" / "config.toml").read_text(encoding="utf-8"))
    counted = counted_steps(options)
    return Curve(
        [step["samples_per_second"] for step in steps],
        [step["loss"] for step in steps],
        resolved["train"]["precision"],
        counted,
        statistics.mean(step["waiting_for_data"] for step in steps[counted]),
    )


def run_theirs(pairs: Path, out: Path, options: argparse.Namespace, precision: str) -> Curve:
    """`open_clip_train`, with gradient accumulation for micro-batches."""
    micro_batch = options.their_chunk_size or options.batch_size
    settings = {
        "train-data": pairs,
        "dataset-type": "csv",
        "csv-img-key": "image",
        "csv-caption-key": "caption",
        "csv-separator": ",",
        "model": options.model,
        "batch-size": micro_batch,
        "accum-freq": options.batch_size // micro_batch,
        "epochs": options.epochs,
        "lr": 5e-4,
        "wd": 0.2,
        "warmup": WARMUP,
        "grad-clip-norm": 1.0,
        "precision": precision,
        "device": options.device,
        "workers": options.workers,
        "seed": options.seed,
        "log-every-n-steps": 1,
        "save-frequency": 0,
        "logs": out,
        "name": "run",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    text = run_command([sys.executable, "-m", "open_clip_train.main", *words], environment(options))
    found = [(float(speed), float(loss)) for speed, loss in _LINE.findall(text[1])]
    speeds, losses = ([one[i] for one in found] for i in (0, 1))
    return Curve(speeds, losses, precision.removeprefix("amp_"), counted_steps(options))


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Environment variables of both: a run on the CPU sees no GPU."""
    return {} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}


def counted_steps(options: argparse.Namespace) -> slice:
    """The timed steps: those of the last epoch, when caches are full and start-up is over."""
    return slice((options.epochs - 1) * options.steps + (options.epochs == 1) * SETTLING, None)


RUNNERS = {
    "clipkit": (run_ours, "auto"),
    "open_clip fp32": (run_theirs, "fp32"),
    "open_clip amp_bf16": (run_theirs, "amp_bf16"),
}


def show_ratios(curves: dict[str, list[Curve]], work: float, peaks: dict[str, float]) -> None:
    """Print samples/s, the share of the peak, and clipkit's speed relative to each peer.

    Args:
        curves: one per round, by runner.
        work: FLOPs per sample.
        peaks: FLOP/s of matrix products, by precision.
    """
    for name, rounds in curves.items():
        speeds = [curve.speed for curve in rounds]
        middle = statistics.median(speeds)
        waited = [curve.waited for curve in rounds if curve.waited is not None]
        print(
            f"{name:20} {middle:8.1f} samples/s ({min(speeds):.1f}–{max(speeds):.1f}), "
            f"{share_of_peak(middle * work, peaks, rounds[0].precision)}"
            + (f", {statistics.mean(waited):.0%} of the time waiting for data" if waited else "")
        )
    for name, rounds in curves.items():
        if name != "clipkit" and "clipkit" in curves:
            ours, theirs = ([curve.speed for curve in runs] for runs in (curves["clipkit"], rounds))
            print(f"clipkit relative to {name:20} {spread(ratios(ours, theirs))}")


def show_losses(curves: dict[str, list[Curve]], windows: int = 10) -> None:
    """Print the mean loss over each tenth of the first round, side by side."""
    steps = min(len(rounds[0].losses) for rounds in curves.values())
    width = max(1, steps // windows)
    print("\nsteps       " + "  ".join(f"{name:>20}" for name in curves))
    for start in range(0, steps - width + 1, width):
        means = [statistics.mean(r[0].losses[start : start + width]) for r in curves.values()]
        print(f"{start:4}–{start + width - 1:<6} " + "  ".join(f"{mean:20.3f}" for mean in means))


def work_of(model: str, captions: Sequence[str]) -> float:
    """FLOPs of one sample in a training step, with captions at their real length."""
    from clipkit.config import parse_config
    from clipkit.models.tokenizer import TruncationReport, tokenize
    from clipkit.training.build import build_towers

    clip = build_towers(parse_config({"model": {"name": model}}).model, 0.07, seed=0).clip
    lengths = tokenize(captions, report=TruncationReport()).argmax(axis=1) + 1
    work = training_flops(clip, lengths.tolist())
    print(f"mean caption length {lengths.mean():.1f} tokens; {work / 1e9:.1f} GFLOP per sample")
    return work


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options, by default from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path, help="Parquet file with images and captions")
    parser.add_argument("--model", default="ViT-S-32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12, help="steps per epoch")
    parser.add_argument(
        "--epochs", type=int, default=1, help="number of epochs; only the last one is timed"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument(
        "--chunk-size",
        type=int,
        default=0,
        help="pairs that clipkit encodes at once; 0: the whole batch",
    )
    parser.add_argument(
        "--their-chunk-size", type=int, default=0, help="pairs that open_clip encodes at once"
    )
    parser.add_argument("--workers", type=int, default=2, help="loader processes of open_clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        help="a setting for clipkit, such as data.image_cache=yes",
    )
    parser.add_argument("--only", choices=list(RUNNERS), nargs="*", default=list(RUNNERS))
    options = parser.parse_args(words)
    if options.their_chunk_size and options.batch_size % options.their_chunk_size:
        parser.error("--batch-size must be a multiple of --their-chunk-size")
    return options


def main() -> None:
    """Alternate the runs, then print speeds, ratios and loss curves."""
    options = parse()
    curves: dict[str, list[Curve]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "photos").mkdir()
        count = options.batch_size * options.steps
        pairs, captions, repeats = write_pairs(options.pairs, folder / "photos", count)
        options.duplicates = "ignore" if repeats else "mask"
        work = work_of(options.model, captions)
        peaks = matrix_peaks(5, options.device)
        for number in range(options.rounds):
            for name in options.only:
                runner, precision = RUNNERS[name]
                curves[name].append(
                    runner(pairs, folder / f"{name.replace(' ', '-')}-{number}", options, precision)
                )
                print(f"round {number + 1}: {name} {curves[name][-1].speed:.1f} samples/s")
    show_ratios(curves, work, peaks)
    show_losses(curves)


if __name__ == "__main__":
    main()
