"""Confidence intervals: the percentile bootstrap over items (Efron & Tibshirani 1993, chapter 13).

A resample is a row of whole weights, one for each item, so that a metric is computed for many
resamples in one matrix product. ``scipy.stats.bootstrap`` would draw again for every metric, and
hands over values instead of weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]
Metrics = Callable[[Weights], dict[str, NDArray[np.float64]]]
"""From weights, float64 [b, items], to metrics by name, float64 [b] each."""

RESAMPLES = 1000
"""Enough for 95 % intervals: 25 resamples lie beyond each end."""
LEVEL = 0.95
_NUMBERS = 1 << 22  # weights in memory at a time, 32 MiB


@dataclass(frozen=True)
class Estimate:
    """The value of a metric and its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(metrics: Metrics, items: int, *, seed: int = 0) -> dict[str, Estimate]:
    """Metrics with percentile intervals, all from the same resamples.

    Args:
        metrics: computes the metrics for weighted items.
        items: the number of items to resample with replacement.
        seed: of the resamples.
    """
    values = metrics(np.ones((1, items)))
    drawn = [metrics(weights) for weights in resamples(items, seed)]
    estimates = {}
    for name, value in values.items():
        low, high = interval(np.concatenate([part[name] for part in drawn]))
        estimates[name] = Estimate(float(value[0]), low, high)
    return estimates


def estimate_difference(
    first: Metrics, second: Metrics, items: int, *, seed: int = 0
) -> dict[str, Estimate]:
    """How much higher the metrics of ``second`` are, with both measured on the same resamples.

    Args:
        first: the metrics of one model.
        second: the metrics of another model on the same items.
        items: the number of items to resample with replacement.
        seed: of the resamples.
    """

    def difference(weights: Weights) -> dict[str, NDArray[np.float64]]:
        one, other = first(weights), second(weights)
        return {name: other[name] - one[name] for name in one}

    return estimate(difference, items, seed=seed)


def resamples(items: int, seed: int, count: int = RESAMPLES) -> Iterator[Weights]:
    """How often each item is drawn in each resample: blocks of float64 [b, items]."""
    generator = np.random.default_rng(seed)
    size = max(1, min(count, _NUMBERS // max(items, 1)))
    for start in range(0, count, size):
        rows = min(size, count - start)
        drawn = generator.integers(0, items, (rows, items))
        drawn += np.arange(rows)[:, None] * items
        counts = np.bincount(drawn.ravel(), minlength=rows * items)
        yield counts.reshape(rows, items).astype(np.float64)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
