"""Evaluate a model: ``clipkit eval retrieval`` and ``clipkit eval zero-shot``."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from clipkit.arguments import require_choice, require_encoder
from clipkit.artifacts import ModelRef
from clipkit.classifiers.heads import Labels, Templates, list_templates, load_classifier
from clipkit.classifiers.zero_shot import Classifier, ZeroShotClassifier
from clipkit.data.formats.folders import texts_without_image
from clipkit.data.images import Skipped
from clipkit.data.labels import empty_classes, own_labels, targets_of
from clipkit.data.open_source import Data, Source, open_source
from clipkit.errors import DataError
from clipkit.evaluation.bootstrap import Estimate
from clipkit.evaluation.classification import measure_classification
from clipkit.evaluation.report import ClassificationOutcome, Report, RetrievalOutcome, Task
from clipkit.evaluation.retrieval import EqualCaptions, Ties, measure_retrieval, relevant_pairs
from clipkit.models.embed_source import EncodedPairs, cached_pairs
from clipkit.models.encoder import BatchSize, Encoder
from clipkit.models.loading import load_model
from clipkit.reports import plots

_SHOWN = 5  # texts


def evaluate_retrieval(
    data: Data,
    encoder: Encoder | None = None,
    *,
    equal_captions: EqualCaptions = "merge",
    ties: Ties = "against",
    batch_size: BatchSize = "auto",
    workers: int | str = "auto",
    progress: bool = True,
) -> Report:
    """Recall@1, 5, 10 and 50, median rank and mAP, from captions to images and back.

    Args:
        data: images with any number of captions each.
        encoder: the model; None for the default model.
        equal_captions: ``"merge"`` makes captions that differ only in case and spaces one caption,
            relevant to all of its images. ``"apart"`` keeps each relevant to its own image alone,
            the protocol of Karpathy & Fei-Fei 2015, which counts another image with the same
            sentence as wrong.
        ties: ``"against"`` ranks the right item last among those of equal score; ``"average"``
            takes the mean over all orders of these.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the data cannot be opened, or has no image or no caption.
    """
    require_encoder(encoder)
    require_choice("equal_captions", equal_captions, EqualCaptions)
    require_choice("ties", ties, Ties)
    source = open_source(data)
    encoder = encoder or load_model()
    pairs = cached_pairs(encoder, source, batch_size=batch_size, workers=workers, progress=progress)
    relevance = relevant_pairs(pairs.texts, pairs.owners, equal_captions)
    results, estimates = measure_retrieval(pairs.images, pairs.captions, relevance, ties)
    captions = [pairs.texts[i] for i in relevance.captions]
    copies = len(pairs.images) - len({row.tobytes() for row in pairs.images})
    counts = {"equal_captions": len(pairs.texts) - relevance.distinct, "equal_images": copies}
    return _report(
        "retrieval",
        source,
        encoder.model,
        pairs,
        counts,
        estimates,
        RetrievalOutcome(results, pairs.keys, captions),
        {"equal_captions": equal_captions, "ties": ties},
        _retrieval_notes(source, counts, equal_captions, ties),
    )


def _retrieval_notes(
    source: Source, counts: dict[str, int], equal_captions: EqualCaptions, ties: Ties
) -> list[str]:
    notes = []
    stray = texts_without_image(source.root) if source.kind == "sidecars" and source.root else []
    if stray:
        more = ", …" if len(stray) > _SHOWN else ""
        notes.append(
            f"caption files without an image, which are not queries: {len(stray)} "
            f"({', '.join(stray[:_SHOWN])}{more})"
        )
    if counts["equal_captions"]:
        how = (
            "equal captions are merged into one, and all of its images are relevant"
            if equal_captions == "merge"
            else "only the caption's own image is relevant, the other images count as wrong"
        )
        notes.append(f"captions equal to an earlier one: {counts['equal_captions']}; {how}")
    if counts["equal_images"]:
        how = "ties count against the model" if ties == "against" else "ties are averaged over"
        notes.append(
            f"images with the same vector as an earlier one: {counts['equal_images']}; they tie, "
            f"and {how} (clipkit data check lists duplicates)"
        )
    return notes


def evaluate_zero_shot(
    data: Data,
    encoder: Encoder | None = None,
    labels: Labels | None = None,
    templates: Templates = None,
    *,
    batch_size: BatchSize = "auto",
    workers: int | str = "auto",
    progress: bool = True,
) -> Report:
    """Accuracy, precision, F1, ROC-AUC and calibration of a zero-shot or saved classifier.

    Args:
        data: images with labels (class folders, or a label column).
        encoder: the model; None loads the model of a saved classifier, else the default model.
        labels: the classes: a list, a file with one label per line, ``"imagenet"``, the directory
            of a saved classifier, or a classifier. None for the labels of the data. A label of the
            data matches if it has the same words; case, hyphens and underscores do not matter.
        templates: captions with a ``{}`` in place of the label, a file with one per line,
            ``"openai"`` or ``"simple"``; None for the default templates.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: ``labels`` is a single label instead of a list.
        DataError: the data cannot be opened, has no image or no labels, or has a label that is not
            among ``labels``.
        CaptionError: labels or templates that cannot be used.
        ModelMismatchError: the classifier was built for another model.
    """
    require_encoder(encoder)
    source = open_source(data, caption="")
    encode = partial(
        cached_pairs,
        batch_size=batch_size,
        workers=workers,
        with_captions=False,
        progress=progress,
    )
    if labels is None:
        captions = list_templates(templates)
        encoder = encoder or load_model()
        pairs = encode(encoder, source)
        own = own_labels(pairs.labels, source.spec)
        classifier: Classifier = ZeroShotClassifier.from_labels(encoder, own, captions)
    else:
        encoder, classifier = load_classifier(labels, encoder, templates)
        pairs = encode(encoder, source)
    rows, targets = targets_of(pairs.labels, classifier.labels, source.spec)
    result, estimates, fitted = measure_classification(
        classifier.logits(pairs.images[rows]), targets
    )
    keys = [pairs.keys[i] for i in rows]
    empty = empty_classes(targets, classifier.labels)
    names = [str(label) for label in classifier.labels]
    unlabelled = [
        Skipped(key, "has no label")
        for key, label in zip(pairs.keys, pairs.labels, strict=True)
        if label is None
    ]
    return _report(
        "zero-shot",
        source,
        encoder.model,
        pairs,
        {"classes": result.classes},
        estimates,
        ClassificationOutcome(result, keys, names, classifier.logit_scale, fitted),
        {"classifier": classifier.fingerprint},
        [empty] if empty else [],
        unlabelled,
    )


def plot_confusion(report: Report) -> plots.Drawing:
    """Draw the confusion matrix of a classification.

    Args:
        report: of ``evaluate_zero_shot``.

    Raises:
        DataError: the report is about a retrieval.
    """
    outcome = report.outcome
    if not isinstance(outcome, ClassificationOutcome):
        raise DataError(
            f"a {report.task} report has no confusion matrix; expected a report of "
            "evaluate_zero_shot"
        )
    return plots.plot_confusion(outcome.result.confusion, outcome.labels)


def _report(
    task: Task,
    source: Source,
    model: ModelRef,
    pairs: EncodedPairs,
    counts: dict[str, int],
    estimates: dict[str, Estimate],
    outcome: RetrievalOutcome | ClassificationOutcome,
    settings: dict[str, Any],
    notes: list[str],
    unlabelled: Sequence[Skipped] = (),
) -> Report:
    skipped = [*pairs.skipped, *unlabelled]
    counts = {
        "images": len(pairs.keys) - len(unlabelled),
        **({"captions": len(pairs.texts), "cut": pairs.report.cut} if pairs.texts else {}),
        **counts,
        "skipped": len(skipped),
    }
    return Report(
        task=task,
        model=model,
        data=source.spec,
        fingerprint=source.fingerprint,
        settings=settings,
        counts=counts,
        estimates=estimates,
        outcome=outcome,
        notes=notes,
        skipped=skipped,
        truncated=pairs.report.render() if pairs.report.cut else "",
    )
