"""A page of results that needs nothing beside it: pure functions from facts to HTML."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Figure:
    """A measured share in [0, 1] beside what guessing would reach."""

    name: str
    value: float
    chance: float


@dataclass(frozen=True)
class Picture:
    """A PNG with its name."""

    png: bytes
    name: str


@dataclass(frozen=True)
class Found:
    """What a search found: pictures with their scores, best first."""

    query: str
    hits: Sequence[tuple[Picture, float]]


@dataclass(frozen=True)
class Classified:
    """A picture and its likeliest labels with their probabilities; ``truth`` is the right one."""

    picture: Picture
    truth: str
    guesses: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Page:
    """All that the page tells.

    Attributes:
        title: its heading.
        lead: the sentence below it.
        figures: what was measured.
        curve: minutes and loss of the training.
        guessing_loss: the loss of a model that guesses.
        searches: queries and what they found.
        classified: pictures and their labels.
        commands: what each step does, and the command for it.
        notes: what to keep in mind.
        footer: machine, date, versions.
    """

    title: str
    lead: str
    figures: Sequence[Figure]
    curve: Sequence[tuple[float, float]]
    guessing_loss: float
    searches: Sequence[Found]
    classified: Sequence[Classified]
    commands: Sequence[tuple[str, str]]
    notes: Sequence[str]
    footer: str


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #626a76; --line: #dfe3e8; --ground: #fff;
  --card: #f6f7f9; --blue: #2563eb; --green: #15803d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa3b0; --line: #333a45;
  --ground: #14171c; --card: #1d2128; --blue: #6ea0ff; --green: #5ccb85; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 3rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; margin: 0 0 .6rem;
  letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .4rem; letter-spacing: -.01em; }
p { margin: .4rem 0 1rem; max-width: 46rem; }
.lead { font-size: 1.12rem; } .soft, footer, figcaption { color: var(--soft); }
table { border-collapse: collapse; width: 100%; max-width: 54rem; }
th, td { padding: .45rem .6rem .45rem 0; border-bottom: 1px solid var(--line); text-align: left; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.n b { font-size: 1.1rem; } td.bar { width: 26%; }
.track { background: var(--line); border-radius: 4px; height: 9px; overflow: hidden; }
.fill { background: var(--blue); height: 100%; } .right .fill { background: var(--green); }
svg { display: block; width: 100%; max-width: 54rem; height: auto; }
svg text { fill: var(--soft); font-size: 13px; }
.found { display: grid; grid-template-columns: 9.5rem 1fr; gap: .5rem 1rem; padding: .9rem 0;
  border-bottom: 1px solid var(--line); }
.query { font-weight: 600; font-size: 1.1rem; padding-top: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(8, 1fr); gap: .6rem .5rem; }
figure { margin: 0; font-size: .75rem; line-height: 1.25; text-align: center; }
img { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 4px;
  width: 100%; max-width: 82px; aspect-ratio: 1; }
figcaption { overflow-wrap: anywhere; margin-top: .2rem; }
.named img { border-color: var(--green); box-shadow: 0 0 0 2px var(--green); }
.named figcaption { color: var(--green); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .8rem; display: grid; grid-template-columns: 84px 1fr; gap: .8rem; }
.guess { display: grid; grid-template-columns: 5rem 1fr 2.6rem; gap: .5rem; align-items: center;
  font-size: .85rem; } .guess span:last-child { text-align: right; }
.right { font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow-x: auto;
  padding: .7rem .9rem; margin: .2rem 0 1rem; font-size: .88rem; }
li { margin: .35rem 0; max-width: 46rem; } footer { margin-top: 3rem; font-size: .85rem; }
@media (max-width: 48rem) { .found { grid-template-columns: 1fr; } .query { padding-top: 0; }
  .tiles { grid-template-columns: repeat(4, 1fr); } .cards { grid-template-columns: 1fr; } }
@media (max-width: 32rem) { td.bar, th.bar { display: none; } }
"""


def render_page(page: Page) -> str:
    """The page as one HTML file: pictures inline, no script, nothing fetched, light and dark."""
    searches = "".join(map(_search, page.searches))
    classified = "".join(map(_card, page.classified))
    commands = "".join(
        f"<p class=soft>{escape(what)}</p><pre><code>{escape(command)}</code></pre>"
        for what, command in page.commands
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in page.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(page.title)}</h1>
<p class="lead">{escape(page.lead)}</p>
<h2>Measured on the unseen style</h2>
{_table(page.figures)}
<h2>Training</h2>
{_curve(page.curve, page.guessing_loss)}
<h2>Searches by text</h2>
<p class="soft">The best pictures of the unseen style for each query, with their inner products; in
green the drawing that bears just this name, where there is one.</p>
{searches}
<h2>Zero-shot classification</h2>
<p class="soft">Pictures that were not picked by hand: the middle one of every other class. The
right label is green.</p>
<div class="cards">{classified}</div>
<h2>The same by hand</h2>
{commands}
<h2>What to trust</h2>
<ul>{notes}</ul>
<footer>{escape(page.footer)}</footer>
</body>
</html>
"""


def _table(figures: Iterable[Figure]) -> str:
    rows = "".join(
        f'<tr><td>{escape(f.name)}</td><td class="n"><b>{_percent(f.value)}</b></td>'
        f'<td class="bar">{_bar(f.value)}</td><td class="n">{_percent(f.chance)}</td></tr>'
        for f in figures
    )
    head = '<th></th><th class="n">model</th><th class="bar"></th><th class="n">chance</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def _bar(share: float) -> str:
    return f'<div class="track"><div class="fill" style="width:{100 * share:.1f}%"></div></div>'


def _image(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(picture.name)}">'


def _search(found: Found) -> str:
    tiles = "".join(
        f'<figure class="{_mark(picture, found)}">{_image(picture)}'
        f"<figcaption>{escape(picture.name)}<br>{score:.2f}</figcaption></figure>"
        for picture, score in found.hits
    )
    return (
        f'<div class="found"><div class="query">“{escape(found.query)}”</div>'
        f'<div class="tiles">{tiles}</div></div>'
    )


def _mark(picture: Picture, found: Found) -> str:
    return "named" if picture.name == found.query else "other"


def _card(item: Classified) -> str:
    guesses = "".join(
        f'<div class="guess{" right" if label == item.truth else ""}"><span>{escape(label)}</span>'
        f"{_bar(share)}<span>{share:.0%}</span></div>"
        for label, share in item.guesses
    )
    return (
        f'<div class="card"><figure>{_image(item.picture)}'
        f"<figcaption>{escape(item.picture.name)}</figcaption></figure><div>{guesses}</div></div>"
    )


def _curve(points: Sequence[tuple[float, float]], guessing: float) -> str:
    """The loss over the minutes as SVG, with a dashed line where guessing stands."""
    if not points:
        return '<p class="soft">The log holds no losses.</p>'
    width, height, left, bottom = 720, 260, 44, 34
    right_end, top = width - 12, 14
    most = 1.1 * max(guessing, *(loss for _, loss in points))
    end = max(points[-1][0], 1e-9)

    def place(minutes: float, loss: float) -> tuple[float, float]:
        x = left + (right_end - left) * minutes / end
        return x, height - bottom - (height - bottom - top) * loss / most

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    grid = "".join(
        f'<line x1="{left}" x2="{right_end}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>'
        for loss in range(int(most) + 1)
        for y in [place(0, loss)[1]]
    )
    ticks = "".join(
        f'<text x="{place(end * i / 5, 0)[0]:.1f}" y="{height - 12}" '
        f'text-anchor="{anchor}">{end * i / 5:.1f}{unit}</text>'
        for i, anchor, unit in [*((i, "middle", "") for i in range(5)), (5, "end", " min")]
    )
    chance = place(0, guessing)[1]
    return f"""<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over minutes">
{grid}{ticks}
<line x1="{left}" x2="{right_end}" y1="{chance:.1f}" y2="{chance:.1f}" stroke="var(--soft)"
 stroke-dasharray="5 5"/>
<text x="{right_end}" y="{chance - 6:.1f}" text-anchor="end">guessing</text>
<polyline points="{line}" fill="none" stroke="var(--blue)" stroke-width="2.2"
 stroke-linejoin="round"/>
<text x="{right_end}" y="{chance + 18:.1f}" text-anchor="end">InfoNCE loss of a batch</text>
</svg>"""
