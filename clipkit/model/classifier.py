"""Captions as class weights: the zero-shot classifier of CLIP."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipkit.data.prompts import DEFAULT_TEMPLATES, check_labels, label_captions
from clipkit.errors import ModelMismatchError
from clipkit.manifest import ModelRef
from clipkit.model.encoder import Encoder


@dataclass(frozen=True)
class Prediction:
    """One label for one image; score is its probability in [0, 1], higher is better."""

    key: str
    label: str
    score: float


class ZeroShotClassifier:
    """Class weights made of captions (Radford et al. 2021, section 3.1.4).

    Attributes:
        labels: the classes, in the order of the rows of ``weights``.
        weights: float32 [classes, dim], rows of unit length.
        scale: the model's logit scale.
        model: the model whose vectors it takes.
    """

    def __init__(
        self, labels: Sequence[str], weights: NDArray[np.float32], scale: float, model: ModelRef
    ) -> None:
        self.labels = list(labels)
        self.weights = weights
        self.scale = scale
        self.model = model

    @classmethod
    def from_labels(
        cls,
        encoder: Encoder,
        labels: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
    ) -> "ZeroShotClassifier":
        """Build the weights: per label, the mean of its captions' unit vectors, of unit length.

        Args:
            encoder: the model.
            labels: the classes.
            templates: captions with a ``{}`` where the label goes.

        Raises:
            CaptionError: labels or templates that are empty, repeated, or lack the slot.
        """
        check_labels(labels)
        captions = label_captions(labels, templates)
        vectors = encoder.encode_captions([text for texts in captions for text in texts])
        means = vectors.reshape(len(labels), len(templates), encoder.dim).mean(axis=1)
        weights = means / np.linalg.norm(means, axis=1, keepdims=True)
        return cls(labels, weights.astype(np.float32), encoder.scale, encoder.model)

    def probabilities(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Softmax over the classes at the model's temperature: [n, dim] to [n, classes].

        Raises:
            ModelMismatchError: the vectors are of another width.
        """
        if vectors.shape[-1] != self.model.dim:
            raise ModelMismatchError(
                f"the vectors have {vectors.shape[-1]} dimensions, expected {self.model.dim} of "
                f"{self.model}; encode the images with that model"
            )
        logits = self.scale * vectors @ self.weights.T
        logits -= logits.max(axis=1, keepdims=True)
        exponentials = np.exp(logits)
        return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), np.float32)

    def predict(
        self, vectors: NDArray[np.float32], keys: Sequence[str], k: int = 5
    ) -> list[list[Prediction]]:
        """The ``k`` likeliest labels of each image, best first.

        Args:
            vectors: float32 [n, dim], rows of unit length.
            keys: the images' keys.
            k: how many labels; at most as many as there are.
        """
        probabilities = self.probabilities(vectors)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
        return [
            [Prediction(key, self.labels[j], float(row[j])) for j in order]
            for key, row, order in zip(keys, probabilities, best, strict=True)
        ]
