"""Training time to a target text→image recall on the demo's data: clipkit and open_clip_train.

    python -m scripts.benchmarks.training.time_to_quality --epochs 10
    python -m scripts.benchmarks.training.time_to_quality --epochs 10 --only clipkit

Both train the demo's towers on the demo's drawings, one after the other. They read the same PNG
files and CSV file, with the same batch size, learning rates and crops. clipkit then evaluates the
checkpoint of each epoch on drawings in an unseen style. Only training time counts. Needs the `demo`
and `bench` extras.
"""

import argparse
import csv
import json
import re
import sys
import tempfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from clipkit.artifacts import write_json
from clipkit.config import TrainConfig, dump_config
from clipkit.demo.emoji import write_sets
from clipkit.demo.run import recipe
from clipkit.models.checkpoint import CONFIG, WEIGHTS
from clipkit.training.build import build_towers
from clipkit.training.run_directory import read_log
from scripts.benchmarks.common.timing import run_command

METRIC = "text_to_image_r1"
Points = list[tuple[float, float]]
_START = re.compile(r"^(\S+) \| INFO \| Start epoch 0", re.MULTILINE)
_LINE = re.compile(r"^(\S+) \| INFO \| Train Epoch: (\d+) ", re.MULTILINE)


def write_pairs(folder: Path) -> tuple[Path, Path]:
    """Write the drawings as PNG files with a CSV file of names, and the unseen ones as Parquet."""
    import pyarrow.parquet as pq

    write_sets(folder / "train.parquet", folder / "unseen.parquet")
    rows = pq.read_table(folder / "train.parquet").to_pylist()
    (folder / "drawings").mkdir()
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "caption"])
        for number, row in enumerate(rows):
            file = folder / "drawings" / f"{number:05}.png"
            file.write_bytes(row["image"])
            writer.writerow([file, row["captions"][0]])
    return folder / "pairs.csv", folder / "unseen.parquet"


def measure(checkpoint: Path, unseen: Path) -> float:
    """Recall of a checkpoint on the unseen drawings."""
    command = ["eval", "retrieval", str(unseen), "--model", str(checkpoint), "--json"]
    printed = run_command([sys.executable, "-m", "clipkit", *command])[0]
    return float(json.loads(printed.strip().splitlines()[-1])[METRIC])


def run_ours(config: TrainConfig, unseen: Path, out: Path) -> Points:
    """`clipkit train`: training seconds and recall after each epoch."""
    out.mkdir()
    (out / "config.toml").write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-m", "clipkit", "train", str(out / "config.toml")]
    run_command([*command, "--out", str(out / "run")])
    seconds = {line["step"]: line["seconds"] for line in read_log(out / "run") if "loss" in line}
    steps = sorted(int(path.name[5:]) for path in (out / "run").glob("step-*"))
    return [(seconds[step], measure(out / "run" / f"step-{step}", unseen)) for step in steps]


def run_theirs(
    config: TrainConfig, pairs: Path, unseen: Path, out: Path, words: list[str]
) -> Points:
    """`open_clip_train` with the same towers: training seconds and recall after each epoch."""
    from safetensors.torch import save_file
    from torch import load

    towers = build_towers(config.model, config.optim.temperature, config.train.seed)
    settings = {"model_cfg": towers.model_config, "preprocess_cfg": towers.preprocess}
    out.mkdir()
    write_json(out / CONFIG, settings)
    low, high = config.augment.crop_scale
    command = [sys.executable, "-m", "open_clip_train.main", "--model", f"local-dir:{out}"]
    command += ["--train-data", str(pairs), "--dataset-type", "csv", "--csv-separator", ","]
    command += ["--csv-img-key", "image", "--csv-caption-key", "caption", "--device", "cpu"]
    command += ["--batch-size", str(config.train.batch_size), "--epochs", str(config.train.epochs)]
    command += ["--lr", str(config.optim.lr), "--wd", str(config.optim.weight_decay)]
    command += ["--beta1", "0.9", "--beta2", "0.98", "--eps", "1e-6", "--grad-clip-norm", "1.0"]
    command += ["--aug-cfg", f"scale=({low}, {high})", f"ratio={config.augment.crop_ratio}"]
    command += ["--logs", str(out), "--name", "run", "--log-every-n-steps", "10", *words]
    text = run_command(command)[1]
    start = datetime.fromisoformat(_START.findall(text)[0].replace(",", "T"))
    ends = {int(epoch): stamp for stamp, epoch in _LINE.findall(text)}
    points = []
    for epoch, stamp in sorted(ends.items()):
        saved = load(out / "run" / "checkpoints" / f"epoch_{epoch + 1}.pt", weights_only=True)
        folder = out / f"epoch-{epoch + 1}"
        folder.mkdir()
        write_json(folder / CONFIG, settings)
        weights = {name: tensor.contiguous() for name, tensor in saved["state_dict"].items()}
        save_file(weights, folder / WEIGHTS)
        seconds = (datetime.fromisoformat(stamp.replace(",", "T")) - start).total_seconds()
        points.append((seconds, measure(folder, unseen)))
    return points


def show(curves: dict[str, Points], target: float) -> None:
    """Print both curves and when each reached the target."""
    reached = {}
    for name, points in curves.items():
        print(f"\n{name}: epoch, training seconds, {METRIC}")
        for epoch, (seconds, recall) in enumerate(points, 1):
            print(f"{epoch:5} {seconds:8.0f} {recall:8.3f}")
        reached[name] = next((seconds for seconds, recall in points if recall >= target), None)
        when = f"after {reached[name]:.0f} s" if reached[name] else "not reached"
        print(f"{METRIC} ≥ {target:g}: {when}")
    ours, theirs = reached.get("clipkit"), reached.get("open_clip")
    if ours and theirs:
        print(f"\nratio {theirs / ours:.2f}")


def main() -> None:
    """Train one after the other and print when each reached the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="epochs to train")
    parser.add_argument("--target", type=float, default=0.5, help="recall to reach")
    parser.add_argument("--only", choices=["clipkit", "open_clip"])
    parser.add_argument("--precision", default="amp_bf16", help="precision of open_clip")
    parser.add_argument("--workers", default="2", help="loader processes of open_clip")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pairs, unseen = write_pairs(folder)
        config = recipe(pairs, unseen, minutes=0.0)
        data = replace(config.data, val="", val_fraction=0.0)
        train = replace(
            config.train,
            epochs=options.epochs,
            save_every_epochs=1.0,
            keep_last=options.epochs,
            log_every_steps=1,
            minutes=0.0,
        )
        config = replace(config, data=data, train=train)
        curves: dict[str, Points] = {}
        if options.only != "open_clip":
            curves["clipkit"] = run_ours(config, unseen, folder / "ours")
        if options.only != "clipkit":
            per_epoch = sum(1 for _ in pairs.open(encoding="utf-8")) // config.train.batch_size
            warmup = round(config.optim.warmup * options.epochs * per_epoch)
            words = ["--warmup", str(warmup), "--workers", options.workers]
            words += ["--precision", options.precision, "--opt", open_clip_name(config)]
            curves["open_clip"] = run_theirs(config, pairs, unseen, folder / "theirs", words)
    show(curves, options.target)


def open_clip_name(config: TrainConfig) -> str:
    """The name of the optimiser in `open_clip_train`."""
    return "adamw" if config.optim.name == "adamw" else f"timm/{config.optim.name}"


if __name__ == "__main__":
    main()
