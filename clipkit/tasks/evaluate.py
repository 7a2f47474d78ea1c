"""Measure a model: ``clipkit eval retrieval`` and ``clipkit eval zeroshot``."""

from collections.abc import Sequence
from typing import Any

from clipkit.artifacts import ModelRef
from clipkit.classifiers.zero_shot import Classifier, ZeroShotClassifier
from clipkit.data.formats.folders import texts_without_image
from clipkit.data.images import Skipped
from clipkit.data.labels import empty_classes, targets_of
from clipkit.data.open_source import Source
from clipkit.data.prompts import DEFAULT_TEMPLATES
from clipkit.errors import DataError
from clipkit.evaluation.bootstrap import Estimate
from clipkit.evaluation.report import (
    Classification,
    EqualCaptions,
    Report,
    Retrieval,
    measure_classification,
    measure_retrieval,
    pair_up,
)
from clipkit.models.embed_source import EncodedPairs, cached_pairs
from clipkit.models.encoder import Encoder
from clipkit.reports import plots

_SHOWN = 5  # texts


def evaluate_retrieval(
    source: Source,
    encoder: Encoder,
    *,
    equal_captions: EqualCaptions = "merge",
    progress: bool = True,
) -> Report:
    """Recall@1, 5, 10 and 50, median rank and mAP of captions finding images and the reverse.

    Args:
        source: images with captions, any number each.
        encoder: the model to measure.
        equal_captions: captions that the model reads alike, case and spaces aside, are one caption
            to which all of their images are right (``"merge"``), or each is right for its own
            image alone (``"apart"``, the protocol of Karpathy & Fei-Fei 2015, under which a model
            is wrong when it finds the same sentence beside another image).
        progress: show a bar on stderr.

    Raises:
        DataError: no image or no caption.
    """
    pairs = cached_pairs(encoder, source, progress=progress)
    related = pair_up(pairs.texts, pairs.owners, equal_captions)
    found, figures = measure_retrieval(pairs.images, pairs.captions, related)
    texts = [pairs.texts[i] for i in related.captions]
    copies = len(pairs.images) - len({row.tobytes() for row in pairs.images})
    counts = {"equal_captions": len(pairs.texts) - related.distinct, "equal_images": copies}
    outcome = Retrieval(found, pairs.keys, texts)
    settings = {"equal_captions": equal_captions}
    notes = _retrieval_notes(source, counts, equal_captions)
    return _report(
        "retrieval", source, encoder.model, pairs, counts, figures, outcome, settings, notes
    )


def _retrieval_notes(
    source: Source, counts: dict[str, int], equal_captions: EqualCaptions
) -> list[str]:
    notes = []
    stray = texts_without_image(source.root) if source.kind == "sidecars" and source.root else []
    if stray:
        more = ", …" if len(stray) > _SHOWN else ""
        notes.append(
            f"texts without an image beside them, which are not asked: {len(stray)} "
            f"({', '.join(stray[:_SHOWN])}{more})"
        )
    if counts["equal_captions"]:
        how = (
            "such captions are one, to which all of their images are right"
            if equal_captions == "merge"
            else "each is right for its own image alone, and the others count as wrong"
        )
        notes.append(f"captions equal to an earlier one: {counts['equal_captions']}; {how}")
    if counts["equal_images"]:
        notes.append(
            f"images with the vector of an earlier one: {counts['equal_images']}; they tie, and "
            "ties count against the model (clipkit data check lists duplicates)"
        )
    return notes


def evaluate_zero_shot(
    source: Source,
    encoder: Encoder,
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    progress: bool = True,
) -> Report:
    """How well captions classify images that have labels; see ``evaluate_classifier``.

    Args:
        source: images with labels (class folders, or a label column).
        encoder: the model to measure.
        labels: the classes to choose from.
        templates: captions with a ``{}`` where the label goes.
        progress: show a bar on stderr.

    Raises:
        DataError: no image, no labels, or a label of the data that is not among ``labels``.
        CaptionError: labels or templates that cannot be used.
    """
    classifier = ZeroShotClassifier.from_labels(encoder, labels, templates)
    return evaluate_classifier(source, encoder, classifier, progress=progress)


def evaluate_classifier(
    source: Source, encoder: Encoder, classifier: Classifier, *, progress: bool = True
) -> Report:
    """Accuracy, precision, F1, ROC-AUC and calibration of a classifier.

    Args:
        source: images with labels (class folders, or a label column). A label of the data is found
            among the classifier's by its words; capitals, hyphens and underscores do not matter.
        encoder: the model.
        classifier: made with that model.
        progress: show a bar on stderr.

    Raises:
        DataError: no image, no labels, or a label of the data that is not among the classifier's.
        ModelMismatchError: the classifier was made by another model.
    """
    classifier.require(encoder.model)
    pairs = cached_pairs(encoder, source, with_captions=False, progress=progress)
    rows, targets = targets_of(pairs.labels, classifier.labels, source.spec)
    found, figures, fitted = measure_classification(classifier.logits(pairs.images[rows]), targets)
    outcome = Classification(
        found, [pairs.keys[i] for i in rows], classifier.labels, classifier.scale, fitted
    )
    empty = empty_classes(targets, classifier.labels)
    without = [
        Skipped(key, "has no label")
        for key, label in zip(pairs.keys, pairs.labels, strict=True)
        if label is None
    ]
    return _report(
        "zeroshot",
        source,
        encoder.model,
        pairs,
        {"classes": found.classes},
        figures,
        outcome,
        {"classifier": classifier.fingerprint},
        [empty] if empty else [],
        without,
    )


def plot_confusion(report: Report) -> plots.Drawing:
    """Draw which class a measured classifier took for which.

    Args:
        report: of ``evaluate_zero_shot`` or ``evaluate_classifier``.

    Raises:
        DataError: it is the report of a retrieval.
    """
    outcome = report.outcome
    if not isinstance(outcome, Classification):
        raise DataError(
            f"a report on {report.task} has no confusion matrix; expected one of evaluate_zero_shot"
        )
    return plots.plot_confusion(outcome.found.confusion, outcome.labels)


def _report(
    task: str,
    source: Source,
    model: ModelRef,
    pairs: EncodedPairs,
    counts: dict[str, int],
    figures: dict[str, Estimate],
    outcome: Retrieval | Classification,
    settings: dict[str, Any],
    notes: list[str],
    without: Sequence[Skipped] = (),
) -> Report:
    skipped = [*pairs.skipped, *without]
    counts = {
        "images": len(pairs.keys) - len(without),
        **({"captions": len(pairs.texts), "cut": pairs.report.cut} if pairs.texts else {}),
        **counts,
        "skipped": len(skipped),
    }
    cut = pairs.report.render() if pairs.report.cut else ""
    return Report(
        task=task,
        model=model,
        data=source.spec,
        fingerprint=source.fingerprint,
        settings=settings,
        counts=counts,
        figures=figures,
        outcome=outcome,
        notes=notes,
        skipped=skipped,
        cut=cut,
    )
