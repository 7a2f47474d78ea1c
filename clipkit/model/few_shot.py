"""Learn classifiers from a few labelled vectors; a held-out part chooses their settings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from clipkit.errors import ConfigError
from clipkit.metrics.calibration import softmax
from clipkit.model.classifier import Classifier, Vectors, ZeroShotClassifier
from clipkit.model.heads import LinearHead, NeighbourHead, TipAdapterHead, one_hot
from clipkit.model.logistic import LogisticRegression

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Weights of the data against that of small coefficients, weakest first (scikit-learn's ``C``)."""
NEIGHBOURS = (1, 3, 5, 10, 20)
ALPHAS = (0.0, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
BETAS = (1.0, 2.0, 3.5, 5.5, 8.0, 12.0, 20.0)
EPOCHS, RATE, BATCH = 20, 1e-3, 256
"""Of fine-tuning (Zhang et al. 2022, section 4.1)."""
_ALPHA, _BETA = 1.0, 5.5  # while fine-tuning, as in the paper's equation 6


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
    regression = LogisticRegression(shots.vectors, shots.targets, len(text.labels))
    heads = []
    for strength in STRENGTHS:
        weights, bias = (part.numpy().astype(np.float32) for part in regression.fit(strength))
        heads.append(LinearHead(text.labels, weights, bias, text.model))
    return _best(heads, held_out)


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
    return _strongest(text, shots.vectors, values, held_out)


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
    return _strongest(text, keys.detach().numpy(), values, held_out)


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


def _strongest(
    text: ZeroShotClassifier, keys: Vectors, values: Vectors, held_out: Labelled
) -> TipAdapterHead:
    """The Tip-Adapter of these labelled vectors whose strengths serve the held-out examples best.

    Nearness is computed once for each ``beta`` and captions once for all, as the head would.
    """
    captions, similar = text.logits(held_out.vectors), held_out.vectors @ keys.T
    merits = {}
    for beta in BETAS:
        votes = np.exp(-beta * (1 - similar)) @ values
        for alpha in ALPHAS:
            merits[alpha, beta] = _merit(captions + alpha * votes, held_out.targets)
    strengths = max(merits, key=merits.__getitem__)
    return TipAdapterHead(
        text.labels, text.weights, (keys, values), strengths, text.scale, text.model
    )


def _merit(logits: Vectors, targets: NDArray[np.int64]) -> tuple[float, float]:
    """How often logits are right, and how little they are surprised by what is."""
    right = softmax(logits)[np.arange(len(targets)), targets]
    surprise = np.log(np.maximum(right, 1e-30)).mean()
    return float((logits.argmax(axis=1) == targets).mean()), float(surprise)


def _best(heads: Iterable[Head], held_out: Labelled) -> Head:
    """The head that is right most often; of equal ones that which is surprised least."""
    return max(heads, key=lambda head: _merit(head.logits(held_out.vectors), held_out.targets))
