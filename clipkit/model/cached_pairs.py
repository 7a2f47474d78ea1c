"""The images and captions of a source as vectors, encoded once per model and kept."""

import json

import numpy as np

from clipkit.data.images import Skipped
from clipkit.data.sources import Source
from clipkit.data.vector_cache import Entry, key_of, user_cache
from clipkit.data.workers import worker_count
from clipkit.model.encode_pairs import EncodedPairs, encode_pairs
from clipkit.model.encoder import Encoder
from clipkit.model.tokenizer import CutReport, tokenize

FEWEST = 64
"""Fewer images are encoded again each time, in a second or so."""
_WANTED = ["key", "captions", "label"]


def cached_pairs(
    encoder: Encoder, source: Source, *, with_captions: bool = True, progress: bool = True
) -> EncodedPairs:
    """What ``encode_pairs`` gives, from the person's cache where the same was encoded before.

    Kept vectors are taken when the fingerprints of model and source, the precision, the keys and
    the captions are all the same, one after the other.

    Args:
        encoder: the model.
        source: where the pairs come from.
        with_captions: encode the captions too, and leave out images that have none.
        progress: show a bar on stderr.

    Raises:
        DataError: not one image can be read, or there is no caption where captions are wanted.
    """
    cache = user_cache()
    model = encoder.model
    name = key_of("pairs", model.fingerprint, model.precision, source.fingerprint, with_captions)
    kept = cache.get(name) if cache else None
    pairs = _restore(kept, source, with_captions) if kept else None
    if pairs is not None:
        return pairs
    pairs = encode_pairs(
        encoder,
        source,
        workers=worker_count("auto"),
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


def _restore(kept: Entry, source: Source, with_captions: bool) -> EncodedPairs | None:
    """Kept vectors beside the rows as they are now; None where these are others."""
    keys = json.loads(kept.texts["keys"])
    known = set(keys)
    rows = [row for row in source.rows.select_columns(_WANTED) if row["key"] in known]
    if [row["key"] for row in rows] != keys:
        return None
    captions = [(i, text) for i, row in enumerate(rows) for text in row["captions"]]
    texts = [text for _, text in captions] if with_captions else []
    if key_of(texts) != kept.texts["captions"]:
        return None
    report = CutReport()
    if texts:
        tokenize(texts, report=report)
    return EncodedPairs(
        images=kept.arrays["images"],
        captions=kept.arrays["captions"],
        owners=np.array([i for i, _ in captions], np.int64),
        keys=keys,
        texts=texts,
        labels=[row["label"] for row in rows],
        skipped=[Skipped(*item) for item in json.loads(kept.texts["skipped"])],
        report=report,
    )
