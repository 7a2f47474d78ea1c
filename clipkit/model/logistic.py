"""Logistic regression on a few examples: exact, and of few steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

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
