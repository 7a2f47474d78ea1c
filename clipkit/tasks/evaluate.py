"""Measure a model: ``clipkit eval retrieval`` and ``clipkit eval zeroshot``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipkit.data.images import Skipped
from clipkit.data.prompts import DEFAULT_TEMPLATES
from clipkit.data.sources import Source
from clipkit.data.workers import worker_count
from clipkit.errors import DataError
from clipkit.manifest import ModelRef
from clipkit.metrics import accuracy, retrieval_recall
from clipkit.model.classifier import ZeroShotClassifier
from clipkit.model.encode_pairs import EncodedPairs, encode_pairs
from clipkit.model.encoder import Encoder


@dataclass(frozen=True)
class Report:
    """What a measurement found.

    Attributes:
        task: ``"retrieval"`` or ``"zeroshot"``.
        model: the model measured.
        data: the source measured on, as it was named.
        fingerprint: of that source.
        counts: images, captions, classes, captions cut, images skipped.
        metrics: shares in [0, 1].
        skipped: images that could not be used.
        cut: what was cut from captions over 77 tokens, in words; empty if nothing was.
    """

    task: str
    model: ModelRef
    data: str
    fingerprint: str
    counts: dict[str, int]
    metrics: dict[str, float]
    skipped: list[Skipped]
    cut: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "task": self.task,
            "model": str(self.model),
            "fingerprint": self.model.fingerprint,
            "data": self.data,
            "data_fingerprint": self.fingerprint,
            **self.counts,
            **self.metrics,
        }


def evaluate_retrieval(source: Source, encoder: Encoder, *, progress: bool = True) -> Report:
    """Recall@1, 5 and 10 of captions finding their images and images finding their captions.

    Args:
        source: images with captions, any number each.
        encoder: the model to measure.
        progress: show a bar on stderr.

    Raises:
        DataError: no image or no caption.
    """
    pairs = encode_pairs(encoder, source, workers=worker_count("auto"), progress=progress)
    return _report("retrieval", source, encoder, pairs, _recall(pairs), {})


def _recall(pairs: EncodedPairs) -> dict[str, float]:
    return retrieval_recall(pairs.images, pairs.captions, pairs.owners)


def evaluate_zeroshot(
    source: Source,
    encoder: Encoder,
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    progress: bool = True,
) -> Report:
    """Top-1, top-5 and mean per-class accuracy of classification by captions.

    Args:
        source: images with labels (class folders, or a label column). A label of the data is found
            among ``labels`` by its words; capitals, hyphens and underscores do not matter.
        encoder: the model to measure.
        labels: the classes to choose from.
        templates: captions with a ``{}`` where the label goes.
        progress: show a bar on stderr.

    Raises:
        DataError: no image, no labels, or a label of the data that is not among ``labels``.
        CaptionError: labels or templates that cannot be used.
    """
    classifier = ZeroShotClassifier.from_labels(encoder, labels, templates)
    pairs = encode_pairs(
        encoder, source, workers=worker_count("auto"), progress=progress, with_captions=False
    )
    labelled = [i for i, label in enumerate(pairs.labels) if label is not None]
    if not labelled:
        raise DataError(
            f"{source.spec} has no labels; expected one folder per class, or a label column"
        )
    numbers = {_words(label): number for number, label in enumerate(labels)}
    names = [str(pairs.labels[i]) for i in labelled]
    unknown = Counter(name for name in names if _words(name) not in numbers)
    if unknown:
        raise DataError(
            f"{source.spec} has labels that are not among --labels: "
            f"{', '.join(sorted(unknown)[:10])} ({len(unknown)} in all); add them or rename them"
        )
    targets = np.array([numbers[_words(name)] for name in names], np.int64)
    metrics = accuracy(classifier.probabilities(pairs.images[labelled]), targets)
    without = [
        Skipped(key, "has no label")
        for key, label in zip(pairs.keys, pairs.labels, strict=True)
        if label is None
    ]
    return _report("zeroshot", source, encoder, pairs, metrics, {"classes": len(labels)}, without)


def _words(label: str) -> str:
    return " ".join(label.lower().replace("_", " ").replace("-", " ").split())


def _report(
    task: str,
    source: Source,
    encoder: Encoder,
    pairs: EncodedPairs,
    metrics: dict[str, float],
    counts: dict[str, int],
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
        task, encoder.model, source.spec, source.fingerprint, counts, metrics, skipped, cut
    )
