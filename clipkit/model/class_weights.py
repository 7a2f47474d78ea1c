"""Labels × templates as unit vectors, one a label; many captions are encoded once and kept."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clipkit.data.label_set import phrases_of
from clipkit.data.prompts import BACKGROUND, label_captions
from clipkit.data.vector_cache import key_of, user_cache
from clipkit.errors import CaptionError
from clipkit.model.encoder import Encoder
from clipkit.model.tokenizer import CONTEXT, ROOM, encode, shorten

KEPT_FROM = 256
"""Captions; fewer are encoded again each time, in about a second."""
_AT_ONCE = 2048  # captions encoded between two moves of the bar


def class_weights(
    encoder: Encoder, labels: Sequence[str], templates: Sequence[str]
) -> NDArray[np.float32]:
    """Per label, the mean of its captions' unit vectors, of unit length: float32 [labels, dim].

    Args:
        encoder: the model.
        labels: the classes.
        templates: captions with a ``{}`` where the label goes.

    Raises:
        CaptionError: a template has no slot, or a caption does not fit in 77 tokens.
    """
    captions = label_captions(labels, templates)
    count = sum(map(len, captions))
    cache = user_cache() if count >= KEPT_FROM else None
    name = key_of("classes", encoder.model.fingerprint, encoder.model.precision, captions)
    kept = cache.get(name) if cache else None
    if kept is not None:
        return kept.arrays["weights"]
    weights = np.empty((len(labels), encoder.dim), np.float32)
    show = None if count > _AT_ONCE else True
    with tqdm(total=count, unit="caption", desc="encoding labels", disable=show) as bar:
        for first, last in _parts([len(texts) for texts in captions]):
            texts = [text for one in captions[first:last] for text in one]
            vectors = _encode(encoder, texts, labels[first:last])
            starts = np.cumsum([0, *(len(one) for one in captions[first : last - 1])])
            sums = np.add.reduceat(vectors, starts, axis=0)
            weights[first:last] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
            bar.update(len(texts))
    if cache:
        cache.put(name, {"weights": weights}, {})
    return weights


def background_weights(encoder: Encoder, labels: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of generic captions that share no word of weight with a label, float32 [m, dim]."""
    said = {word for label in labels for text in phrases_of(label) for word in text.lower().split()}
    texts = [text for text in BACKGROUND if not said & set(text.rstrip(".").split()[-1:])]
    return encoder.encode_captions(texts)


def _parts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of labels with about so many captions as are encoded at once."""
    parts, first, held = [], 0, 0
    for number, size in enumerate(sizes):
        if held and held + size > _AT_ONCE:
            parts.append((first, number))
            first, held = number, 0
        held += size
    return [*parts, (first, len(sizes))]


def _encode(encoder: Encoder, texts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float32]:
    try:
        return encoder.encode_captions(texts, policy="error")
    except CaptionError:
        for text in texts:
            needed = len(encode(text))
            if needed > ROOM:
                label = next(one for one in labels if any(p in text for p in phrases_of(one)))
                raise CaptionError(
                    f"the label {shorten(str(label), 60)!r} makes the caption "
                    f"{shorten(text, 60)!r} of {needed + 2} tokens, expected at most {CONTEXT}; "
                    "shorten it, or part it into several phrases with semicolons"
                ) from None
        raise
