"""The HTML page of an evaluation: metrics, charts, images, and how to reproduce them."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np

from clipkit import __version__
from clipkit.artifacts import write_text
from clipkit.data.open_source import Source
from clipkit.display.html import bullets, commands, document, percent
from clipkit.display.svg import Scale, Series, chart
from clipkit.display.thumbnails import thumbnail
from clipkit.errors import ImageError
from clipkit.evaluation.bootstrap import Estimate
from clipkit.evaluation.calibration import Bin, reliability
from clipkit.evaluation.classification import ClassificationResult, per_class
from clipkit.evaluation.report import ClassificationOutcome, Report, RetrievalOutcome
from clipkit.index.calibration import Calibration
from clipkit.reports.classification import inline_image

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
"""The most classes whose confusion matrix can be read on a screen."""
_PAIRS, _IMAGES, _MISSES = 12, 3, 12
_CURVE = 50  # the largest k of the recall curve
_DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
_NAMES = {
    "map": "mAP",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean per-class accuracy",
    "macro_precision": "macro precision",
    "macro_f1": "macro F1",
    "roc_auc": "ROC-AUC",
    "nll": "NLL",
    "ece": "ECE",
    "nll_fitted": "NLL, fitted scale",
    "ece_fitted": "ECE, fitted scale",
    "median_rank": "median rank",
}
_MEANINGS = {
    "top1": "the most probable label is correct",
    "top5": "the correct label is among the five most probable ones",
    "mean_per_class": "mean of the accuracies of the classes (balanced accuracy)",
    "macro_precision": "share of the images predicted as a class that belong to it; mean over the "
    "classes",
    "macro_f1": "harmonic mean of precision and recall; mean over the classes",
    "roc_auc": "an image of a class gets a higher probability for it than another image; 50 % by "
    "chance",
    "nll": "negative log-likelihood: minus the logarithm of the probability of the correct label",
    "ece": "expected calibration error: the gap between confidence and accuracy",
    "nll_fitted": "NLL with a logit scale fitted on other images",
    "ece_fitted": "ECE with a logit scale fitted on other images",
    "map": "mean average precision: how high all relevant items are ranked",
    "median_rank": "half of the queries find a relevant item at this rank or better; 1 is best",
}
_NUMBERS = ("nll", "nll_fitted", "median_rank")  # metrics that are not shares
_CAVEATS = (
    "The intervals are 95 % confidence intervals over the images. They do not cover images of "
    "another kind, or captions of another style.",
    "Ties count against the model. A label or caption in other words than the correct one counts "
    "as wrong.",
)


def write_page(report: Report, source: Source, file: Path) -> None:
    """Write the report as one self-contained HTML file.

    Args:
        report: of an evaluation.
        source: the data, for the images.
        file: the HTML file; an existing one is replaced.
    """
    if isinstance(report.outcome, RetrievalOutcome):
        title, lead, sections = _retrieval(report, report.outcome, source)
    else:
        title, lead, sections = _classification(report, report.outcome, source)
    parts = [
        ("Metrics", metrics_table(report.estimates)),
        *sections,
        ("Caveats", bullets([*_CAVEATS, *_notes(report)])),
        ("Setup", _setup(report)),
        ("Reproduce", commands([("With the same labels and columns:", _command(report))])),
    ]
    body = "".join(f"<h2>{escape(name)}</h2>{html}" for name, html in parts)
    footer = f"Evaluated by clipkit {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    write_text(file, document(title, lead, body, footer, _STYLE))


def _retrieval(
    report: Report, outcome: RetrievalOutcome, source: Source
) -> tuple[str, str, list[tuple[str, str]]]:
    counts, metrics = report.counts, report.metrics
    lead = (
        f"{counts['captions']:,} captions search {counts['images']:,} images, and the images "
        f"search the captions. {metrics['text_to_image_r1']:.1%} of the captions find their image "
        "first; "
        f"{metrics['image_to_text_r1']:.1%} of the images find one of their captions first."
    )
    curves = [
        Series(
            _DIRECTIONS[name],
            [(float(k), float(found.hits(k).mean())) for k in range(1, _CURVE + 1)],
        )
        for name, found in outcome.results.items()
    ]
    sections = [("Recall@k", chart(curves, "k", Scale(low=0.0, high=1.0)))]
    misses = _worst_captions(outcome, source)
    if misses:
        sections.append(("Captions with the worst ranks", misses))
    return f"Retrieval on {Path(report.data).name}", lead, sections


def _worst_captions(outcome: RetrievalOutcome, source: Source) -> str:
    """The captions with the worst ranks, each with the image that belongs to it; may be empty."""
    result = outcome.results["text_to_image"]
    worst = np.argsort(-result.ranks, kind="stable")[:_MISSES]
    pairs = zip(result.pair_query[::-1], result.pair_image[::-1], strict=True)
    key_of_query = {int(query): outcome.keys[image] for query, image in pairs}
    images = _read_images(source, (key_of_query[int(query)] for query in worst))
    cards = [
        (
            f"<p>“{escape(outcome.captions[result.queries[query]])}”<br>"
            f"rank {int(result.ranks[query]) + 1:,}</p>",
            [(key_of_query[int(query)], images[key_of_query[int(query)]])],
        )
        for query in worst
        if result.ranks[query] and key_of_query[int(query)] in images
    ]
    return _cards(cards) if cards else ""


def _classification(
    report: Report, outcome: ClassificationOutcome, source: Source
) -> tuple[str, str, list[tuple[str, str]]]:
    labels = [str(label) for label in outcome.labels]
    lead = (
        f"{report.counts['images']:,} images, {len(labels):,} classes. "
        f"{report.metrics['top1']:.1%} of the predictions are correct; a uniform predictor reaches "
        f"{1 / len(labels):.1%}."
    )
    sections = [
        ("Classes", class_table(outcome.result, labels)),
        ("Confusion matrix", confusion_table(labels, outcome.result.confusion.tolist())),
        ("Most frequent confusions", confused_pairs(_confused(outcome, labels, source))),
        ("Calibration", _reliability(outcome)),
    ]
    return f"Classification of {Path(report.data).name}", lead, sections


def metrics_table(estimates: dict[str, Estimate]) -> str:
    """Metrics with their intervals, as numbers and as bars."""
    rows = "".join(_metric_row(name, one) for name, one in estimates.items())
    head = '<th></th><th class="n">value</th><th class="n">95 % interval</th><th class="bar"></th>'
    return _table(head, rows)


def _metric_row(name: str, one: Estimate) -> str:
    direction = next((key for key in _DIRECTIONS if name.startswith(key)), "")
    metric = name.removeprefix(f"{direction}_") if direction else name
    k = metric[1:] if metric[1:].isdigit() else ""
    title = f"recall@{k}" if k else _NAMES.get(metric, metric.replace("_", " "))
    title = f"{_DIRECTIONS[direction]}: {title}" if direction else title
    meaning = f"the share of queries with a hit among the first {k}" if k else _MEANINGS[metric]
    share = metric not in _NUMBERS
    drawn = ""
    if share and one.value == one.value:
        left, right = 100 * max(0.0, one.low), 100 * min(1.0, one.high)
        drawn = (
            f'<div class="range"><i></i><b style="left:{left:.1f}%;width:{right - left:.1f}%"></b>'
            f'<u style="left:{100 * one.value:.1f}%"></u></div>'
        )
    return (
        f"<tr><td>{escape(title)}<small>{escape(meaning)}</small></td>"
        f'<td class="n"><b>{_shown(one.value, share)}</b></td>'
        f'<td class="n">{_shown(one.low, share)} – {_shown(one.high, share)}</td>'
        f'<td class="bar">{drawn}</td></tr>'
    )


def class_table(result: ClassificationResult, labels: Sequence[str]) -> str:
    """The metrics of each class that has images, the lowest F1 first."""
    recall, precision, f1 = (
        values[0] for values in per_class(result, np.ones((1, len(result.targets))))
    )
    support = np.bincount(result.targets, minlength=result.classes)
    order = sorted(np.flatnonzero(support).tolist(), key=lambda i: (f1[i], labels[i]))
    body = "".join(
        f'<tr><td>{escape(labels[i])}</td><td class="n">{support[i]}</td>'
        + "".join(
            f'<td class="n">{_shown(float(values[i]), True)}</td>'
            for values in (recall, precision, f1, result.auroc)
        )
        + "</tr>"
        for i in order
    )
    names = ("images", "recall", "precision", "F1", "ROC-AUC")
    head = "<th>class</th>" + "".join(f'<th class="n">{name}</th>' for name in names)
    return _table(head, body)


def confusion_table(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """The confusion matrix: rows are true classes, columns are predicted classes."""
    if len(names) > MOST_IN_MATRIX:
        return (
            f'<p class="soft">The matrix of {len(names)} classes is too large to show. The most '
            "frequent confusions are listed below.</p>"
        )
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(_cell(row, j) for j in range(len(names)))}</tr>"
        for name, row in zip(names, counts, strict=True)
    )
    head = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in names)
    return (
        '<p class="soft">Rows: true classes. Columns: predicted classes.</p>'
        f'<div class="wide"><table class="matrix"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(row: Sequence[int], column: int) -> str:
    share = 100 * row[column] / max(sum(row), 1)
    colour = f"background: color-mix(in srgb, var(--blue) {0.7 * share:.0f}%, transparent)"
    return f'<td style="{colour}">{row[column] or ""}</td>'


@dataclass(frozen=True)
class Confused:
    """How many images of one class were predicted as another, and some of them as JPEGs by key."""

    true: str
    predicted: str
    count: int
    images: Sequence[tuple[str, bytes]]


def _confused(outcome: ClassificationOutcome, labels: list[str], source: Source) -> list[Confused]:
    """The most frequent confusions, each with the images of highest confidence."""
    result = outcome.result
    counts = result.confusion
    np.fill_diagonal(counts, 0)
    cells = np.argsort(-counts, axis=None, kind="stable")[:_PAIRS]
    pairs = [divmod(int(cell), result.classes) for cell in cells if counts.flat[cell]]
    examples = {}
    for true, predicted in pairs:
        items = np.flatnonzero((result.targets == true) & (result.predictions == predicted))
        best = items[np.argsort(-result.confidence[items], kind="stable")][:_IMAGES]
        examples[true, predicted] = [outcome.keys[i] for i in best]
    images = _read_images(source, (key for keys in examples.values() for key in keys))
    return [
        Confused(
            labels[true],
            labels[predicted],
            int(counts[true, predicted]),
            [(key, images[key]) for key in examples[true, predicted] if key in images],
        )
        for true, predicted in pairs
    ]


def confused_pairs(pairs: Sequence[Confused]) -> str:
    """The most frequent confusions with example images."""
    if not pairs:
        return '<p class="soft">All predictions are correct.</p>'
    return _cards(
        (
            f"<p><b>{escape(one.true)}</b> predicted as <b>{escape(one.predicted)}</b>: "
            f"{one.count} images</p>",
            one.images,
        )
        for one in pairs
    )


def _reliability(outcome: ClassificationOutcome) -> str:
    result, scale = outcome.result, outcome.logit_scale
    bins = reliability(result.confidence, result.correct)
    text = (
        "Accuracy of images in bins of equal confidence: below the diagonal, the model is "
        f"overconfident; above it, underconfident. The logit scale is {scale:.3g}"
    )
    if outcome.fitted is not None:
        text += f"; {scale * outcome.fitted:.3g} fits these images best"
    drawing = _reliability_diagram(bins, "model", "confidence")
    return f'<p class="soft">{escape(text)}.</p>{drawing}'


def _reliability_diagram(bins: Sequence[Bin], name: str, axis: str) -> str:
    points = [(one.confidence, one.accuracy) for one in bins]
    lines = [Series(name, points), Series("perfect calibration", [(0.0, 0.0), (1.0, 1.0)])]
    return chart(lines, axis, Scale(low=0.0, high=1.0))


def render_calibration(found: Calibration) -> str:
    """The reliability diagrams of an index's probabilities as HTML; a sentence if it has none."""
    parts = []
    for one, what in ((found.hit, "a hit matches"), (found.any_match, "any of the ten best does")):
        if one is not None:
            title = f"Probability that {what}: calibration error {one.error:.3f}"
            drawing = _reliability_diagram(one.reliability, "index", "stated probability")
            parts.append(f"<h2>{title}</h2>{drawing}")
    if not parts:
        return '<p class="soft">This index has no captions to calibrate probabilities with.</p>'
    text = (
        f"Matches among the hits stated with each probability, for {found.captions:,} "
        f"{found.source}, cross-fitted: below the diagonal, probabilities are too high."
    )
    return f'<p class="soft">{escape(text)}</p>{"".join(parts)}'


def write_calibration(found: Calibration, index: Path, file: Path) -> None:
    """Write the reliability diagrams of an index as an HTML page."""
    lead = f"How far the probabilities of {index} can be trusted."
    body = render_calibration(found)
    write_text(file, document("Calibration", lead, body, "Written by clipkit index calibrate."))


def _read_images(source: Source, keys: Iterable[str]) -> dict[str, bytes]:
    """Thumbnails by key; images that can no longer be read are left out."""
    wanted, found = set(keys), dict[str, bytes]()
    for row in source.rows if wanted else ():
        if row.key in wanted and row.key not in found:
            try:
                found[row.key] = thumbnail(row.read_image())
            except ImageError:
                continue
            if len(found) == len(wanted):
                break
    return found


def _notes(report: Report) -> list[str]:
    texts = list(report.notes)
    if report.skipped:
        first = report.skipped[0]
        texts.append(
            f"{len(report.skipped)} items were skipped, the first one is {first.key}: "
            f"{first.reason}."
        )
    if report.truncated:
        texts.append(report.truncated.splitlines()[0] + ".")
    return texts


def _setup(report: Report) -> str:
    facts = [
        ("model", str(report.model)),
        ("model fingerprint", report.model.fingerprint),
        ("precision", report.model.precision),
        ("data", report.data),
        ("data fingerprint", report.fingerprint),
        *((name.replace("_", " "), f"{value:,}") for name, value in report.counts.items()),
        *((name.replace("_", " "), str(value)) for name, value in report.settings.items()),
    ]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _command(report: Report) -> str:
    model = report.model
    name = f"{model.name}/{model.weights}" if model.weights else model.name
    words = ["clipkit", "eval", report.task, report.data, "--model", name]
    if report.settings.get("equal_captions") == "apart":
        words += ["--equal-captions", "apart"]
    if report.settings.get("ties") == "average":
        words += ["--ties", "average"]
    return shlex.join(words) + (" --labels LABELS" if report.task == "zero-shot" else "")


def _cards(cards: Iterable[tuple[str, Sequence[tuple[str, bytes]]]]) -> str:
    shown = (
        f'<div class="pair">{text}{"".join(inline_image(jpeg, key) for key, jpeg in images)}</div>'
        for text, images in cards
    )
    return f'<div class="pairs">{"".join(shown)}</div>'


def _table(head: str, rows: str) -> str:
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _shown(value: float, share: bool) -> str:
    if value != value:  # NaN: there was nothing to measure
        return "–"
    return percent(value) if share else f"{value:,.4g}"
