"""Encode the images and captions of a source: decode in threads, encode in batches, cache."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from clipkit.data.images import Decode, Skipped
from clipkit.data.rows import Row
from clipkit.data.source import Source, no_captions
from clipkit.data.transforms import Pixels
from clipkit.data.workers import map_ordered, worker_count
from clipkit.errors import DataError, ImageError
from clipkit.models.encoder import AdaptiveBatcher, BatchSize, Encoder, Vectors
from clipkit.models.tokenizer import TruncationReport, tokenize
from clipkit.progress import progress_bar
from clipkit.user_cache import Entry, key_of, user_cache


@dataclass(frozen=True)
class EncodedPairs:
    """Images and captions of a source as vectors.

    Attributes:
        images: float32 [n, dim].
        captions: float32 [m, dim].
        owners: int64 [m], the row in ``images`` of each caption's image.
        keys: the n images' keys.
        texts: the m captions.
        labels: the n images' labels, None where there is none.
        skipped: images or captions that could not be used, with reasons.
        report: the captions cut to 77 tokens.
    """

    images: Vectors
    captions: Vectors
    owners: NDArray[np.int64]
    keys: list[str]
    texts: list[str]
    labels: list[str | None]
    skipped: list[Skipped] = field(default_factory=list)
    report: TruncationReport = field(default_factory=TruncationReport)


def encoded_batches(
    encoder: Encoder,
    rows: Iterable[Row],
    *,
    batch_size: BatchSize,
    workers: int,
    on_skip: Callable[[str, str], None],
    decode: Decode = "exact",
    known: Callable[[Row], Vectors | None] | None = None,
) -> Iterator[tuple[Vectors, list[Row]]]:
    """Encode the images of rows in batches while threads decode the next ones.

    Args:
        encoder: the model.
        rows: rows of a Source.
        batch_size: images per batch; halved when memory runs out.
        workers: decoding threads.
        on_skip: called with key and reason of each image that cannot be read.
        decode: "fast" decodes images at a reduced size.
        known: returns the existing vector of a row, float32 [1, dim], or None to encode it. It is
            called in the decoding threads, before the image is read, and may raise ImageError.

    Yields:
        vectors, float32 [m, dim], and their m rows. Rows keep their order, except that existing
        vectors come before rows whose batch is not full yet.
    """
    batcher = AdaptiveBatcher(encoder, batch_size)
    reduction = encoder.preprocess.reduction(decode)

    def read(row: Row) -> tuple[Row, Vectors | None, Pixels | str]:
        try:
            vector = known(row) if known else None
            if vector is not None:
                return row, vector, ""
            return row, None, encoder.preprocess.pixels(row.read_image(reduction), decode)
        except ImageError as error:
            return row, None, str(error)

    def encoded(ready: list[tuple[Row, Pixels]]) -> tuple[Vectors, list[Row]]:
        return batcher.encode([pixels for _, pixels in ready]), [row for row, _ in ready]

    ready: list[tuple[Row, Pixels]] = []
    for row, vector, result in map_ordered(read, rows, workers=workers, ahead=2 * batcher.size):
        if vector is not None:
            yield vector, [row]
        elif isinstance(result, str):
            on_skip(row.key, result)
        else:
            ready.append((row, result))
        if len(ready) >= batcher.size:
            yield encoded(ready)
            ready = []
    if ready:
        yield encoded(ready)


def encode_pairs(
    encoder: Encoder,
    source: Source,
    *,
    batch_size: BatchSize = 64,
    workers: int | str = "auto",
    limit: int | None = None,
    progress: bool = True,
    with_captions: bool = True,
    known: Callable[[Row], Vectors | None] | None = None,
    known_captions: Callable[[Sequence[str], TruncationReport], Vectors] | None = None,
) -> EncodedPairs:
    """Encode every image and every caption of a source.

    Args:
        encoder: the model.
        source: where the pairs come from.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        limit: maximum number of rows to read.
        progress: show a progress bar on stderr.
        with_captions: encode the captions too, and skip images without one.
        known: as in ``encoded_batches``.
        known_captions: encodes the captions instead of the encoder: returns float32 [m, dim] and
            counts cut captions.

    Raises:
        DataError: no image can be read, or captions are wanted and there are none.
    """
    unused: dict[str, str] = {}

    def wanted() -> Iterator[Row]:
        for row in islice(iter(source.rows), limit):
            if row.captions or not with_captions:
                yield row
            else:
                unused[row.key] = "has no caption"

    vectors, rows = [], []
    with progress_bar(total=source.count, unit="img", desc="encoding", shown=progress) as bar:
        for part, encoded in encoded_batches(
            encoder,
            wanted(),
            batch_size=batch_size,
            workers=worker_count(workers),
            on_skip=unused.__setitem__,
            known=known,
        ):
            vectors.append(part)
            rows += encoded
            bar.update(len(encoded))
    if not rows and set(unused.values()) == {"has no caption"}:
        raise no_captions(source)
    if not rows:
        raise DataError(f"{source.spec} has no image that can be read; see clipkit data check")
    pairs = [(i, text) for i, row in enumerate(rows) for text in row.captions]
    texts = [text for _, text in pairs] if with_captions else []
    # A stream knows its skipped items only after it is read.
    skipped = {item.key: item.reason for item in source.skipped} | unused
    report = TruncationReport()
    if known_captions:
        captions = known_captions(texts, report)
    else:
        captions = encoder.encode_text(texts, report=report)
    return EncodedPairs(
        images=np.concatenate(vectors),
        captions=captions,
        owners=np.array([i for i, _ in pairs], np.int64),
        keys=[row.key for row in rows],
        texts=texts,
        labels=[row.label for row in rows],
        skipped=[Skipped(key, reason) for key, reason in skipped.items()],
        report=report,
    )


FEWEST = 64
"""Smallest number of images that is cached; fewer are encoded in about a second."""


def cached_pairs(
    encoder: Encoder,
    source: Source,
    *,
    batch_size: BatchSize = "auto",
    workers: int | str = "auto",
    with_captions: bool = True,
    progress: bool = True,
) -> EncodedPairs:
    """``encode_pairs`` with a cache in the user's cache directory.

    Cached vectors are used if the fingerprints of model and source, the precision, the keys and
    the captions are all equal.

    Args:
        encoder: the model.
        source: where the pairs come from.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        with_captions: encode the captions too, and skip images without one.
        progress: show a progress bar on stderr.

    Raises:
        DataError: no image can be read, or captions are wanted and there are none.
    """
    cache = user_cache()
    model = encoder.model
    name = key_of("pairs", model.fingerprint, model.precision, source.fingerprint, with_captions)
    cached = cache.get(name) if cache else None
    pairs = _restore(cached, source, with_captions) if cached else None
    if pairs is not None:
        return pairs
    pairs = encode_pairs(
        encoder,
        source,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
        with_captions=with_captions,
    )
    if cache and len(pairs.keys) >= FEWEST:
        texts = {
            "keys": json.dumps(pairs.keys),
            "captions": key_of(pairs.texts),
            "skipped": json.dumps([[item.key, item.reason] for item in pairs.skipped]),
        }
        cache.put(name, {"images": pairs.images, "captions": pairs.captions}, texts)
    return pairs


def _restore(cached: Entry, source: Source, with_captions: bool) -> EncodedPairs | None:
    """Cached vectors for the current rows; None if keys or captions have changed."""
    keys = json.loads(cached.texts["keys"])
    known = set(keys)
    rows = [row for row in source.rows.texts() if row.key in known]
    if [row.key for row in rows] != keys:
        return None
    captions = [(i, text) for i, row in enumerate(rows) for text in row.captions]
    texts = [text for _, text in captions] if with_captions else []
    if key_of(texts) != cached.texts["captions"]:
        return None
    report = TruncationReport()
    if texts:
        tokenize(texts, report=report)
    return EncodedPairs(
        images=cached.arrays["images"],
        captions=cached.arrays["captions"],
        owners=np.array([i for i, _ in captions], np.int64),
        keys=keys,
        texts=texts,
        labels=[row.label for row in rows],
        skipped=[Skipped(*item) for item in json.loads(cached.texts["skipped"])],
        report=report,
    )
