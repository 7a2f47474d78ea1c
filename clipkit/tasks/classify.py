"""Classify images zero-shot: ``clipkit classify IMAGES… --labels LABELS``."""

from collections.abc import Callable, Iterator, Sequence

from clipkit.data.sources import Source
from clipkit.data.workers import worker_count
from clipkit.model.classifier import Prediction, ZeroShotClassifier
from clipkit.model.encode_pairs import encoded_batches
from clipkit.model.encoder import Encoder


def classify(
    sources: Sequence[Source],
    encoder: Encoder,
    classifier: ZeroShotClassifier,
    *,
    k: int = 3,
    on_skip: Callable[[str, str], None],
    batch_size: int = 64,
) -> Iterator[list[Prediction]]:
    """The ``k`` likeliest labels of each image, image after image as they are ready.

    Args:
        sources: where the images come from.
        encoder: the model; the one that the classifier was made with.
        classifier: its class weights.
        k: labels per image; at most as many as there are.
        on_skip: called with key and reason of each image that cannot be read.
        batch_size: images encoded at once.

    Raises:
        ModelMismatchError: the classifier was made by another model.
    """
    classifier.model.require(
        encoder.model, what="the classifier", repair="make it again with this model"
    )
    for source in sources:
        for skipped in source.skipped:
            on_skip(skipped.key, skipped.reason)
        batches = encoded_batches(
            encoder,
            source.rows,
            batch_size=batch_size,
            workers=worker_count("auto"),
            on_skip=on_skip,
        )
        for vectors, rows in batches:
            yield from classifier.predict(vectors, [row["key"] for row in rows], k)
