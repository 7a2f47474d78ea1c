"""Learn classifiers from a few labelled vectors; a held-out part chooses their settings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from clipkit.errors import ConfigError
from clipkit.metrics.calibration import softmax
from clipkit.model.classifier import Classifier, Vectors, ZeroShotClassifier
from clipkit.model.heads import LinearHead, NeighbourHead, TipAdapterHead, one_hot

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Weights of the data against that of small coefficients, weakest first (scikit-learn's ``C``)."""
NEIGHBOURS = (1, 3, 5, 10, 20)
ALPHAS = (0.0, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
BETAS = (1.0, 2.0, 3.5, 5.5, 8.0, 12.0, 20.0)
EPOCHS, RATE, BATCH = 20, 1e-3, 256
"""Of fine-tuning (Zhang et al. 2022, section 4.1)."""
_ALPHA, _BETA = 1.0, 5.5  # while fine-tuning, as in the paper's equation 6
_STEPS = 500


@dataclass(frozen=True)
class Labelled:
    """Vectors, float32 [n, dim], and their classes, int64 [n]."""

    vectors: Vectors
    targets: NDArray[np.int64]


Head = TypeVar("Head", bound=Classifier)
Fit = Callable[[Labelled, Labelled, ZeroShotClassifier], Classifier]
"""From shots, held-out examples and the captions' classifier to a learned one."""


def accuracy(classifier: Classifier, data: Labelled) -> float:
    """The share of examples whose likeliest label is right."""
    return float((classifier.logits(data.vectors).argmax(axis=1) == data.targets).mean())


def fit_linear(shots: Labelled, held_out: Labelled, text: ZeroShotClassifier) -> LinearHead:
    """Logistic regression, as strong as serves the held-out examples best."""
    classes, start = len(text.labels), None
    heads = []
    for strength in STRENGTHS:
        start = logistic_regression(shots, classes, strength, start)
        weights, bias = (part.numpy().astype(np.float32) for part in start)
        heads.append(LinearHead(text.labels, weights, bias, text.model))
    return _best(heads, held_out)


def logistic_regression(
    data: Labelled,
    classes: int,
    strength: float,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, float64 [classes, dim], and bias that minimise the regularised surprise.

    That is the sum of the examples' cross-entropies times ``strength``, plus half the sum of the
    squared weights: convex, so that any start gives the same.

    Args:
        data: examples.
        classes: how many there are.
        strength: of the data.
        start: weights and bias to begin from.
    """
    vectors = torch.from_numpy(data.vectors).double()
    targets = torch.from_numpy(data.targets)
    if start is None:
        start = (
            torch.zeros(classes, vectors.shape[1], dtype=torch.float64),
            torch.zeros(classes, dtype=torch.float64),
        )
    weights, bias = (part.clone().requires_grad_() for part in start)
    optimiser = torch.optim.LBFGS(
        [weights, bias],
        max_iter=_STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        surprise = cross_entropy(vectors @ weights.T + bias, targets)
        loss = surprise + weights.square().sum() / (2 * strength * len(targets))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()


def fit_neighbours(shots: Labelled, held_out: Labelled, text: ZeroShotClassifier) -> NeighbourHead:
    """Nearest neighbours, as many as serve the held-out examples best."""
    values = one_hot(shots.targets, len(text.labels))
    heads = (
        NeighbourHead(text.labels, shots.vectors, values, k, text.model)
        for k in NEIGHBOURS
        if k <= len(shots.targets)
    )
    return _best(heads, held_out)


def fit_tip_adapter(
    shots: Labelled, held_out: Labelled, text: ZeroShotClassifier
) -> TipAdapterHead:
    """Tip-Adapter without training: only its two strengths are chosen, on the held-out examples."""
    values = one_hot(shots.targets, len(text.labels))
    return _best(_strengths(text, shots.vectors, values), held_out)


def fit_tip_adapter_f(
    shots: Labelled, held_out: Labelled, text: ZeroShotClassifier
) -> TipAdapterHead:
    """Tip-Adapter-F: the labelled vectors are fine-tuned, then the strengths are chosen."""
    vectors, targets = torch.from_numpy(shots.vectors), torch.from_numpy(shots.targets)
    values = one_hot(shots.targets, len(text.labels))
    keys = vectors.clone().requires_grad_()
    cached = torch.from_numpy(values)
    captions = text.scale * vectors @ torch.from_numpy(text.weights).T
    optimiser = torch.optim.AdamW([keys], lr=RATE, eps=1e-4)
    parts = -(-len(targets) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS * parts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(targets), generator=generator), BATCH):
            near = torch.exp(-_BETA * (1 - vectors[rows] @ keys.T))
            loss = cross_entropy(captions[rows] + _ALPHA * near @ cached, targets[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return _best(_strengths(text, keys.detach().numpy(), values), held_out)


METHODS: dict[str, Fit] = {
    "linear": fit_linear,
    "neighbours": fit_neighbours,
    "tip-adapter": fit_tip_adapter,
    "tip-adapter-f": fit_tip_adapter_f,
}


def require_methods(names: Sequence[str]) -> list[str]:
    """Names of methods, as they are.

    Raises:
        ConfigError: one that is not known.
    """
    found = [name.strip() for name in names]
    for name in found:
        if name not in METHODS:
            raise ConfigError(
                f"{name!r} is no method to learn from a few images, expected one of "
                f"{', '.join(METHODS)}; name these"
            )
    return found


def _strengths(
    text: ZeroShotClassifier, keys: Vectors, values: Vectors
) -> Iterable[TipAdapterHead]:
    for alpha, beta in product(ALPHAS, BETAS):
        yield TipAdapterHead(
            text.labels, text.weights, (keys, values), (alpha, beta), text.scale, text.model
        )


def _best(heads: Iterable[Head], held_out: Labelled) -> Head:
    """The head that is right most often; of equal ones that which is surprised least."""

    def merit(head: Head) -> tuple[float, float]:
        odds = softmax(head.logits(held_out.vectors))
        right = odds[np.arange(len(held_out.targets)), held_out.targets]
        return accuracy(head, held_out), float(np.log(np.maximum(right, 1e-30)).mean())

    return max(heads, key=merit)
