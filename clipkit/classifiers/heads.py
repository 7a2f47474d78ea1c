"""Classifiers that were learned from a few labelled vectors, over a model that stays as it is.

A classifier at rest: a directory with its arrays, its labels and the model it was made for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.artifacts import ArtifactWriter, Manifest, ModelRef, is_complete, read_manifest
from clipkit.classifiers.zero_shot import Classifier, Vectors, ZeroShotClassifier
from clipkit.data.labels import Label, path_of
from clipkit.errors import ArtifactError

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


ARRAYS = "classifier.safetensors"
_KINDS = {
    kind.kind: kind for kind in (ZeroShotClassifier, LinearHead, NeighbourHead, TipAdapterHead)
}


def save_classifier(
    classifier: Classifier, path: Path, source: Mapping[str, Any] | None = None
) -> None:
    """Write a classifier as a directory; one that stands there is replaced.

    Args:
        classifier: of any kind.
        path: where it shall stand.
        source: what it was made from, for the manifest.

    Raises:
        ArtifactError: ``path`` is taken by something else, or cannot be written.
    """
    from safetensors.numpy import save_file

    detail = {
        "type": classifier.kind,
        "labels": [list(path_of(label)) for label in classifier.labels],
        "settings": classifier.settings(),
    }
    manifest = Manifest(
        "classifier",
        classifier.model,
        len(classifier.labels),
        source=dict(source or {}),
        detail=detail,
    )
    with ArtifactWriter(path, "classifier", replace=True) as writer:
        save_file(classifier.arrays(), writer.temp / ARRAYS)
        writer.finish(manifest)


def is_classifier(path: Path) -> bool:
    """Whether a directory holds a classifier."""
    return is_complete(path) and read_manifest(path).kind == "classifier"


def open_classifier(path: Path) -> Classifier:
    """Read a classifier.

    Raises:
        ArtifactError: none, half-written, damaged, or of a kind that this clipkit does not know.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    manifest = read_manifest(path, "classifier")
    model, detail = manifest.require_model(), manifest.detail
    if detail.get("type") not in _KINDS:
        raise ArtifactError(
            f"{path} holds a classifier of type {detail.get('type')!r}, expected one of "
            f"{', '.join(_KINDS)}; upgrade clipkit to at least {manifest.clipkit}"
        )
    try:
        arrays = load_file(path / ARRAYS)
        labels = [Label(parts) for parts in detail["labels"]]
        kind: Any = _KINDS[detail["type"]]
        classifier: Classifier = kind.restore(labels, model, arrays, detail["settings"])
    except (OSError, SafetensorError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); make the classifier again") from None
    return classifier
