"""The page of a training run: pure functions from facts to HTML.

The report of a run, ``report.html``: from what a run knows to its page.
"""

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
from clipkit.training.log import mean_guess
from clipkit.training.loop import Outcome
from clipkit.training.run_directory import SKIPPED_FILE

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunPage:
    """All that the page of a run tells.

    Attributes:
        title: its heading.
        lead: the sentence below it.
        tiles: what counts most, name and value.
        notices: when something was doubtful, and what.
        recall: what was measured last on the held-out pairs.
        best: a sentence about the best measurement; empty if there was none.
        lines: of the log.
        guessing_loss: the loss of a model that guesses; None where it is not known.
        data: sentences about what was trained on, cut and held out.
        skipped: a few keys and reasons of images that were not used; the rest is in the file.
        skipped_file: its name, for a link.
        settings: name, value and default of each field that differs from it.
        commands: what to do with the run, and the command for it.
        footer: machine, date, versions.
    """

    title: str
    lead: str
    tiles: Sequence[tuple[str, str]]
    notices: Sequence[tuple[str, str]]
    recall: Sequence[Figure]
    best: str
    lines: Sequence[Line]
    guessing_loss: float | None
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
    ("share of time waiting for data", "waiting_for_data", Scale(low=0.0, high=1.0)),
)


def render_run(page: RunPage) -> str:
    """The page as one HTML file: no script, nothing fetched, light and dark."""
    return document(page.title, page.lead, _body(page), page.footer, _STYLE)


def _body(page: RunPage) -> str:
    return f"""{_tiles(page.tiles)}
<h2>What to look at</h2>
{_notices(page.notices)}
<h2>Held-out retrieval</h2>
{_recall(page)}
<h2>Training</h2>
{_curves(page)}
<h2>Data</h2>
{bullets(page.data)}
{_skipped(page)}
<h2>Settings that differ from the defaults</h2>
{_settings(page.settings)}
<h2>How to use it</h2>
{commands(page.commands)}"""


def _tiles(tiles: Sequence[tuple[str, str]]) -> str:
    shown = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in tiles
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _notices(notices: Sequence[tuple[str, str]]) -> str:
    if not notices:
        return '<p class="soft">Nothing doubtful was found, before the run or during it.</p>'
    return "".join(
        f'<div class="notice"><b>{escape(when)}</b> {escape(text)}</div>' for when, text in notices
    )


def _recall(page: RunPage) -> str:
    measured = [line for line in page.lines if "held_out" in line]
    if not measured:
        return '<p class="soft">Nothing was measured on held-out pairs.</p>'
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
            ("text_to_image", "a caption finds its image"),
            ("image_to_text", "an image finds one of its captions"),
        )
    )
    best = f"<p>{escape(page.best)}</p>" if page.best else ""
    return f'{figure_table(page.recall)}{best}<div class="charts two">{charts}</div>'


def _curves(page: RunPage) -> str:
    losses = [line for line in page.lines if "loss" in line]
    loss = Series("InfoNCE loss of a batch", [(line["step"], line["loss"]) for line in losses])
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
    level = ("guessing", page.guessing_loss)
    large = chart([loss], "step", Scale(low=0.0), level=level)
    return f'<h3>{loss.name}</h3>{large}<div class="charts">{small}</div>'


def _skipped(page: RunPage) -> str:
    if not page.skipped:
        return ""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(reason)}</td></tr>" for key, reason in page.skipped
    )
    return (
        f'<p class="soft">Images that were not used, the first of them; all are in '
        f'<a href="{escape(page.skipped_file)}">{escape(page.skipped_file)}</a>:</p>'
        f'<div class="wide"><table class="settings"><tbody>{rows}</tbody></table></div>'
    )


def _settings(settings: Sequence[tuple[str, str, str]]) -> str:
    if not settings:
        return '<p class="soft">None do.</p>'
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td><td>{escape(default)}</td></tr>"
        for name, value, default in settings
    )
    head = "<th>field</th><th>here</th><th>default</th>"
    return (
        f'<div class="wide"><table class="settings"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


REPORT_FILE = "report.html"
_EXAMPLES = 8
_DIRECTIONS = {
    "text_to_image": "a caption finds its image",
    "image_to_text": "an image finds one of its captions",
}


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
        tiles=_run_tiles(outcome),
        notices=[*(("before", finding) for finding in outcome.findings), *alarms],
        recall=_recall_figures(outcome.recall, held_out),
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


def _run_tiles(outcome: Outcome) -> list[tuple[str, str]]:
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


def _recall_figures(recall: dict[str, float], held_out: Source | None) -> list[Figure]:
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
        where = config.data.val or "taken from the same data"
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
            f"encoder = clipkit.load_model({_quoted(name)})\n"
            "model, _, preprocess = open_clip.create_model_and_transforms("
            f"{_quoted(f'local-dir:{name}/{saved[-1].name}')})",
        ),
    ]
