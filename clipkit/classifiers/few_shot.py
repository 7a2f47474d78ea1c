"""Fit classifiers on a few labelled vectors; held-out vectors choose their hyperparameters."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from clipkit.arguments import require_items
from clipkit.classifiers.heads import LinearHead, NeighbourHead, TipAdapterHead, one_hot
from clipkit.classifiers.zero_shot import Classifier, Vectors, ZeroShotClassifier
from clipkit.errors import ConfigError
from clipkit.evaluation.calibration import softmax

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Inverse regularisation strengths of logistic regression (scikit-learn's ``C``)."""
_UNSEEN = -1e4  # the bias of a class without an example
_TOLERANCE, _STEPS = 1e-7, 3000
"""Of logistic regression. Probabilities are then within 0.003 of those at a gradient of 3e-8, for 4
and 16 shots of 21 and 100 classes; at the default of 1e-4, L-BFGS stops before its first step."""
NEIGHBOURS = (1, 3, 5, 10, 20)
ALPHAS = (0.0, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
BETAS = (1.0, 2.0, 3.5, 5.5, 8.0, 12.0, 20.0)
EPOCHS, LEARNING_RATE, BATCH_SIZE = 20, 1e-3, 256
"""Of the fine-tuning in Tip-Adapter-F (Zhang et al. 2022, section 4.1)."""
_ALPHA, _BETA = 1.0, 5.5  # during fine-tuning, as in the paper's equation 6


@dataclass(frozen=True)
class Labelled:
    """Vectors, float32 [n, dim], and their classes, int64 [n]."""

    vectors: Vectors
    targets: NDArray[np.int64]


Head = TypeVar("Head", bound=Classifier)
Fit = Callable[[Labelled, Labelled, ZeroShotClassifier], Classifier]
"""From shots, held-out examples and the zero-shot classifier to a fitted classifier."""


def accuracy(classifier: Classifier, data: Labelled) -> float:
    """Top-1 accuracy."""
    return float((classifier.logits(data.vectors).argmax(axis=1) == data.targets).mean())


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread. For sums this small, threads wait longer than they work: logistic
    regression for 16 shots of 100 classes takes 1.3 s on one thread and 16 s on two."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def fit_linear(shots: Labelled, held_out: Labelled, text: ZeroShotClassifier) -> LinearHead:
    """Logistic regression, with the regularisation that is best on the held-out examples."""
    from sklearn.linear_model import LogisticRegression

    # Centred vectors take half the steps, and change the intercept alone.
    mean = shots.vectors.mean(axis=0, dtype=np.float64)
    rows = shots.vectors - mean
    regression = LogisticRegression(warm_start=True, tol=_TOLERANCE, max_iter=_STEPS)
    heads = []
    for strength in STRENGTHS:
        regression.set_params(C=strength).fit(rows, shots.targets)
        coefficients, intercepts = regression.coef_, regression.intercept_
        if len(regression.classes_) == 2:  # scikit-learn keeps the difference of two classes
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercepts = np.array([-0.5, 0.5]) * intercepts
        weights = np.zeros((len(text.labels), rows.shape[1]), np.float32)
        bias = np.full(len(text.labels), _UNSEEN, np.float32)
        weights[regression.classes_] = coefficients
        bias[regression.classes_] = intercepts - coefficients @ mean
        heads.append(LinearHead(text.labels, weights, bias, text.model))
    return _best(heads, held_out)


def fit_neighbours(shots: Labelled, held_out: Labelled, text: ZeroShotClassifier) -> NeighbourHead:
    """Nearest neighbours, with the ``k`` that is best on the held-out examples."""
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
    """Tip-Adapter without training: the held-out examples choose alpha and beta."""
    values = one_hot(shots.targets, len(text.labels))
    return _best_tip_adapter(text, shots.vectors, values, held_out)


def fit_tip_adapter_f(
    shots: Labelled, held_out: Labelled, text: ZeroShotClassifier
) -> TipAdapterHead:
    """Tip-Adapter-F: fine-tune the labelled vectors, then choose alpha and beta."""
    vectors, targets = torch.from_numpy(shots.vectors), torch.from_numpy(shots.targets)
    values = one_hot(shots.targets, len(text.labels))
    keys = vectors.clone().requires_grad_()
    one_hot_rows = torch.from_numpy(values)
    captions = text.logit_scale * vectors @ torch.from_numpy(text.weights).T
    optimiser = torch.optim.AdamW([keys], lr=LEARNING_RATE, eps=1e-4)
    batches = -(-len(targets) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS * batches)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(targets), generator=generator), BATCH_SIZE):
            near = torch.exp(-_BETA * (1 - vectors[rows] @ keys.T))
            loss = cross_entropy(captions[rows] + _ALPHA * near @ one_hot_rows, targets[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return _best_tip_adapter(text, keys.detach().numpy(), values, held_out)


METHODS: dict[str, Fit] = {
    "linear": fit_linear,
    "neighbours": fit_neighbours,
    "tip-adapter": fit_tip_adapter,
    "tip-adapter-f": fit_tip_adapter_f,
}


def require_methods(names: Sequence[str]) -> list[str]:
    """The names of methods, without surrounding spaces.

    Raises:
        TypeError: ``names`` is a single string.
        ConfigError: a method is unknown.
    """
    found = [name.strip() for name in require_items("methods", names, "['linear']")]
    for name in found:
        if name not in METHODS:
            raise ConfigError(
                f"there is no few-shot method {name!r}; expected one of {', '.join(METHODS)}"
            )
    return found


def _best_tip_adapter(
    text: ZeroShotClassifier, keys: Vectors, values: Vectors, held_out: Labelled
) -> TipAdapterHead:
    """The Tip-Adapter with the alpha and beta that are best on the held-out examples.

    The votes are computed once for each beta, and the caption logits once for all.
    """
    captions, similar = text.logits(held_out.vectors), held_out.vectors @ keys.T
    merits = {}
    for beta in BETAS:
        votes = np.exp(-beta * (1 - similar)) @ values
        for alpha in ALPHAS:
            merits[alpha, beta] = _merit(captions + alpha * votes, held_out.targets)
    strengths = max(merits, key=merits.__getitem__)
    return TipAdapterHead(
        text.labels, text.weights, (keys, values), strengths, text.logit_scale, text.model
    )


def _best(heads: Iterable[Head], held_out: Labelled) -> Head:
    """The head with the best accuracy; of equal ones the one with the best likelihood."""
    return max(heads, key=lambda head: _merit(head.logits(held_out.vectors), held_out.targets))


def _merit(logits: Vectors, targets: NDArray[np.int64]) -> tuple[float, float]:
    """Accuracy and mean log-likelihood."""
    correct = softmax(logits)[np.arange(len(targets)), targets]
    likelihood = np.log(np.maximum(correct, 1e-30)).mean()
    return float((logits.argmax(axis=1) == targets).mean()), float(likelihood)
