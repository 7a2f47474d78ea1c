"""Calibration of probabilities: expected calibration error and temperature scaling."""

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
    """Items with a confidence in ``(low, high]``: their number, mean confidence and accuracy.

    If items have weights, the means are weighted; the number is that of the items.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def bin_numbers(confidence: Numbers) -> NDArray[np.int64]:
    """The bin of each confidence: int64 [n] from 0 to 14."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def expected_calibration_error(
    confidence: Numbers, correct: NDArray[np.bool_] | Numbers, weights: Numbers
) -> Numbers:
    """The mean gap between accuracy and confidence over the bins (Guo et al. 2017): float64 [b].

    Args:
        confidence: float64 [n], the probability of the predicted class.
        correct: bool [n], whether the prediction is correct, or float64 [n], how probably.
        weights: float64 [b, n], how often each item counts.
    """
    # One column per bin, with the gaps of its items.
    table = np.zeros((len(confidence), BINS))
    table[np.arange(len(confidence)), bin_numbers(confidence)] = correct - confidence
    errors: Numbers = np.abs(weights @ table).sum(axis=1) / weights.sum(axis=1)
    return errors


def reliability(
    confidence: Numbers, correct: NDArray[np.bool_] | Numbers, weights: Numbers | None = None
) -> list[Bin]:
    """The non-empty bins of a reliability diagram.

    Args:
        confidence: float64 [n].
        correct: bool [n], or float64 [n], how probably.
        weights: float64 [n], above 0; None: all items count the same.
    """
    numbers = bin_numbers(confidence)
    weights = np.ones(len(confidence)) if weights is None else weights
    return [
        Bin(
            number / BINS,
            (number + 1) / BINS,
            int(inside.sum()),
            float(np.average(confidence[inside], weights=weights[inside])),
            float(np.average(correct[inside], weights=weights[inside])),
        )
        for number in range(BINS)
        if (inside := numbers == number).any()
    ]


def fit_logit_scale(logits: NDArray[np.floating], targets: NDArray[np.int64]) -> float:
    """The factor for the logits with the lowest negative log-likelihood.

    This is temperature scaling (Guo et al. 2017, section 4.2). The loss is convex in the factor, so
    Newton's method within a bracket finds the minimum in about 8 passes over the logits.

    Args:
        logits: [n, classes].
        targets: int64 [n], the correct class of each item.

    Returns:
        The factor, from 1e-3 to 1e3.
    """
    values = np.asarray(logits, np.float64)
    correct = values[np.arange(len(targets)), targets].mean()
    low, high, factor = 1e-3, 1e3, 1.0
    for _ in range(_STEPS):
        odds = softmax(factor * values)
        means = (odds * values).sum(axis=1)
        slope = means.mean() - correct
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
) -> NDArray[np.floating]:
    """Probabilities [n, classes] at a logit scale fitted on the half that an item is not in.

    Args:
        logits: [n, classes], at least two items.
        targets: int64 [n], the correct class of each item.
        seed: of the split into halves.
    """
    order = np.random.default_rng(seed).permutation(len(targets))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    result = np.empty_like(logits)
    for mine, other in (halves, halves[::-1]):
        result[mine] = softmax(fit_logit_scale(logits[other], targets[other]) * logits[mine])
    return result


def softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Probabilities along the last axis, in the type of the logits."""
    # scipy.special.softmax takes 1.2 to 1.6 times as long for float32 [5,000, 1,000], and 0.2 s to
    # import.
    shifted: NDArray[np.floating] = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted
