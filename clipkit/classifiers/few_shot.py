"""Logistic regression on a few examples: exact, and of few steps.

Learn classifiers from a few labelled vectors; a held-out part chooses their settings.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from clipkit.classifiers.heads import LinearHead, NeighbourHead, TipAdapterHead, one_hot
from clipkit.classifiers.zero_shot import Classifier, Vectors, ZeroShotClassifier
from clipkit.errors import ConfigError
from clipkit.evaluation.calibration import softmax

_STEPS = 500
_GRADIENT = 3e-8
"""Largest part of the gradient at the end. Of 336 vectors of 21 classes and any strength the loss
is then right to five digits or more; 1e-9 takes twice the steps for one more."""


class LogisticRegression:
    """Examples, laid out so that weights of any strength are found in few steps.

    Of weights on centred examples the bias is another one and all else the same, and L-BFGS finds
    them in half the steps. The best ones lie in the span of the examples: they are looked for
    along its axes (a thin singular value decomposition), of which there are no more than examples.

    Args:
        vectors: float32 [n, dim].
        targets: int64 [n].
        classes: how many there are.
    """

    def __init__(
        self, vectors: NDArray[np.float32], targets: NDArray[np.int64], classes: int
    ) -> None:
        rows = torch.from_numpy(vectors).double()
        self._mean = rows.mean(dim=0)
        left, sizes, self._axes = torch.linalg.svd(rows - self._mean, full_matrices=False)
        self._rows, self._targets = left * sizes, torch.from_numpy(targets)
        self._weights = torch.zeros(classes, len(sizes), dtype=torch.float64)
        self._bias = torch.zeros(classes, dtype=torch.float64)

    def fit(self, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights, float64 [classes, dim], and bias that minimise the regularised surprise.

        That is the sum of the examples' cross-entropies times ``strength``, plus half the sum of
        the squared weights: convex, so that any start gives the same. It is begun from what was
        fitted last.

        Args:
            strength: of the data (scikit-learn's ``C``).
        """
        cost = 1 / (2 * strength * len(self._targets))
        weights, bias = self._weights.requires_grad_(), self._bias.requires_grad_()
        optimiser = torch.optim.LBFGS(
            [weights, bias],
            max_iter=_STEPS,
            tolerance_grad=_GRADIENT,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            surprise = cross_entropy(self._rows @ weights.T + bias, self._targets)
            loss = surprise + cost * weights.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimiser.step(closure)  # type: ignore[no-untyped-call]
        self._weights, self._bias = weights.detach(), bias.detach()
        turned = self._weights @ self._axes
        return turned, self._bias - turned @ self._mean


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: in small sums, two wait longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
