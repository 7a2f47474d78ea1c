"""Runs of a tiny network on a folder of pictures, and what they leave behind."""

import json

import torch
from safetensors.torch import load_file

from clipkit.artifacts import read_manifest
from clipkit.config import parse_config
from clipkit.training.run_directory import read_log
from tests.helpers.models import tiny_model

WEIGHTS = "open_clip_model.safetensors"


def configured(folder, **sections):
    """Settings of a short run on a folder; others replace the sections' own."""
    settings = {
        "model": tiny_model(),
        "data": {"train": str(folder), "val_fraction": 0.25, "workers": 1},
        "optim": {"lr": 3e-3, "warmup": 0.1},
        "train": {"batch_size": 3, "epochs": 4, "precision": "fp32", "log_every_steps": 1},
    }
    for name, values in sections.items():
        settings[name] = settings[name] | values
    return parse_config(settings)


def curve(run):
    """The log without what depends on the clock."""
    clock = ("seconds", "samples_per_second", "waiting_for_data")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_log(run)]


def last_weights(run):
    """The weights of the last checkpoint."""
    steps = sorted(run.glob("step-*"), key=lambda p: int(p.name[5:]))
    return load_file(steps[-1] / WEIGHTS)


def assert_same_run(one, other):
    """Equal logs, and equal weights bit for bit."""
    assert curve(one) == curve(other)
    ours, theirs = last_weights(one), last_weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def facts(run):
    """What the run says of itself at its end, but for the clock."""
    detail = read_manifest(run, "run").detail
    listed = (run / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {k: v for k, v in detail.items() if k != "seconds"}, list(map(json.loads, listed))


def steps(run):
    """The steps of its checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def uncropped(folder, model, **sections):
    """A run that sees pictures as they are; other settings replace the sections' own."""
    config = {
        "model": model,
        "data": {"train": str(folder), "val_fraction": 0.25, "workers": 1},
        "augment": {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]},
        # Where a gradient is zero but for rounding, a small epsilon would blow the rounding up.
        "optim": {"lr": 3e-3, "warmup": 0.1, "eps": 1e-4},
        "train": {"batch_size": 3, "epochs": 4, "precision": "fp32", "log_every_steps": 1},
    }
    for name, values in sections.items():
        config[name] = config[name] | values
    return parse_config(config)


LINES = [
    {"step": 10, "loss": 4.0},
    {"step": 20, "loss": 3.0},
    {
        "step": 20,
        "held_out": {
            f"{way}_r{k}": 0.1 * k for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)
        },
    },
]
