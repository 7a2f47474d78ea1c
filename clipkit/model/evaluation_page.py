"""A measurement as a page for someone who was not there."""

import shlex
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from clipkit import __version__
from clipkit.data.sources import Source, row_image
from clipkit.data.thumbnails import thumbnail
from clipkit.errors import ImageError
from clipkit.manifest import write_text
from clipkit.metrics.calibration import reliability
from clipkit.metrics.classification import per_class
from clipkit.model.evaluation import Classification, Report, Retrieval
from clipkit.pages.evaluation import (
    ClassRow,
    Confused,
    EvaluationPage,
    Measured,
    Miss,
    class_table,
    confused_pairs,
    confusion_table,
    misses,
    recall_chart,
    reliability_chart,
    render_evaluation,
)

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
