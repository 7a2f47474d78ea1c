"""Whether probabilities mean what they say, and the logit scale at which they do."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
BINS = 15
"""Bins of equal width over [0, 1] (Guo et al. 2017, section 2)."""
_STEPS = 50
_ENOUGH = 1e-9


@dataclass(frozen=True)
class Bin:
    """Items whose confidence lies in ``(low, high]``: how many, their mean confidence, the share
    that is right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def bins_of(confidence: Numbers) -> NDArray[np.int64]:
    """The bin of each confidence, int64 [n] from 0 to 14."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def calibration_sums(confidence: Numbers, right: NDArray[np.bool_], weights: Numbers) -> Numbers:
    """The expected calibration error times the sum of the weights, float64 [b].

    Args:
        confidence: float64 [n], probability of what was said.
        right: bool [n], whether it was right.
        weights: float64 [b, n], how often each item counts.
    """
    bins, gaps = bins_of(confidence), right - confidence
    # A column per bin: its items' gaps between being right and what was said.
    table = np.zeros((len(gaps), BINS))
    table[np.arange(len(gaps)), bins] = gaps
    sums: Numbers = np.abs(weights @ table).sum(axis=1)
    return sums


def reliability(confidence: Numbers, right: NDArray[np.bool_]) -> list[Bin]:
    """The bins that hold items, for a reliability diagram."""
    bins = bins_of(confidence)
    return [
        Bin(
            number / BINS,
            (number + 1) / BINS,
            int(inside.sum()),
            float(confidence[inside].mean()),
            float(right[inside].mean()),
        )
        for number in range(BINS)
        if (inside := bins == number).any()
    ]


def fit_scale(logits: NDArray[np.floating], targets: NDArray[np.int64]) -> float:
    """The number by which to multiply logits so that the right classes are likeliest together.

    Temperature scaling (Guo et al. 2017, section 4.2): the mean surprise is convex in the factor,
    and Newton's method finds its lowest point, held within a bracket.

    Args:
        logits: [n, classes].
        targets: int64 [n], the right class of each.

    Returns:
        the factor, from 1e-3 to 1e3.
    """
    values = np.asarray(logits, np.float64)
    right = values[np.arange(len(targets)), targets].mean()
    low, high, factor = 1e-3, 1e3, 1.0
    for _ in range(_STEPS):
        odds = np.exp(factor * (values - values.max(axis=1, keepdims=True)))
        odds /= odds.sum(axis=1, keepdims=True)
        means = (odds * values).sum(axis=1)
        slope = means.mean() - right
        curve = ((odds * values**2).sum(axis=1) - means**2).mean()
        low, high = (factor, high) if slope < 0 else (low, factor)
        step = factor - slope / curve if curve > 0 else np.inf
        new = step if low < step < high else float(np.sqrt(low * high))
        if abs(new - factor) <= _ENOUGH * factor:
            break
        factor = float(new)
    return float(factor)


def cross_fitted(
    logits: NDArray[np.floating], targets: NDArray[np.int64], *, seed: int = 0
) -> NDArray[np.float32]:
    """Probabilities [n, classes] at a scale that was fitted on the half an item is not in.

    Args:
        logits: [n, classes]; two items at least.
        targets: int64 [n], the right class of each.
        seed: deals the items out.
    """
    order = np.random.default_rng(seed).permutation(len(targets))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    result = np.empty(np.shape(logits), np.float32)
    for mine, other in (halves, halves[::-1]):
        result[mine] = softmax(fit_scale(logits[other], targets[other]) * logits[mine])
    return result


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Probabilities of logits, row by row: [n, classes] to float32 [n, classes]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)
