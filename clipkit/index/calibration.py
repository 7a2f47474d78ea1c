"""Calibration: the probability that a hit shows what its text query describes.

An inner product of 0.31 means little: it depends on the model, on the wording of the query and on
the content of the index. Logistic regression (Platt 1999) turns it into a probability by its
margin, its distance above the query's mean score over the whole index. The positive examples are
captions of indexed images, with the best score among the eighth of the images most like their own.
The negative examples are best scores without a match: of the same captions among all other images,
and of random words.
"""

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import ArtifactError
from clipkit.evaluation.calibration import expected_calibration_error
from clipkit.evaluation.classification import auroc
from clipkit.index.exact import Floats, Integers, search_exact, take_rows

FOLDS = 5
"""The errors are measured on captions that the regression has not seen, a fifth at a time."""
LEAST_AUROC = 0.6
"""Least AUROC of matches against non-matches for which probabilities are shown; 0.5 is chance."""
GOOD = 0.5
"""A best hit with a lower probability is not a good match."""
LIKE = 1 / 8
"""Share of the images that may match a caption of another one. With a half, calibration is too
confident: captions of aerial photos count as found among Flickr8k's photos in three of four cases,
with an eighth in under half (chosen on Flickr8k dev)."""
SAMPLE = 4096
"""Rows on which it is found how like an image these are."""
RIDGE = 1e-3
"""Keeps the slope finite where the two kinds of scores do not overlap."""
Blocks = Callable[[], Iterable[Floats]]
"""Gives the vectors in row order, in arrays of any sizes, each time it is called."""


@dataclass(frozen=True)
class Calibration:
    """How scores of an index become probabilities.

    Attributes:
        background: float32 [dim], the mean vector of the index.
        weights: of the margin over the mean score, and a constant.
        auroc: how surely a best hit that is right scores above one that is not; 0.5 is guessing.
        error: expected calibration error of the probabilities (Guo et al. 2017, eq. 3).
        captions: how many it was made of.
        source: where those come from.
    """

    background: Floats
    weights: tuple[float, float]
    auroc: float
    error: float
    captions: int
    source: str

    @property
    def informative(self) -> bool:
        """Whether the model's scores say anything."""
        return self.auroc >= LEAST_AUROC and self.weights[0] > 0

    def probabilities(self, query: Floats, scores: Floats) -> Floats | None:
        """The probability of each hit of a caption; None where the scores say nothing.

        Args:
            query: float32 [dim], the caption's vector.
            scores: float32 [k], of its hits.
        """
        if not self.informative:
            return None
        slope, constant = self.weights
        margins = scores.astype(np.float64) - float(query @ self.background)
        return _sigmoid(slope * margins + constant).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a manifest."""
        return {
            "background": base64.b64encode(self.background.astype("<f4").tobytes()).decode(),
            "weights": [round(weight, 6) for weight in self.weights],
            "auroc": round(self.auroc, 4),
            "error": round(self.error, 4),
            "captions": self.captions,
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any], dim: int) -> Self:
        """What ``to_dict`` gave.

        Raises:
            ArtifactError: it is damaged.
        """
        try:
            background = np.frombuffer(base64.b64decode(raw["background"]), "<f4")
            slope, constant = map(float, raw["weights"])
            if background.shape != (dim,):
                raise ValueError(f"a background of {len(background)} numbers")
            figures = float(raw["auroc"]), float(raw["error"]), int(raw["captions"])
            return cls(background, (slope, constant), *figures, str(raw["source"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the calibration in the manifest cannot be read ({error}), expected one written "
                "by `clipkit index calibrate`; run that again"
            ) from None


def calibrate(
    captions: Floats, rows: Integers, nonsense: Floats, blocks: Blocks, source: str
) -> Calibration:
    """Learn what scores mean.

    Args:
        captions: float32 [m, dim], vectors of captions.
        rows: int64 [m], the row of the image each was written for; empty if unknown:
            then their best hits, right or not, are compared with those of nonsense alone.
        nonsense: float32 [g, dim], vectors of queries that nothing fits.
        blocks: gives the vectors of the index.
        source: where the captions come from.
    """
    background, sample = _survey(blocks)
    empty = search_exact(nonsense, blocks(), 1)[0][:, 0]
    if len(rows):
        there, absent = _best_near_and_far(captions, rows, sample, blocks)
    else:
        there, absent = search_exact(captions, blocks(), 1)[0][:, 0], np.empty(0, np.float32)
    groups = [(captions, there), (captions[: len(absent)], absent), (nonsense, empty)]
    margins = np.concatenate([best - asked @ background for asked, best in groups])
    margins = margins.astype(np.float64)
    number = np.concatenate([np.arange(len(best)) for _, best in groups])
    kind = np.repeat(np.arange(3), [len(best) for _, best in groups])
    chance = np.empty(len(margins))
    for fold in range(FOLDS):  # a caption is in one fold with both of its scores
        seen = number % FOLDS != fold
        slope, constant = _fit(margins[seen], kind[seen] == 0)
        chance[~seen] = _sigmoid(slope * margins[~seen] + constant)
    return Calibration(
        background,
        _fit(margins, kind == 0),
        auroc(margins[kind == 0], margins[kind == (1 if len(absent) else 2)]),
        _balanced_error(chance, kind == 0),
        len(captions),
        source,
    )


def _best_near_and_far(
    captions: Floats, rows: Integers, sample: Floats, blocks: Blocks
) -> tuple[Floats, Floats]:
    """Each caption's best score among the images most like its own, and among all others.

    The others are more: a model without any ability scores higher there.
    """
    own = take_rows(blocks(), rows)
    limit = np.quantile(sample @ own.T, 1 - LIKE, axis=0).astype(np.float32)
    best = np.full((2, len(captions)), -np.inf, np.float32)
    for block in blocks():
        scores, like = block @ captions.T, block @ own.T
        # Its own image is like itself, however little float32 agrees.
        for part, inside in enumerate((like >= np.minimum(limit, 1 - 1e-4), like < limit)):
            top = np.where(inside, scores, -np.inf).max(axis=0, initial=-np.inf)
            best[part] = np.maximum(best[part], top)
    return best[0], best[1]


def _balanced_error(chance: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Expected calibration error with the same total weight for both classes."""
    weights = np.where(right, 0.5 / right.sum(), 0.5 / (~right).sum())
    return float(expected_calibration_error(chance, right, weights[None])[0])


def _fit(margins: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and constant of a logistic regression, both classes weighing the same, by Newton."""
    centre, scale = margins.mean(), margins.std() + 1e-12
    inputs = np.stack([(margins - centre) / scale, np.ones(len(margins))], axis=1)
    share = np.where(right, 0.5 / right.sum(), 0.5 / (~right).sum())
    ridge = np.diag([RIDGE, 0.0])
    weights = np.zeros(2)
    for _ in range(30):
        chance = _sigmoid(inputs @ weights)
        slope = inputs.T @ (share * (chance - right)) + ridge @ weights
        curve = (inputs.T * (share * chance * (1 - chance))) @ inputs + ridge
        step = np.linalg.solve(curve + 1e-12 * np.eye(2), slope)
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return float(weights[0] / scale), float(weights[1] - weights[0] * centre / scale)


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(values, -50, 50)))


def _survey(blocks: Blocks) -> tuple[Floats, Floats]:
    """The mean of all rows, and some of them spread over all: float32 [dim], [n, dim]."""
    count = sum(len(block) for block in blocks())
    sample = take_rows(blocks(), np.arange(0, count, -(-count // SAMPLE)))
    total = sum(block.sum(axis=0, dtype=np.float64) for block in blocks())
    return np.asarray(total / count, np.float32), sample
