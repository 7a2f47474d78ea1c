"""Classify images: ``clipkit classify IMAGES… --labels LABELS``."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from clipkit.classifiers.predictions import Answer, answer_each
from clipkit.classifiers.zero_shot import KEPT, Classifier, Prediction, ZeroShotClassifier, rank
from clipkit.data.labels import parents
from clipkit.data.open_source import Row, Source
from clipkit.data.workers import worker_count
from clipkit.errors import CaptionError
from clipkit.models.embed_source import cached_pairs, encoded_batches
from clipkit.models.encoder import Encoder, Vectors


def classify(
    sources: Sequence[Source],
    encoder: Encoder,
    classifier: Classifier,
    *,
    k: int = 3,
    each: bool = False,
    reject: bool = False,
    on_skip: Callable[[str, str], None],
    batch_size: int = 64,
    progress: bool = True,
) -> Iterator[Answer]:
    """What each image shows, image after image as they are ready.

    Args:
        sources: where the images come from. Of several, keys start with the source's name, for
            two folders may hold images of the same key.
        encoder: the model; the one that the classifier was made with.
        classifier: its labels and what it knows of them.
        k: labels per image; at most as many as there are.
        each: judge each label by itself, for an image may show several or none.
        reject: say where an image shows none of the labels.
        on_skip: called with key and reason of each image that cannot be read.
        batch_size: images encoded at once.
        progress: show a bar on stderr.

    Raises:
        ModelMismatchError: the classifier was made by another model.
        CaptionError: ``each`` or ``reject`` with a classifier that has no generic captions.
    """
    classifier.require(encoder.model)
    generic = _with_generic(classifier) if each or reject else None
    total = None if any(s.streaming for s in sources) else sum(len(s.rows) for s in sources)
    with tqdm(total=total, unit="img", desc="classifying", disable=None if progress else True) as b:
        for vectors, rows in encoded_batches(
            encoder,
            _rows(sources, on_skip),
            batch_size=batch_size,
            workers=worker_count("auto"),
            on_skip=on_skip,
        ):
            b.update(len(rows))
            if each and generic:
                yield from answer_each(generic, vectors, rows, k)
                continue
            answers = _answers(classifier, vectors, rows, k)
            yield from _rejecting(generic, vectors, answers) if generic else answers


def calibrate(
    source: Source,
    encoder: Encoder,
    classifier: Classifier,
    *,
    kept: float = KEPT,
    progress: bool = True,
) -> float:
    """Set by example images what it takes to show one of the labels; returns the threshold.

    Args:
        source: images that do show one of the labels, whichever.
        encoder: the model.
        classifier: made of captions, with generic ones; its threshold is set.
        kept: share of such images that is to be kept.
        progress: show a bar on stderr.

    Raises:
        CaptionError: too few images, or no generic captions.
        DataError: not one image can be read.
    """
    generic = _with_generic(classifier)
    pairs = cached_pairs(encoder, source, with_captions=False, progress=progress)
    generic.calibrate(pairs.images, kept)
    return generic.threshold


def _with_generic(classifier: Classifier) -> ZeroShotClassifier:
    if isinstance(classifier, ZeroShotClassifier) and len(classifier.background):
        return classifier
    raise CaptionError(
        f"this {classifier.kind} classifier has no generic captions to hold its labels against, "
        "expected one made of labels with --reject or --each; name labels instead"
    )


def _answers(
    classifier: Classifier, vectors: Vectors, rows: Sequence[Row], k: int
) -> Iterator[Answer]:
    probabilities = classifier.probabilities(vectors)
    keys = [row["key"] for row in rows]
    groups = {
        name: probabilities[:, members].sum(axis=1)
        for name, members in parents(classifier.labels).items()
    }
    found = rank(probabilities, classifier.labels, keys, k)
    for place, (row, predictions) in enumerate(zip(rows, found, strict=True)):
        above = [Prediction(row["key"], name, float(p[place])) for name, p in groups.items()]
        above.sort(key=lambda one: -one.score)
        yield Answer(row["key"], predictions, above, row["image"])


def _rejecting(
    classifier: ZeroShotClassifier, vectors: Vectors, answers: Iterator[Answer]
) -> Iterator[Answer]:
    shows = np.asarray(classifier.any_of(vectors))
    for answer, share in zip(answers, shows, strict=True):
        rejected = bool(share < classifier.threshold)
        yield replace(answer, shows_any=float(share), rejected=rejected)


def _rows(sources: Sequence[Source], on_skip: Callable[[str, str], None]) -> Iterator[Row]:
    """All rows, one source after the other, and what the sources themselves left out."""
    for source in sources:
        prefix = f"{source.spec}/" if len(sources) > 1 else ""
        seen = set()
        for row in source.rows:
            seen.add(row["key"])
            key = source.spec if source.kind == "image" else prefix + row["key"]
            yield {**row, "key": key}
        for skipped in source.skipped:
            if skipped.key not in seen:  # else only a caption of it was left out
                on_skip(prefix + skipped.key, skipped.reason)
