"""Whether two models that were measured on the same items differ by more than chance."""

import math

import numpy as np
from numpy.typing import NDArray

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
