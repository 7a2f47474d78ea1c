"""What a measurement found, for pages, tables and comparisons.

From vectors or logits to figures with error bars.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clipkit.artifacts import ModelRef
from clipkit.data.images import Skipped
from clipkit.display.html import bullets, card, table
from clipkit.evaluation.bootstrap import Estimate, estimate
from clipkit.evaluation.calibration import cross_fitted, fit_scale, softmax
from clipkit.evaluation.classification import Classified, classification_figures, classified
from clipkit.evaluation.retrieval import Floats, Integers, Retrieved, retrieval_figures, retrieved


@dataclass(frozen=True)
class Report:
    """What a measurement found.

    Attributes:
        task: ``"retrieval"`` or ``"zeroshot"``.
        model: the model measured.
        data: the source measured on, as it was named.
        fingerprint: of that source.
        settings: what else was chosen, for whoever measures the same again.
        counts: images, captions, classes, captions cut, images skipped.
        figures: each with its 95 % interval; shares in [0, 1], ranks from 1, logit scales.
        outcome: the single queries or items, as ``Retrieval`` or ``Classification``.
        notes: what to keep in mind about this data, in sentences.
        skipped: images that could not be used.
        cut: what was cut from captions over 77 tokens, in words; empty if nothing was.
    """

    task: str
    model: ModelRef
    data: str
    fingerprint: str
    settings: dict[str, Any]
    counts: dict[str, int]
    figures: dict[str, Estimate]
    outcome: "Retrieval | Classification"
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    cut: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """The figures without their intervals."""
        return {name: estimate.value for name, estimate in self.figures.items()}

    def _repr_html_(self) -> str:
        rows = [
            (name, f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}")
            for name, one in self.figures.items()
        ]
        title = f"{self.task} on {self.data}: {self.counts['images']:,} images, {self.model}"
        return card(title, []) + table(("", "", "95 % interval"), rows) + bullets(self.notes)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; what is no number is None."""
        return {
            "task": self.task,
            "model": str(self.model),
            "fingerprint": self.model.fingerprint,
            "precision": self.model.precision,
            "data": self.data,
            "data_fingerprint": self.fingerprint,
            "settings": self.settings,
            **self.counts,
            **{name: _known(value) for name, value in self.metrics.items()},
            "intervals": {
                name: [_known(one.low), _known(one.high)] for name, one in self.figures.items()
            },
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Retrieval:
    """The queries of a retrieval: the outcome of each direction beside what was asked.

    Attributes:
        found: outcomes by direction.
        keys: the images' keys.
        texts: the captions; equal ones once, if they were merged.
    """

    found: dict[str, Retrieved]
    keys: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Classification:
    """The items of a classification beside what was said of them.

    Attributes:
        found: what the classifier said.
        keys: the images' keys.
        labels: the classes.
        scale: the classifier's logit scale; fitted: the one at which right classes are likeliest
            on these items (None for fewer than 20).
    """

    found: Classified
    keys: list[str]
    labels: list[str]
    scale: float
    fitted: float | None


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


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
