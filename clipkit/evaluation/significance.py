"""Whether two models that were measured on the same items differ by more than chance.

Two models on the same items: differences with error bars, and whether they could be chance.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from clipkit.evaluation.bootstrap import Estimate, Figures, estimate_difference
from clipkit.evaluation.classification import Classified, classification_figures, item_sums
from clipkit.evaluation.retrieval import DIRECTIONS, Retrieved, image_sums, retrieval_figures

FLIPS = 10_000
"""Random signs of a test: the smallest p-value it can tell is 1 / 10,001."""
_NUMBERS = 1 << 22  # signs drawn at a time


def sign_flip_test(differences: NDArray[np.float64], *, seed: int = 0) -> float:
    """The p-value of the sum of paired differences, two-sided.

    If two models were equally good, the sign of each item's difference would be chance. Where all
    differences are of one size (right or wrong, one answer an item) the distribution is known and
    the test is McNemar's exact one (1947); else random signs stand for it (Fisher 1935, §21).

    Args:
        differences: float64 [items], of what each item adds to a figure; items that are drawn
            together, as the captions of an image, are added up before.
        seed: of the signs.
    """
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    sizes = np.abs(moved)
    if np.ptp(sizes) <= 1e-12 * sizes.max():
        return mcnemar(int((moved > 0).sum()), int((moved < 0).sum()))
    generator = np.random.default_rng(seed)
    # Sums that are equal but for rounding count as equal.
    seen = abs(moved.sum()) - 1e-9 * sizes.sum()
    size, beyond = max(1, _NUMBERS // len(moved)), 0
    for start in range(0, FLIPS, size):
        rows = min(size, FLIPS - start)
        signs = generator.integers(0, 2, (rows, len(moved)), dtype=np.int8) * 2 - 1
        beyond += int((np.abs(signs @ moved) >= seen).sum())
    return (beyond + 1) / (FLIPS + 1)


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p-value that so many of ``better + worse`` coins fall on one side."""
    count, least = better + worse, min(better, worse)
    if not count:
        return 1.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        for k in range(least + 1)
    ]
    top = max(logs)
    tail = math.fsum(math.exp(log - top) for log in logs)
    return min(1.0, 2 * math.exp(top - count * math.log(2)) * tail)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values that hold for all of several tests together (Holm 1979)."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


MEAN_RECALL = "mean_recall"
"""Mean of recall@1, 5 and 10 in both directions: the one figure that a retrieval is judged by."""
_MEAN_OF = (1, 5, 10)
ALPHA = 0.05
"""A difference that chance alone makes more rarely than so is called one."""
LOWER_IS_BETTER = ("median_rank", "nll", "ece")
"""Ends of the names of such figures."""
Sums = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Difference:
    """A figure of two models and how much higher it is of the second.

    Attributes:
        name: of the figure.
        one: of the first model.
        other: of the second.
        difference: ``other - one`` with its 95 % interval.
        p: how likely a difference at least as large is if the models are equally good; corrected
            for the number of tests where it stands among several; None for figures that are no
            means over items, for which the interval must do.
    """

    name: str
    one: float
    other: float
    difference: Estimate
    p: float | None

    @property
    def better(self) -> int | None:
        """0 or 1: the model that does better; None if that could be chance."""
        change = self.difference
        if self.p is None:
            sure = change.low > 0 or change.high < 0
        else:
            sure = self.p < ALPHA and change.value != 0
        return int((change.value > 0) != self.name.endswith(LOWER_IS_BETTER)) if sure else None


def compare_retrieval(
    one: dict[str, Retrieved], other: dict[str, Retrieved], images: int
) -> tuple[Difference, list[Difference]]:
    """The difference of mean recall, and of every figure; images are what is drawn anew.

    Args:
        one: outcomes of the first model.
        other: of the second, on the same images and captions.
        images: how many there are.
    """
    return _compare(
        MEAN_RECALL,
        partial(_with_mean_recall, one),
        partial(_with_mean_recall, other),
        _retrieval_sums(one, images),
        _retrieval_sums(other, images),
    )


def compare_classification(
    one: Classified, other: Classified
) -> tuple[Difference, list[Difference]]:
    """The difference of top-1 accuracy, and of every figure.

    Args:
        one: what the first model said.
        other: what the second said of the same items.
    """
    return _compare(
        "top1",
        partial(classification_figures, one),
        partial(classification_figures, other),
        item_sums(one),
        item_sums(other),
    )


def _compare(
    headline: str, one: Figures, other: Figures, one_sums: Sums, other_sums: Sums
) -> tuple[Difference, list[Difference]]:
    items = len(next(iter(one_sums.values())))
    whole = np.ones((1, items))
    values, others = one(whole), other(whole)
    differences = estimate_difference(one, other, items)
    tests = {name: sign_flip_test(other_sums[name] - sums) for name, sums in one_sums.items()}
    adjusted = holm({name: p for name, p in tests.items() if name != headline})

    def row(name: str, p: float | None) -> Difference:
        first, second = float(values[name][0]), float(others[name][0])
        return Difference(name, first, second, differences[name], p)

    rows = [row(name, adjusted.get(name)) for name in values if name != headline]
    return row(headline, tests[headline]), rows


def _with_mean_recall(
    outcomes: dict[str, Retrieved], weights: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    figures = retrieval_figures(outcomes, weights)
    parts = [figures[name] for name in _mean_names(outcomes)]
    return {MEAN_RECALL: np.mean(parts, axis=0), **figures}


def _retrieval_sums(outcomes: dict[str, Retrieved], images: int) -> Sums:
    """What each image adds to each figure that is a mean over queries."""
    sums: Sums = {}
    for direction, found in outcomes.items():
        for name, values in image_sums(found, images).items():
            sums[f"{direction}_{name}"] = values / len(found.queries)
    sums[MEAN_RECALL] = np.sum([sums[name] for name in _mean_names(outcomes)], axis=0)
    return sums


def _mean_names(outcomes: dict[str, Retrieved]) -> list[str]:
    return [
        f"{direction}_r{k}"
        for direction in DIRECTIONS
        for k in _MEAN_OF
        if k <= outcomes[direction].gallery
    ]
