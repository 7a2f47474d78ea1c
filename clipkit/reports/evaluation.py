"""The page of a measurement: pure functions from facts to HTML.

A measurement as a page for someone who was not there.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np

from clipkit import __version__
from clipkit.artifacts import write_text
from clipkit.data.open_source import Source, row_image
from clipkit.display.html import bullets, commands, document, percent
from clipkit.display.svg import Scale, Series, chart
from clipkit.display.thumbnails import thumbnail
from clipkit.errors import ImageError
from clipkit.evaluation.calibration import reliability
from clipkit.evaluation.classification import per_class
from clipkit.evaluation.report import Classification, Report, Retrieval
from clipkit.reports.classification import picture


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


_PAIRS, _PICTURES, _MISSES = 12, 3, 12
_CURVE = 50  # ranks up to which recall is drawn
_DIRECTIONS = {
    "text_to_image": "a caption finds its image",
    "image_to_text": "an image finds one of its captions",
}
_MEANINGS = {
    "top1": "the likeliest label is right",
    "top5": "the right label is among the five likeliest",
    "mean_per_class": "mean of the classes' own accuracies: balanced accuracy",
    "macro_precision": "of what was called a class, the share that is; mean over the classes",
    "macro_f1": "harmonic mean of precision and recall; mean over the classes",
    "roc_auc": "an image of a class is likelier called it than another image; chance is 50 %",
    "nll": "surprise: minus the logarithm of the right label's probability",
    "ece": "how far probabilities are from the share that is right: expected calibration error",
    "nll_fitted": "the same at a logit scale fitted on other images",
    "ece_fitted": "the same at a logit scale fitted on other images",
    "map": "mean average precision: how high all that is right stands",
    "median_rank": "half of the queries find what they look for by this place; 1 is best",
}
_NUMBERS = ("nll", "nll_fitted", "median_rank")  # what is no share
_TRUST = (
    "Intervals say how far a figure would move with other images like these, 95 times in 100. They "
    "say nothing about images of another kind, or captions of another style.",
    "Ties count against the model. A label or caption that differs from the right one in words "
    "alone counts as wrong.",
)


def write_page(report: Report, source: Source, file: Path) -> None:
    """Write the page of a measurement as one HTML file, in one step.

    Args:
        report: what was found.
        source: what it was measured on, for pictures.
        file: what stands there is replaced.
    """
    if isinstance(report.outcome, Retrieval):
        title, lead, sections = _retrieval(report, report.outcome, source)
    else:
        title, lead, sections = _classification(report, report.outcome, source)
    page = EvaluationPage(
        title=title,
        lead=lead,
        figures=[_measured(name, report) for name in report.figures],
        sections=sections,
        trust=[*_TRUST, *_about_data(report)],
        facts=_facts(report),
        commands=[("Measure again (labels and columns as they were):", _command(report))],
        footer=f"Measured by clipkit {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    )
    write_text(file, render_evaluation(page))


def _retrieval(
    report: Report, outcome: Retrieval, source: Source
) -> tuple[str, str, list[tuple[str, str]]]:
    counts, metrics = report.counts, report.metrics
    lead = (
        f"{counts['captions']:,} captions were asked for their images among {counts['images']:,}, "
        f"and the images for their captions. {metrics['text_to_image_r1']:.1%} of the captions "
        f"find their image first, {metrics['image_to_text_r1']:.1%} of the images a caption of "
        "their own."
    )
    curves = [
        (
            _DIRECTIONS[name],
            [(float(k), float((found.ranks < k).mean())) for k in range(1, _CURVE + 1)],
        )
        for name, found in outcome.found.items()
    ]
    asked = outcome.found["text_to_image"]
    worst = np.argsort(-asked.ranks, kind="stable")[:_MISSES]
    shown = zip(asked.asks[::-1], asked.images[::-1], strict=True)
    first = {int(q): outcome.keys[i] for q, i in shown}
    pictures = _pictures(source, (first[int(q)] for q in worst))
    down = [
        Miss(
            outcome.texts[asked.queries[q]],
            int(asked.ranks[q]) + 1,
            first[int(q)],
            pictures[first[int(q)]],
        )
        for q in worst
        if asked.ranks[q] and first[int(q)] in pictures
    ]
    sections = [("Found among the first k", recall_chart(curves))]
    if down:
        sections.append(("Captions whose image is farthest down", misses(down)))
    return f"Retrieval on {Path(report.data).name}", lead, sections


def _classification(
    report: Report, outcome: Classification, source: Source
) -> tuple[str, str, list[tuple[str, str]]]:
    found, labels = outcome.found, [str(label) for label in outcome.labels]
    lead = (
        f"{report.counts['images']:,} images were each given one of {len(labels):,} labels. "
        f"{report.metrics['top1']:.1%} are right; guessing would reach {1 / len(labels):.1%}."
    )
    recall, precision, f1 = (
        values[0] for values in per_class(found, np.ones((1, len(found.targets))))
    )
    support = np.bincount(found.targets, minlength=found.classes)
    rows = [
        ClassRow(
            labels[i],
            int(support[i]),
            float(recall[i]),
            float(precision[i]),
            float(f1[i]),
            float(found.auc[i]),
        )
        for i in np.flatnonzero(support)
    ]
    confusion = found.confusion
    sections = [
        ("Class by class", class_table(rows)),
        ("What was taken for what", confusion_table(labels, confusion.tolist())),
        ("Most often confused", confused_pairs(_confused(outcome, labels, source))),
        ("Whether probabilities can be believed", _reliability(outcome)),
    ]
    return f"Classification of {Path(report.data).name}", lead, sections


def _reliability(outcome: Classification) -> str:
    found = outcome.found
    points = [(one.confidence, one.accuracy) for one in reliability(found.confidence, found.right)]
    text = (
        "Images in bins of equal confidence: below the line the model is surer than it should be, "
        f"above it less sure. Its logit scale is {outcome.scale:.3g}"
    )
    if outcome.fitted is not None:
        text += f"; on these images {outcome.scale * outcome.fitted:.3g} would fit best"
    return reliability_chart(points, f"{text}.")


def _confused(outcome: Classification, labels: list[str], source: Source) -> list[Confused]:
    found = outcome.found
    counts = found.confusion
    np.fill_diagonal(counts, 0)
    cells = np.argsort(-counts, axis=None, kind="stable")[:_PAIRS]
    pairs = [divmod(int(cell), found.classes) for cell in cells if counts.flat[cell]]
    examples = {}
    for truth, taken in pairs:
        items = np.flatnonzero((found.targets == truth) & (found.predictions == taken))
        surest = items[np.argsort(-found.confidence[items], kind="stable")][:_PICTURES]
        examples[truth, taken] = [outcome.keys[i] for i in surest]
    pictures = _pictures(source, (key for keys in examples.values() for key in keys))
    return [
        Confused(
            labels[truth],
            labels[taken],
            int(counts[truth, taken]),
            [(key, pictures[key]) for key in examples[truth, taken] if key in pictures],
        )
        for truth, taken in pairs
    ]


def _pictures(source: Source, keys: Iterable[str]) -> dict[str, bytes]:
    """Small pictures of rows by their keys; those that cannot be read any more are left out."""
    wanted, found = set(keys), dict[str, bytes]()
    for row in source.rows if wanted else ():
        if row["key"] in wanted and row["key"] not in found:
            try:
                found[row["key"]] = thumbnail(row_image(row))
            except ImageError:
                continue
            if len(found) == len(wanted):
                break
    return found


def _measured(name: str, report: Report) -> Measured:
    direction = next((key for key in _DIRECTIONS if name.startswith(key)), "")
    figure = name.removeprefix(f"{direction}_") if direction else name
    meaning = _MEANINGS.get(figure, f"the share that is among the first {figure[1:]}")
    one = report.figures[name]
    known = {"map": "mAP", "top1": "top-1 accuracy", "top5": "top-5 accuracy", "ece": "ECE"}
    what = known.get(figure) or (f"recall@{figure[1:]}" if figure[1:].isdigit() else figure)
    shown = f"{_DIRECTIONS[direction]}: {what}" if direction else what
    return Measured(
        shown.replace("_", " "), meaning, one.value, one.low, one.high, figure not in _NUMBERS
    )


def _about_data(report: Report) -> list[str]:
    texts = list(report.notes)
    if report.skipped:
        first = report.skipped[0]
        texts.append(
            f"{len(report.skipped)} items were left out, the first of them {first.key}: "
            f"{first.reason}."
        )
    if report.cut:
        texts.append(report.cut.splitlines()[0] + ".")
    return texts


def _facts(report: Report) -> list[tuple[str, str]]:
    counts = [(name.replace("_", " "), f"{value:,}") for name, value in report.counts.items()]
    return [
        ("model", str(report.model)),
        ("fingerprint of the model", report.model.fingerprint),
        ("precision", report.model.precision),
        ("data", report.data),
        ("fingerprint of the data", report.fingerprint),
        *counts,
        *((name.replace("_", " "), str(value)) for name, value in report.settings.items()),
    ]


def _command(report: Report) -> str:
    model = report.model
    name = f"{model.name}/{model.weights}" if model.weights else model.name
    words = ["clipkit", "eval", report.task, report.data, "--model", name]
    return shlex.join(words) + (" --labels LABELS" if report.task == "zeroshot" else "")
