"""One query vector from several: what is wanted, less what is not."""

from collections.abc import Sequence

import numpy as np

from clipkit.errors import DataError
from clipkit.store.shards import Vectors

MINUS = 0.5
"""Weight of what is not wanted: a whole one, which has most of its direction in common with what
is wanted (text vectors of CLIP have a mean cosine of 0.74), would leave little but noise."""


def weighted(text: str, default: float) -> tuple[str, float]:
    """A text and its weight, where it ends in one: ``people:0.8``.

    Raises:
        DataError: the weight is none above 0.
    """
    words, _, number = text.rpartition(":")
    try:
        weight = float(number) if words else default
    except ValueError:
        return text, default
    if not 0 < weight < np.inf:
        raise DataError(f"{text!r} has the weight {weight}, expected a number above 0")
    return (words if words else text), weight


def combined(plus: Sequence[Vectors], minus: Sequence[Vectors] = ()) -> Vectors:
    """The direction of a sum of unit vectors, float32 [dim], of unit length.

    Args:
        plus: what is wanted, each float32 [dim].
        minus: what is not wanted; each is taken away with the weight ``MINUS``.

    Raises:
        DataError: they cancel each other out.
    """
    total = np.sum([*plus, *(-MINUS * vector for vector in minus)], axis=0, dtype=np.float32)
    length = float(np.linalg.norm(total))
    if length < 1e-3:
        raise DataError(
            "what is searched for are opposites, so that their sum has no direction; search for "
            "fewer of them"
        )
    return np.asarray(total / length, np.float32)
