"""The report of a training run, ``report.html``: collect its facts and render them as a page."""

import json
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

import torch

from clipkit import __version__
from clipkit.config import TrainConfig
from clipkit.data.open_source import Source
from clipkit.display.html import Figure, bullets, commands, document, figure_table
from clipkit.display.svg import Scale, Series, chart
from clipkit.models.checkpoint import run_checkpoints
from clipkit.models.tokenizer import CONTEXT, shorten
from clipkit.training.log import mean_chance_loss
from clipkit.training.loop import RunSummary
from clipkit.training.run_directory import SKIPPED_FILE

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunPage:
    """Content of a run's report.

    Attributes:
        title: heading.
        lead: sentence below the heading.
        tiles: key figures, name and value.
        notices: warnings: when, and what.
        recall: last recall on the held-out pairs.
        best: sentence about the best checkpoint; empty if there is none.
        lines: training log.
        chance_loss: loss of a uniform predictor; None if unknown.
        data: sentences about training data, truncation and held-out pairs.
        skipped: key and reason of the first skipped images; the file lists all.
        skipped_file: name of that file, for a link.
        settings: name, value and default of each field that is not at its default.
        commands: what to do with the run, and the command for it.
        footer: machine, date and versions.
    """

    title: str
    lead: str
    tiles: Sequence[tuple[str, str]]
    notices: Sequence[tuple[str, str]]
    recall: Sequence[Figure]
    best: str
    lines: Sequence[Line]
    chance_loss: float | None
    data: Sequence[str]
    skipped: Sequence[tuple[str, str]]
    skipped_file: str
    settings: Sequence[tuple[str, str, str]]
    commands: Sequence[tuple[str, str]]
    footer: str


_STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .7rem;
  margin: 1.4rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .7rem .9rem; } .tile b { display: block; font-size: 1.45rem; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); font-size: .85rem; }
.notice { background: var(--warn); border-left: 4px solid var(--amber); border-radius: 8px;
  padding: .6rem .9rem; margin: .5rem 0; max-width: 54rem; }
.notice b { color: var(--amber); margin-right: .4rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr));
  gap: 1.2rem; margin-top: 1rem; } .two { grid-template-columns: 1fr 1fr; }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
.charts p.soft { margin: 0; }
.wide { overflow-x: auto; } code, .settings td { overflow-wrap: anywhere; }
.settings td { font-family: ui-monospace, monospace; font-size: .85rem; }
@media (max-width: 40rem) { .charts { grid-template-columns: 1fr; } }
"""
_CURVES = (
    ("learning rate", "lr", Scale(low=0.0)),
    ("logit scale (1 / temperature)", "scale", Scale()),
    ("gradient norm before clipping", "grad_norm", Scale(log=True)),
    ("samples per second", "samples_per_second", Scale(low=0.0)),
    ("fraction of time waiting for data", "waiting_for_data", Scale(low=0.0, high=1.0)),
)


def render_run(page: RunPage) -> str:
    """The page as one self-contained HTML file without scripts, for light and dark mode."""
    return document(page.title, page.lead, _body(page), page.footer, _STYLE)


def _body(page: RunPage) -> str:
    return f"""{_tiles(page.tiles)}
<h2>Warnings</h2>
{_notices(page.notices)}
<h2>Held-out retrieval</h2>
{_recall(page)}
<h2>Training</h2>
{_curves(page)}
<h2>Data</h2>
{bullets(page.data)}
{_skipped(page)}
<h2>Settings other than defaults</h2>
{_settings(page.settings)}
<h2>Next steps</h2>
{commands(page.commands)}"""


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    shown = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in tiles
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _notices(notices: Sequence[tuple[str, str]]) -> str:
    if not notices:
        return '<p class="soft">No warnings.</p>'
    return "".join(
        f'<div class="notice"><b>{escape(when)}</b> {escape(text)}</div>' for when, text in notices
    )


def _recall(page: RunPage) -> str:
    measured = [line for line in page.lines if "held_out" in line]
    if not measured:
        return '<p class="soft">Recall was not measured on held-out pairs.</p>'
    charts = "".join(
        f"<div><h3>{name}</h3>"
        + chart(
            [
                Series(
                    f"R@{k}",
                    [(line["step"], line["held_out"][f"{key}_r{k}"]) for line in measured],
                )
                for k in (1, 5, 10)
            ],
            "step",
            Scale(low=0.0),
            small=True,
        )
        + "</div>"
        for key, name in (
            ("text_to_image", "text→image recall"),
            ("image_to_text", "image→text recall"),
        )
    )
    best = f"<p>{escape(page.best)}</p>" if page.best else ""
    best += (
        '<p class="soft">Measured during training, with the weights in training precision. '
        "Compare models by the figures of <code>clipkit eval retrieval</code>, which name their "
        "precision and have intervals.</p>"
    )
    return f'{figure_table(page.recall)}{best}<div class="charts two">{charts}</div>'


def _curves(page: RunPage) -> str:
    losses = [line for line in page.lines if "loss" in line]
    loss = Series("InfoNCE loss", [(line["step"], line["loss"]) for line in losses])
    small = "".join(
        f"<div><h3>{name}</h3>"
        + chart(
            [Series(name, [(line["step"], line[key]) for line in losses])],
            "step",
            scale,
            small=True,
        )
        + "</div>"
        for name, key, scale in _CURVES
    )
    level = ("chance", page.chance_loss)
    large = chart([loss], "step", Scale(low=0.0), level=level)
    return f'<h3>{loss.name}</h3>{large}<div class="charts">{small}</div>'


def _skipped(page: RunPage) -> str:
    if not page.skipped:
        return ""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(reason)}</td></tr>" for key, reason in page.skipped
    )
    return (
        f'<p class="soft">The first skipped images; the full list is in '
        f'<a href="{escape(page.skipped_file)}">{escape(page.skipped_file)}</a>:</p>'
        f'<div class="wide"><table class="settings"><tbody>{rows}</tbody></table></div>'
    )


def _settings(settings: Sequence[tuple[str, str, str]]) -> str:
    if not settings:
        return '<p class="soft">None.</p>'
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td><td>{escape(default)}</td></tr>"
        for name, value, default in settings
    )
    head = "<th>field</th><th>value</th><th>default</th>"
    return (
        f'<div class="wide"><table class="settings"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


REPORT_FILE = "report.html"
_EXAMPLES = 8
_DIRECTIONS = {
    "text_to_image": "text→image",
    "image_to_text": "image→text",
}


def run_page(
    config: TrainConfig, summary: RunSummary, training: Source, held_out: Source | None
) -> RunPage:
    """Collect the content of a run's report.

    Args:
        config: of the run, resolved.
        summary: state of the run.
        training: training pairs.
        held_out: held-out pairs; None if there are none.
    """
    pairs = training.count
    batch = min(config.train.batch_size, pairs or config.train.batch_size)
    warnings = [
        (f"step {line['step']:,}", line["warning"]) for line in summary.lines if "warning" in line
    ]
    return RunPage(
        title=f"Training run {summary.path.name}",
        lead=_lead(config, summary, batch, pairs),
        tiles=_run_tiles(summary),
        notices=[*(("before", finding) for finding in summary.findings), *warnings],
        recall=_recall_figures(summary.recall, held_out),
        best=_best(summary),
        lines=summary.lines,
        chance_loss=mean_chance_loss(summary.lines),
        data=_data(config, summary, pairs, held_out),
        skipped=list(summary.skipped.items())[:_EXAMPLES],
        skipped_file=SKIPPED_FILE,
        settings=changed_settings(config),
        commands=_commands(summary),
        footer=f"Generated on {date.today():%d %B %Y} by {machine()}.",
    )


def machine() -> str:
    """Versions and hardware as text."""
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


def _lead(config: TrainConfig, summary: RunSummary, batch: int, pairs: int | None) -> str:
    amount = "a stream" if pairs is None else f"{pairs:,} images"
    return (
        f"{summary.state.capitalize()} after {summary.step:,} steps of {batch:,} pairs in "
        f"{_duration(summary.seconds)}, on {amount} of {_spec(config)}."
    )


def _spec(config: TrainConfig) -> str:
    train = config.data.train
    return train if isinstance(train, str) else ", ".join(train)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _run_tiles(summary: RunSummary) -> list[tuple[str, str]]:
    losses = [line for line in summary.lines if "loss" in line]
    tiles = [("steps", f"{summary.step:,}")]
    finite = [line["loss"] for line in losses if math.isfinite(line["loss"])]
    if losses:
        tiles += [
            ("final loss", f"{finite[-1]:.3f}" if finite else "not finite"),
            ("samples per second", f"{_mean(losses, 'samples_per_second'):,.0f}"),
            ("waiting for data", f"{_mean(losses, 'waiting_for_data'):.0%}"),
        ]
    if summary.recall:
        tiles.append(("text→image R@1", f"{summary.recall['text_to_image_r1']:.1%}"))
    rollbacks = sum("rolled_back_to" in line for line in summary.lines)
    tiles.append(("skipped steps", f"{summary.skipped_steps:,}"))
    return [*tiles, ("rollbacks", str(rollbacks))] if rollbacks else tiles


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    return math.fsum(line[name] for line in lines) / len(lines)


def _recall_figures(recall: dict[str, float], held_out: Source | None) -> list[Figure]:
    if not recall or held_out is None:
        return []
    images = held_out.count
    return [
        Figure(
            f"{text} R@{k}",
            recall[f"{key}_r{k}"],
            min(1.0, k / images) if images else 0.0,
        )
        for key, text in _DIRECTIONS.items()
        for k in (1, 5, 10)
    ]


def _best(summary: RunSummary) -> str:
    if not summary.best:
        return ""
    return (
        f"The best {summary.best['metric']} was {summary.best['value']:.1%} at step "
        f"{summary.best['step']:,}; load its checkpoint as {summary.path.name}/best."
    )


def _data(
    config: TrainConfig, summary: RunSummary, pairs: int | None, held_out: Source | None
) -> list[str]:
    cut = summary.cut
    amount = "a stream of unknown length" if pairs is None else f"{pairs:,} images"
    facts = [f"Trained on {_spec(config)}: {amount}."]
    if summary.drawn:
        weights = config.data.weights or [1] * len(summary.drawn)
        facts.append(
            "Pairs drawn: "
            + ", ".join(
                f"{count:,} of {name} (weight {weight:g})"
                for (name, count), weight in zip(summary.drawn.items(), weights, strict=False)
            )
            + "."
        )
    if held_out is None:
        facts.append("There is no held-out set, so recall was not measured.")
    else:
        where = config.data.val or "a random part of the same data"
        count = "" if held_out.count is None else f" {held_out.count:,} images,"
        facts.append(f"Held-out set:{count} {where}.")
    if cut.seen:
        facts.append(
            f"{cut.cut:,} of {cut.seen:,} captions ({cut.share:.2%}) exceed {CONTEXT} tokens; "
            f"{cut.lost_tokens:,} tokens were truncated."
        )
    facts += [
        f"{case.needed} tokens, truncated: “{shorten(case.lost, 120)}”" for case in cut.worst[:3]
    ]
    facts.append(f"{len(summary.skipped):,} images were skipped.")
    return facts


def _quoted(text: str) -> str:
    """A string literal of Python and TOML."""
    return json.dumps(text, ensure_ascii=False)


def _commands(summary: RunSummary) -> list[tuple[str, str]]:
    name = summary.path.name
    run = shlex.quote(name)
    config = shlex.quote(f"{name}/config.toml")
    resume = (
        []
        if summary.state == "finished"
        else [("Resume it:", f"clipkit train {config} --out {run} --resume")]
    )
    saved = run_checkpoints(summary.path)
    if not saved:  # the run failed before the first checkpoint
        return resume
    return [
        *resume,
        (
            "Search images by text:",
            f"clipkit index build IMAGES --out INDEX --model {run}\n"
            'clipkit search INDEX "a red bicycle"',
        ),
        (
            "Classify images:",
            f'clipkit classify IMAGES --labels "cat,dog,tree" --model {run}',
        ),
        (
            "Load it in Python, with clipkit or with open_clip alone:",
            f"encoder = clipkit.load_model({_quoted(name)})\n"
            "model, _, preprocess = open_clip.create_model_and_transforms("
            f"{_quoted(f'local-dir:{name}/{saved[-1].name}')})",
        ),
    ]
