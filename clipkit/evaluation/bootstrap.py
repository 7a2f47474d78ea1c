"""Error bars: the bootstrap over items (Efron & Tibshirani 1993, chapter 13)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]
Figures = Callable[[Weights], dict[str, NDArray[np.float64]]]
"""From weights, float64 [b, items], to named figures, float64 [b] each."""

RESAMPLES = 1000
"""Enough for 95 % intervals: 25 of them lie beyond each end."""
LEVEL = 0.95
_NUMBERS = 1 << 22  # weights held at a time, 32 MiB


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(figures: Figures, items: int, *, seed: int = 0) -> dict[str, Estimate]:
    """Figures with percentile intervals, from one set of resamples for all of them.

    Args:
        figures: computes them for weighted items; a resample is so many whole weights.
        items: what is drawn anew, with replacement.
        seed: of the draws.
    """
    values = figures(np.ones((1, items)))
    drawn = [figures(weights) for weights in resamples(items, seed)]
    found = {}
    for name, value in values.items():
        low, high = interval(np.concatenate([part[name] for part in drawn]))
        found[name] = Estimate(float(value[0]), low, high)
    return found


def estimate_difference(
    one: Figures, other: Figures, items: int, *, seed: int = 0
) -> dict[str, Estimate]:
    """How much higher the figures of ``other`` are, both measured on the same resamples.

    Args:
        one: the figures of a model.
        other: those of another one, over the same items.
        items: what is drawn anew, with replacement.
        seed: of the draws.
    """

    def difference(weights: Weights) -> dict[str, NDArray[np.float64]]:
        first, second = one(weights), other(weights)
        return {name: second[name] - first[name] for name in first}

    return estimate(difference, items, seed=seed)


def resamples(items: int, seed: int, count: int = RESAMPLES) -> Iterator[Weights]:
    """How often each item is drawn in each resample: float64 [b, items], block after block."""
    generator = np.random.default_rng(seed)
    size = max(1, min(count, _NUMBERS // max(items, 1)))
    for start in range(0, count, size):
        rows = min(size, count - start)
        drawn = generator.integers(0, items, (rows, items))
        drawn += np.arange(rows)[:, None] * items
        counts = np.bincount(drawn.ravel(), minlength=rows * items)
        yield counts.reshape(rows, items).astype(np.float64)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of values; those that are no number, for nothing was drawn, are left out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
