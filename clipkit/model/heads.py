"""Classifiers that were learned from a few labelled vectors, over a model that stays as it is."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.manifest import ModelRef
from clipkit.model.classifier import Classifier, Vectors

VOTE_SCALE = 1 / 0.07
"""Neighbours vote with exp(cosine / 0.07) (Wu et al. 2018, section 4.1)."""
_LEAST = 1e-12  # votes of a class that no neighbour has


class LinearHead(Classifier):
    """Logistic regression on the vectors.

    Attributes:
        weights: float32 [classes, dim].
        bias: float32 [classes].
    """

    kind = "linear"

    def __init__(
        self, labels: Sequence[str], weights: Vectors, bias: Vectors, model: ModelRef
    ) -> None:
        super().__init__(labels, 1.0, model)
        self.weights, self.bias = weights, bias

    def logits(self, vectors: Vectors) -> Vectors:
        """The regression's linear function."""
        return np.asarray(vectors @ self.weights.T + self.bias, np.float32)

    def arrays(self) -> dict[str, Vectors]:
        """Weights and bias."""
        return {"weights": self.weights, "bias": self.bias}

    @classmethod
    def restore(
        cls,
        labels: Sequence[str],
        model: ModelRef,
        arrays: Mapping[str, Vectors],
        settings: Mapping[str, Any],
    ) -> "LinearHead":
        """The head of these arrays."""
        del settings
        return cls(labels, arrays["weights"], arrays["bias"], model)


class NeighbourHead(Classifier):
    """The ``k`` most similar labelled vectors vote; nearer ones count more.

    Attributes:
        keys: float32 [m, dim], the labelled vectors.
        values: float32 [m, classes], 1 where a vector has a class.
        k: how many vote.
    """

    kind = "neighbours"

    def __init__(
        self, labels: Sequence[str], keys: Vectors, values: Vectors, k: int, model: ModelRef
    ) -> None:
        super().__init__(labels, VOTE_SCALE, model)
        self.keys, self.values, self.k = keys, values, k

    def logits(self, vectors: Vectors) -> Vectors:
        """Logarithms of the votes, whose softmax is each class's share of them."""
        similar = vectors @ self.keys.T
        if self.k < len(self.keys):
            nearest = np.partition(similar, -self.k, axis=1)[:, -self.k :].min(axis=1)
            similar = np.where(similar >= nearest[:, None], similar, -np.inf)
        # Relative to the nearest one, so that no vote underflows.
        votes = np.exp(self.scale * (similar - similar.max(axis=1, keepdims=True))) @ self.values
        return np.asarray(np.log(np.maximum(votes, _LEAST)), np.float32)

    def arrays(self) -> dict[str, Vectors]:
        """The labelled vectors and their classes."""
        return {"keys": self.keys, "values": self.values}

    def settings(self) -> dict[str, Any]:
        """How many vote."""
        return {"k": self.k}

    @classmethod
    def restore(
        cls,
        labels: Sequence[str],
        model: ModelRef,
        arrays: Mapping[str, Vectors],
        settings: Mapping[str, Any],
    ) -> "NeighbourHead":
        """The head of these arrays and settings."""
        return cls(labels, arrays["keys"], arrays["values"], settings["k"], model)


class TipAdapterHead(Classifier):
    """Captions and labelled vectors together (Zhang et al. 2022, equations 5 and 6).

    Attributes:
        weights: float32 [classes, dim], made of captions.
        keys: float32 [m, dim], the labelled vectors, fine-tuned or not.
        values: float32 [m, classes], 1 where a vector has a class.
        alpha: weight of the labelled vectors beside the captions.
        beta: how quickly that of a vector falls with its distance.
    """

    kind = "tip-adapter"

    def __init__(
        self,
        labels: Sequence[str],
        weights: Vectors,
        cache: tuple[Vectors, Vectors],
        strength: tuple[float, float],
        scale: float,
        model: ModelRef,
    ) -> None:
        super().__init__(labels, scale, model)
        self.weights = weights
        self.keys, self.values = cache
        self.alpha, self.beta = strength

    def logits(self, vectors: Vectors) -> Vectors:
        """The captions' scaled cosines, and what near labelled vectors add."""
        near = np.exp(-self.beta * (1 - vectors @ self.keys.T))
        logits = self.scale * vectors @ self.weights.T + self.alpha * near @ self.values
        return np.asarray(logits, np.float32)

    def arrays(self) -> dict[str, Vectors]:
        """The captions' weights, and the labelled vectors with their classes."""
        return {"weights": self.weights, "keys": self.keys, "values": self.values}

    def settings(self) -> dict[str, Any]:
        """The scale and both strengths."""
        return {"scale": self.scale, "alpha": self.alpha, "beta": self.beta}

    @classmethod
    def restore(
        cls,
        labels: Sequence[str],
        model: ModelRef,
        arrays: Mapping[str, Vectors],
        settings: Mapping[str, Any],
    ) -> "TipAdapterHead":
        """The head of these arrays and settings."""
        return cls(
            labels,
            arrays["weights"],
            (arrays["keys"], arrays["values"]),
            (settings["alpha"], settings["beta"]),
            settings["scale"],
            model,
        )


def one_hot(targets: NDArray[np.int64], classes: int) -> Vectors:
    """Classes as rows with a single 1, float32 [n, classes]."""
    rows = np.zeros((len(targets), classes), np.float32)
    rows[np.arange(len(targets)), targets] = 1
    return rows
