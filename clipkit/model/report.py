"""The report of a run, ``report.html``: from what a run knows to its page."""

import json
import math
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from clipkit import __version__
from clipkit.config import TrainConfig
from clipkit.data.sources import Source
from clipkit.model.load import run_checkpoints
from clipkit.model.log import mean_guess
from clipkit.model.run import SKIPPED_FILE
from clipkit.model.tokenizer import CONTEXT, CutReport, shorten
from clipkit.pages.parts import Figure
from clipkit.pages.run import RunPage

REPORT_FILE = "report.html"
_EXAMPLES = 8
_DIRECTIONS = {
    "text_to_image": "a caption finds its image",
    "image_to_text": "an image finds one of its captions",
}


@dataclass(frozen=True)
class Outcome:
    """What a run came to, so far.

    Attributes:
        path: its directory.
        state: how it ended: finished, interrupted, or why it failed.
        step, seconds: how far it came.
        findings: what was doubtful before it started.
        recall, best: what was measured last, and best.
        lines: of its log.
        cut: what 77 tokens cut.
        skipped: why images could not be used, by key.
        skipped_steps: steps without a finite gradient.
    """

    path: Path
    state: str
    step: int
    seconds: float
    findings: Sequence[str]
    recall: dict[str, float]
    best: dict[str, Any]
    lines: Sequence[dict[str, Any]]
    cut: CutReport
    skipped: dict[str, str]
    skipped_steps: int


def run_page(
    config: TrainConfig, outcome: Outcome, training: Source, held_out: Source | None
) -> RunPage:
    """The page of a run.

    Args:
        config: of the run, resolved.
        outcome: what it came to.
        training, held_out: what it was trained and measured on.
    """
    pairs = None if training.streaming else len(training.rows)
    batch = min(config.train.batch_size, pairs or config.train.batch_size)
    alarms = [
        (f"step {line['step']:,}", line["alarm"]) for line in outcome.lines if "alarm" in line
    ]
    return RunPage(
        title=f"Training run {outcome.path.name}",
        lead=_lead(config, outcome, batch, pairs),
        tiles=_tiles(outcome),
        notices=[*(("before", finding) for finding in outcome.findings), *alarms],
        recall=_recall(outcome.recall, held_out),
        best=_best(outcome),
        lines=outcome.lines,
        guessing_loss=mean_guess(outcome.lines),
        data=_data(config, outcome, pairs, held_out),
        skipped=list(outcome.skipped.items())[:_EXAMPLES],
        skipped_file=SKIPPED_FILE,
        settings=changed_settings(config),
        commands=_commands(outcome),
        footer=f"Made on {date.today():%d %B %Y} by {machine()}.",
    )


def machine() -> str:
    """Versions and hardware, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"clipkit {__version__} with torch {torch.__version__} and Python "
        f"{platform.python_version()} on {_processor()}: {os.cpu_count()} CPU cores "
        f"({torch.get_num_threads()} used by torch), {device}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def changed_settings(config: TrainConfig) -> list[tuple[str, str, str]]:
    """Name, value and default of each field that is not at its default."""
    mine, defaults = asdict(config), asdict(TrainConfig())
    return [
        (f"{section}.{name}", _shown(value), _shown(defaults[section][name]))
        for section, fields in mine.items()
        for name, value in fields.items()
        if value != defaults[section][name]
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {item}" for key, item in value.items()) or "none"
    return str(value) if value != "" else "none"


def _lead(config: TrainConfig, outcome: Outcome, batch: int, pairs: int | None) -> str:
    amount = "a stream" if pairs is None else f"{pairs:,} images"
    return (
        f"{outcome.state.capitalize()} after {outcome.step:,} steps of {batch:,} pairs in "
        f"{_duration(outcome.seconds)}, on {amount} of {config.data.train}."
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _tiles(outcome: Outcome) -> list[tuple[str, str]]:
    losses = [line for line in outcome.lines if "loss" in line]
    tiles = [("steps", f"{outcome.step:,}")]
    finite = [line["loss"] for line in losses if math.isfinite(line["loss"])]
    if losses:
        tiles += [
            ("loss at the end", f"{finite[-1]:.3f}" if finite else "not finite"),
            ("samples per second", f"{_mean(losses, 'samples_per_second'):,.0f}"),
            ("waiting for data", f"{_mean(losses, 'waiting_for_data'):.0%}"),
        ]
    if outcome.recall:
        tiles.append(("caption → image R@1", f"{outcome.recall['text_to_image_r1']:.1%}"))
    returns = sum("back_to" in line for line in outcome.lines)
    tiles.append(("steps left out", f"{outcome.skipped_steps:,}"))
    return [*tiles, ("times gone back", str(returns))] if returns else tiles


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    return math.fsum(line[name] for line in lines) / len(lines)


def _recall(recall: dict[str, float], held_out: Source | None) -> list[Figure]:
    if not recall or held_out is None:
        return []
    images = None if held_out.streaming else len(held_out.rows)
    return [
        Figure(
            f"{text}, {'first' if k == 1 else f'in the best {k}'}",
            recall[f"{key}_r{k}"],
            min(1.0, k / images) if images else 0.0,
        )
        for key, text in _DIRECTIONS.items()
        for k in (1, 5, 10)
    ]


def _best(outcome: Outcome) -> str:
    if not outcome.best:
        return ""
    return (
        f"The best {outcome.best['metric']} was {outcome.best['value']:.1%} at step "
        f"{outcome.best['step']:,}; its checkpoint is kept and loads as {outcome.path.name}/best."
    )


def _data(
    config: TrainConfig, outcome: Outcome, pairs: int | None, held_out: Source | None
) -> list[str]:
    cut = outcome.cut
    amount = "a stream, whose length is not known" if pairs is None else f"{pairs:,} images"
    facts = [f"Trained on {config.data.train}: {amount}."]
    if held_out is None:
        facts.append("Nothing was held out, so nothing was measured.")
    else:
        where = config.data.held_out or "taken from the same data"
        count = "" if held_out.streaming else f" {len(held_out.rows):,} images,"
        facts.append(f"Held out:{count} {where}.")
    if cut.seen:
        facts.append(
            f"{cut.cut:,} of {cut.seen:,} captions ({cut.share:.2%}) were longer than {CONTEXT} "
            f"tokens; {cut.lost_tokens:,} tokens were not read."
        )
    facts += [
        f"{case.needed} tokens, not read: “{shorten(case.lost, 120)}”" for case in cut.worst[:3]
    ]
    facts.append(f"{len(outcome.skipped):,} images were skipped.")
    return facts


def _quoted(text: str) -> str:
    """A text as Python and TOML write it."""
    return json.dumps(text, ensure_ascii=False)


def _commands(outcome: Outcome) -> list[tuple[str, str]]:
    name = outcome.path.name
    run = shlex.quote(name)
    config = shlex.quote(f"{name}/config.toml")
    goes_on = (
        []
        if outcome.state == "finished"
        else [("Go on with it:", f"clipkit train {config} --out {run} --resume")]
    )
    saved = run_checkpoints(outcome.path)
    if not saved:  # given up before there was anything to load
        return goes_on
    return [
        *goes_on,
        (
            "Search pictures by text:",
            f"clipkit index build PICTURES --out INDEX --model {run}\n"
            'clipkit search INDEX "a red bicycle"',
        ),
        (
            "Classify pictures:",
            f'clipkit classify PICTURES --labels "cat,dog,tree" --model {run}',
        ),
        (
            "In Python, with clipkit and with open_clip alone:",
            f"encoder = clipkit.load({_quoted(name)})\n"
            "model, _, preprocess = open_clip.create_model_and_transforms("
            f"{_quoted(f'local-dir:{name}/{saved[-1].name}')})",
        ),
    ]
