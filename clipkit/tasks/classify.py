"""Classify images zero-shot: ``clipkit classify IMAGES… --labels LABELS``."""

from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from clipkit.data.sources import Row, Source
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
    progress: bool = True,
) -> Iterator[list[Prediction]]:
    """The ``k`` likeliest labels of each image, image after image as they are ready.

    Args:
        sources: where the images come from. Of several, keys start with the source's name, for
            two folders may hold images of the same key.
        encoder: the model; the one that the classifier was made with.
        classifier: its class weights.
        k: labels per image; at most as many as there are.
        on_skip: called with key and reason of each image that cannot be read.
        batch_size: images encoded at once.
        progress: show a bar on stderr.

    Raises:
        ModelMismatchError: the classifier was made by another model.
    """
    classifier.model.require(
        encoder.model, what="the classifier", repair="make it again with this model"
    )
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
            yield from classifier.predict(vectors, [row["key"] for row in rows], k)


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
