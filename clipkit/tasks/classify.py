"""Classify images: ``clipkit classify IMAGES… --labels LABELS``."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from clipkit.arguments import require_integer
from clipkit.classifiers.heads import Labels, Templates, load_classifier
from clipkit.classifiers.predictions import Prediction, Predictions
from clipkit.classifiers.zero_shot import ACCEPTED, Classifier, ZeroShotClassifier
from clipkit.data.images import Skipped
from clipkit.data.open_source import Data, Row, Source, open_source
from clipkit.data.prompts import check_labels
from clipkit.data.workers import worker_count
from clipkit.errors import CaptionError, DataError
from clipkit.models.embed_source import cached_pairs, encoded_batches
from clipkit.models.encoder import BatchSize, Encoder
from clipkit.progress import progress_bar


def classify(
    data: Data,
    labels: Labels,
    encoder: Encoder | None = None,
    *,
    templates: Templates = None,
    k: int = 3,
    each: bool = False,
    reject: bool = False,
    calibrate: Data | None = None,
    batch_size: BatchSize = "auto",
    workers: int | str = "auto",
    progress: bool = True,
) -> Predictions:
    """Classify images by labels, or by a saved classifier.

    Args:
        data: the images: a path, a pattern, a PIL image, an array, a data frame or anything else
            that ``open_source`` takes, or a list of these paths.
        labels: a list of labels, a file with one label per line, ``"imagenet"``, the directory of a
            saved classifier, or a classifier.
        encoder: the model; None loads the model of a saved classifier, else the default model.
        templates: captions with a ``{}`` in place of the label, a file with one per line,
            ``"openai"`` or ``"simple"``; None for the default templates.
        k: labels per image, at most as many as there are.
        each: judge each label by itself; an image may show several labels, or none.
        reject: reject images that show none of the labels.
        calibrate: images that do show one of the labels; 95 % of images like these are accepted.
            Implies ``reject``.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        progress: show a progress bar on stderr.

    Returns:
        A prediction for each image; images that cannot be read are in ``skipped``.

    Raises:
        TypeError: ``labels`` is a string instead of a list.
        CaptionError: labels or templates that cannot be used; a single label without ``each``;
            ``each`` or ``reject`` with a classifier without background captions; too few images to
            calibrate.
        DataError: the data cannot be opened, or none of the images can be read.
        ModelMismatchError: the classifier was built for another model.
    """
    k = require_integer("k", k)
    sources = [_images(one) for one in _several(data)]
    examples = None if calibrate is None else _images(calibrate)
    reject = reject or examples is not None
    encoder, classifier = load_classifier(labels, encoder, templates, background=each or reject)
    if examples:
        calibrate_rejection(
            examples,
            encoder,
            classifier,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )
    skipped: list[Skipped] = []
    predictions = predict_images(
        sources,
        encoder,
        classifier,
        k=k,
        each=each,
        reject=reject,
        on_skip=lambda key, reason: skipped.append(Skipped(key, reason)),
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    found = Predictions(tuple(predictions), encoder.model, tuple(skipped))
    if not found:
        raise no_image(skipped)
    return found


def predict_images(
    sources: Sequence[Source],
    encoder: Encoder,
    classifier: Classifier,
    *,
    k: int = 3,
    each: bool = False,
    reject: bool = False,
    on_skip: Callable[[str, str], None],
    batch_size: BatchSize = "auto",
    workers: int | str = "auto",
    progress: bool = True,
) -> Iterator[Prediction]:
    """Classify images one batch after the other, as ``classify`` does, without collecting them.

    Args:
        sources: the images. With several sources, a key starts with the name of its source, because
            two folders may have images of the same key.
        encoder: the model that the classifier was built for.
        classifier: the labels.
        k: labels per image.
        each: judge each label by itself.
        reject: reject images that show none of the labels.
        on_skip: called with the key and the reason for each image that cannot be read.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        progress: show a progress bar on stderr.

    Raises:
        ModelMismatchError: the classifier was built for another model.
        CaptionError: ``each`` or ``reject`` with a classifier without background captions, or a
            single label without ``each``.
    """
    classifier.require(encoder.model)
    if len(classifier.labels) == 1:
        check_labels(classifier.labels, single=each)
    zero_shot = _with_background(classifier) if each or reject else None
    counts = [source.count for source in sources]
    total = None if None in counts else sum(count or 0 for count in counts)
    with progress_bar(total=total, unit="img", desc="classifying", shown=progress) as bar:
        for vectors, rows in encoded_batches(
            encoder,
            _rows(sources, on_skip),
            batch_size=batch_size,
            workers=worker_count(workers),
            on_skip=on_skip,
        ):
            bar.update(len(rows))
            keys = [row.key for row in rows]
            if each and zero_shot:
                found = zero_shot.predict_each(vectors, keys, k)
            else:
                found = classifier.predict(vectors, keys, k)
            shows = zero_shot.any_of(vectors).tolist() if zero_shot and not each else []
            for place, (row, one) in enumerate(zip(rows, found, strict=True)):
                one = replace(one, image=row.image)
                if zero_shot and shows:
                    rejected = shows[place] < zero_shot.threshold
                    one = replace(one, shows_any=shows[place], rejected=rejected)
                yield one


def calibrate_rejection(
    source: Source,
    encoder: Encoder,
    classifier: Classifier,
    *,
    accepted: float = ACCEPTED,
    batch_size: BatchSize = "auto",
    workers: int | str = "auto",
    progress: bool = True,
) -> float:
    """Set the threshold for rejection by example images, and return it.

    Args:
        source: images that show one of the labels, whichever.
        encoder: the model.
        classifier: a zero-shot classifier with background captions; its threshold is set.
        accepted: the share of such images to accept.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        progress: show a progress bar on stderr.

    Raises:
        CaptionError: too few images, or no background captions.
        DataError: none of the images can be read.
    """
    zero_shot = _with_background(classifier)
    pairs = cached_pairs(
        encoder,
        source,
        batch_size=batch_size,
        workers=workers,
        with_captions=False,
        progress=progress,
    )
    zero_shot.calibrate(pairs.images, accepted)
    return zero_shot.threshold


def no_image(skipped: Sequence[object]) -> DataError:
    """The error if none of the images could be read."""
    return DataError(
        f"none of the images could be read ({len(skipped)} skipped); clipkit data check lists the "
        "reasons"
    )


def _several(data: Data) -> Sequence[Data]:
    """The sources in ``data``: those of a list of paths, or ``data`` itself."""
    if isinstance(data, Sequence) and not isinstance(data, str) and data:
        paths = [isinstance(one, str | Path | Source) for one in data]
        if all(paths):
            return data
    return [data]


def _images(data: Data) -> Source:
    # Neither captions nor labels are needed, so their columns may have any name.
    return open_source(data, caption="", label="")


def _with_background(classifier: Classifier) -> ZeroShotClassifier:
    if isinstance(classifier, ZeroShotClassifier) and len(classifier.background):
        return classifier
    raise CaptionError(
        f"this {classifier.kind} classifier has no background captions, which rejection and "
        "independent labels need; give labels instead of a saved classifier"
    )


def _rows(sources: Sequence[Source], on_skip: Callable[[str, str], None]) -> Iterator[Row]:
    """The rows of all sources; reports the images that the sources themselves skipped."""
    for source in sources:
        prefix = f"{source.spec}/" if len(sources) > 1 else ""
        seen = set()
        for row in source.rows:
            seen.add(row.key)
            key = source.spec if source.kind == "image" else prefix + row.key
            yield replace(row, key=key)
        for skipped in source.skipped:
            if skipped.key not in seen:  # otherwise only a caption of it was skipped
                on_skip(prefix + skipped.key, skipped.reason)
