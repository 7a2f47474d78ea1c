"""The page of a training run: pure functions from facts to HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from clipkit.pages.chart import Scale, Series, chart
from clipkit.pages.parts import Figure, bullets, commands, document, figure_table

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
