"""From vectors or logits to figures with error bars."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clipkit.metrics.calibration import cross_fitted, fit_scale, softmax
from clipkit.metrics.classification import Classified, classification_figures, classified
from clipkit.metrics.intervals import Estimate, estimate
from clipkit.metrics.ranks import Floats, Integers
from clipkit.metrics.retrieval import Retrieved, retrieval_figures, retrieved

EqualCaptions = Literal["merge", "apart"]
FEWEST = 20
"""Items from which on a scale is fitted."""


@dataclass(frozen=True)
class Related:
    """Which captions are right for which images.

    Attributes:
        captions: int64 [m], the rows of the captions that are used: of merged ones the first.
        image_of: int64 [pairs], the image of each right pair.
        caption_of: int64 [pairs], its caption, as its place in ``captions``.
        distinct: how many captions differ.
    """

    captions: Integers
    image_of: Integers
    caption_of: Integers
    distinct: int


def pair_up(texts: list[str], owners: Integers, equal_captions: EqualCaptions) -> Related:
    """Relate captions to images, equal ones merged or apart.

    Args:
        texts: the captions; equal are those that a tokenizer of lower case reads alike.
        owners: int64 [captions], the image of each.
        equal_captions: ``"merge"`` or ``"apart"``.
    """
    numbers: dict[str, int] = {}
    first: list[int] = []
    groups = np.empty(len(texts), np.int64)
    for place, text in enumerate(texts):
        words = " ".join(text.lower().split())
        if words not in numbers:
            numbers[words] = len(numbers)
            first.append(place)
        groups[place] = numbers[words]
    if equal_captions == "apart":
        rows = np.arange(len(texts), dtype=np.int64)
        return Related(rows, owners, rows, len(numbers))
    # An image that says the same twice says it once.
    pairs = np.unique(np.stack([owners, groups], axis=1), axis=0)
    return Related(np.array(first, np.int64), pairs[:, 0], pairs[:, 1], len(numbers))


def measure_retrieval(
    images: Floats, captions: Floats, related: Related
) -> tuple[dict[str, Retrieved], dict[str, Estimate]]:
    """The outcome of every query, and the figures; images are drawn anew for the error bars.

    Args:
        images: float32 [n, dim], rows of unit length.
        captions: float32 [m, dim], likewise, merged or not.
        related: what belongs together.

    Raises:
        DataError: vectors that are not finite.
    """
    used = captions if len(related.captions) == len(captions) else captions[related.captions]
    found = retrieved(images, used, related.image_of, related.caption_of)
    return found, estimate(partial(retrieval_figures, found), len(images))


def measure_classification(
    logits: NDArray[np.floating], targets: Integers
) -> tuple[Classified, dict[str, Estimate], float | None]:
    """What was said of every item, the figures, and the factor of the fitted logit scale.

    ``ece_fitted`` and ``nll_fitted`` are calibration error and surprise at a scale fitted on the
    half of the items that an item is not in; the factor is that of all items.

    Args:
        logits: [n, classes].
        targets: int64 [n].
    """
    found = classified(softmax(logits), targets)
    items = len(targets)
    figures = estimate(partial(classification_figures, found), items)
    if items < FEWEST:
        return found, figures, None
    again = classified(cross_fitted(logits, targets), targets)
    fitted = estimate(partial(classification_figures, again), items)
    figures |= {f"{name}_fitted": fitted[name] for name in ("nll", "ece")}
    return found, figures, fit_scale(logits, targets)
