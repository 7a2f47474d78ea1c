"""The page of a measurement: pure functions from facts to HTML."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from clipkit.pages.chart import Scale, Series, chart
from clipkit.pages.classified import picture
from clipkit.pages.parts import bullets, commands, document, percent


@dataclass(frozen=True)
class Measured:
    """A figure with its 95 % interval; shares lie in [0, 1], others are numbers."""

    name: str
    meaning: str
    value: float
    low: float
    high: float
    share: bool = True


@dataclass(frozen=True)
class ClassRow:
    """How one class fares: its images, recall, precision, F1, area under its ROC curve."""

    name: str
    images: int
    recall: float
    precision: float
    f1: float
    auc: float


@dataclass(frozen=True)
class Confused:
    """Two classes: how many images of the first were taken for the second, and some of these."""

    truth: str
    taken_for: str
    count: int
    pictures: Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Miss:
    """A caption, the rank of its best image, and that image as key and JPEG."""

    caption: str
    rank: int
    key: str
    jpeg: bytes


@dataclass(frozen=True)
class EvaluationPage:
    """All that the page tells.

    Attributes:
        title: its heading.
        lead: what was asked, and the answer in a sentence.
        figures: what was measured.
        sections: headings with their HTML, made by the functions below.
        trust: what to keep in mind, in sentences.
        facts: names and values: model, data, settings.
        commands: how to measure again.
        footer: date and versions.
    """

    title: str
    lead: str
    figures: Sequence[Measured]
    sections: Sequence[tuple[str, str]]
    trust: Sequence[str]
    facts: Sequence[tuple[str, str]]
    commands: Sequence[tuple[str, str]]
    footer: str


_STYLE = """
.range { position: relative; height: 12px; min-width: 9rem; } .range i { position: absolute;
  top: 5px; height: 2px; background: var(--line); left: 0; right: 0; }
.range b { position: absolute; top: 3px; height: 6px; border-radius: 3px; opacity: .4;
  background: var(--blue); min-width: 2px; } .range u { position: absolute; top: 0; width: 3px;
  height: 12px; margin-left: -1px; border-radius: 2px; background: var(--blue); }
td small { color: var(--soft); display: block; max-width: 24rem; }
.wide { overflow-x: auto; } .matrix td { text-align: center; padding: .25rem .35rem;
  font-size: .8rem; border: 1px solid var(--line); } .matrix th { font-size: .75rem;
  padding: .2rem .4rem; } .matrix thead th { writing-mode: vertical-rl; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .8rem; } .pair img { width: 72px; height: 72px; object-fit: cover; border-radius: 8px;
  margin: .5rem .4rem 0 0; } .pair p { margin: 0; overflow-wrap: anywhere; font-size: .9rem; }
.facts td:last-child { overflow-wrap: anywhere; }
"""
MOST_IN_MATRIX = 25
"""Classes up to which the whole confusion matrix can be read on a screen."""


def render_evaluation(page: EvaluationPage) -> str:
    """The page as one HTML file: pictures inline, no script, nothing fetched, light and dark."""
    sections = "".join(f"<h2>{escape(name)}</h2>{html}" for name, html in page.sections)
    facts = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in page.facts
    )
    body = f"""<h2>What came out</h2>
{figures_table(page.figures)}
{sections}
<h2>What to trust</h2>
{bullets(page.trust)}
<h2>With what it was measured</h2>
<table class="facts"><tbody>{facts}</tbody></table>
<h2>The same again</h2>
{commands(page.commands)}"""
    return document(page.title, page.lead, body, page.footer, _STYLE)


def figures_table(figures: Sequence[Measured]) -> str:
    """Figures with their intervals, as numbers and as bars."""
    rows = "".join(
        f"<tr><td>{escape(one.name)}<small>{escape(one.meaning)}</small></td>"
        f'<td class="n"><b>{_shown(one.value, one.share)}</b></td>'
        f'<td class="n">{_shown(one.low, one.share)} – {_shown(one.high, one.share)}</td>'
        f'<td class="bar">{_range(one)}</td></tr>'
        for one in figures
    )
    head = '<th></th><th class="n">value</th><th class="n">95 % interval</th><th class="bar"></th>'
    return _table(head, rows)


def class_table(rows: Sequence[ClassRow]) -> str:
    """How each class fares, the worst first."""
    body = "".join(
        f'<tr><td>{escape(row.name)}</td><td class="n">{row.images}</td>'
        + "".join(
            f'<td class="n">{_shown(value, True)}</td>'
            for value in (row.recall, row.precision, row.f1, row.auc)
        )
        + "</tr>"
        for row in sorted(rows, key=lambda row: (row.f1, row.name))
    )
    names = ("images", "recall", "precision", "F1", "ROC-AUC")
    head = "<th>class</th>" + "".join(f'<th class="n">{name}</th>' for name in names)
    return _table(head, body)


def reliability_chart(points: Sequence[tuple[float, float]], scale: str) -> str:
    """The share that is right against the confidence; ``scale`` is a sentence about it."""
    lines = [Series("as it is", points), Series("as it should be", [(0.0, 0.0), (1.0, 1.0)])]
    drawing = chart(lines, "confidence", Scale(low=0.0, high=1.0))
    return f'<p class="soft">{escape(scale)}</p>{drawing}'


def recall_chart(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Recall@k over k, a curve for each direction."""
    return chart([Series(name, points) for name, points in curves], "k", Scale(low=0.0, high=1.0))


def confusion_table(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The confusion matrix: rows are what images show, columns what they were taken for."""
    if len(names) > MOST_IN_MATRIX:
        return (
            f'<p class="soft">With {len(names)} classes the whole matrix is too large to read; the '
            "pairs that are most often confused stand below.</p>"
        )
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(_cell(row, j) for j in range(len(names)))}</tr>"
        for name, row in zip(names, counts, strict=True)
    )
    head = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in names)
    return (
        '<p class="soft">Rows: what the images show. Columns: what they were taken for.</p>'
        f'<div class="wide"><table class="matrix"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def confused_pairs(pairs: Sequence[Confused]) -> str:
    """The pairs that are most often confused, with pictures."""
    if not pairs:
        return '<p class="soft">Not one image was taken for something else.</p>'
    return _cards(
        (
            f"<p><b>{escape(one.truth)}</b> taken for <b>{escape(one.taken_for)}</b>: "
            f"{one.count} images</p>",
            one.pictures,
        )
        for one in pairs
    )


def misses(found: Sequence[Miss]) -> str:
    """Captions whose image is farthest down the list."""
    return _cards(
        (f"<p>“{escape(one.caption)}”<br>rank {one.rank:,}</p>", [(one.key, one.jpeg)])
        for one in found
    )


def _cards(cards: Iterable[tuple[str, Sequence[tuple[str, bytes]]]]) -> str:
    shown = (
        f'<div class="pair">{text}{"".join(picture(jpeg, key) for key, jpeg in pictures)}</div>'
        for text, pictures in cards
    )
    return f'<div class="pairs">{"".join(shown)}</div>'


def _table(head: str, rows: str) -> str:
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cell(row: Sequence[int], column: int) -> str:
    share = 100 * row[column] / max(sum(row), 1)
    colour = f"background: color-mix(in srgb, var(--blue) {0.7 * share:.0f}%, transparent)"
    return f'<td style="{colour}">{row[column] or ""}</td>'


def _range(one: Measured) -> str:
    if not one.share or one.value != one.value:
        return ""
    left, right = 100 * max(0.0, one.low), 100 * min(1.0, one.high)
    return (
        f'<div class="range"><i></i><b style="left:{left:.1f}%;width:{right - left:.1f}%"></b>'
        f'<u style="left:{100 * one.value:.1f}%"></u></div>'
    )


def _shown(value: float, share: bool) -> str:
    if value != value:  # no number: there was nothing to measure
        return "–"
    return percent(value) if share else f"{value:,.4g}"
