"""Classifiers of image vectors, and the one that is made of captions, CLIP's zero-shot one.

Labels × templates as unit vectors, one a label; many captions are encoded once and kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from clipkit.artifacts import ModelRef
from clipkit.data.labels import parents, phrases_of
from clipkit.data.prompts import BACKGROUND, DEFAULT_TEMPLATES, check_labels, label_captions
from clipkit.errors import CaptionError, ModelMismatchError
from clipkit.evaluation.calibration import softmax
from clipkit.models.encoder import Encoder
from clipkit.models.tokenizer import CONTEXT, ROOM, encode, shorten
from clipkit.user_cache import key_of, user_cache

KEPT_FROM = 256
"""Captions; fewer are encoded again each time, in about a second."""
_AT_ONCE = 2048  # captions encoded between two moves of the bar


def class_weights(
    encoder: Encoder, labels: Sequence[str], templates: Sequence[str]
) -> NDArray[np.float32]:
    """Per label, the mean of its captions' unit vectors, of unit length: float32 [labels, dim].

    Args:
        encoder: the model.
        labels: the classes.
        templates: captions with a ``{}`` where the label goes.

    Raises:
        CaptionError: a template has no slot, or a caption does not fit in 77 tokens.
    """
    captions = label_captions(labels, templates)
    count = sum(map(len, captions))
    cache = user_cache() if count >= KEPT_FROM else None
    name = key_of("classes", encoder.model.fingerprint, encoder.model.precision, captions)
    kept = cache.get(name) if cache else None
    if kept is not None:
        return kept.arrays["weights"]
    weights = np.empty((len(labels), encoder.dim), np.float32)
    show = None if count > _AT_ONCE else True
    with tqdm(total=count, unit="caption", desc="encoding labels", disable=show) as bar:
        for first, last in _parts([len(texts) for texts in captions]):
            texts = [text for one in captions[first:last] for text in one]
            vectors = _encode(encoder, texts, labels[first:last])
            starts = np.cumsum([0, *(len(one) for one in captions[first : last - 1])])
            sums = np.add.reduceat(vectors, starts, axis=0)
            weights[first:last] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
            bar.update(len(texts))
    if cache:
        cache.put(name, {"weights": weights}, {})
    return weights


def background_weights(encoder: Encoder, labels: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of generic captions that share no word of weight with a label, float32 [m, dim]."""
    said = {word for label in labels for text in phrases_of(label) for word in text.lower().split()}
    texts = [text for text in BACKGROUND if not said & set(text.rstrip(".").split()[-1:])]
    return encoder.encode_text(texts)


def _parts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of labels with about so many captions as are encoded at once."""
    parts, first, held = [], 0, 0
    for number, size in enumerate(sizes):
        if held and held + size > _AT_ONCE:
            parts.append((first, number))
            first, held = number, 0
        held += size
    return [*parts, (first, len(sizes))]


def _encode(encoder: Encoder, texts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float32]:
    try:
        return encoder.encode_text(texts, policy="error")
    except CaptionError:
        for text in texts:
            needed = len(encode(text))
            if needed > ROOM:
                label = next(one for one in labels if any(p in text for p in phrases_of(one)))
                raise CaptionError(
                    f"the label {shorten(str(label), 60)!r} makes the caption "
                    f"{shorten(text, 60)!r} of {needed + 2} tokens, expected at most {CONTEXT}; "
                    "shorten it, or part it into several phrases with semicolons"
                ) from None
        raise


Vectors = NDArray[np.float32]
KEPT = 0.95
"""Share of images that do show a label which a calibrated rejection keeps."""


@dataclass(frozen=True)
class Prediction:
    """One label for one image; score is its probability in [0, 1], higher is better."""

    key: str
    label: str
    score: float


class Classifier(ABC):
    """Says for image vectors of one model which of its labels they show.

    Attributes:
        labels: the classes.
        scale: the logit scale, an inverse temperature.
        model: the model whose vectors it takes.
    """

    kind: ClassVar[str]

    def __init__(self, labels: Sequence[str], scale: float, model: ModelRef) -> None:
        self.labels = list(labels)
        self.scale = scale
        self.model = model

    @abstractmethod
    def logits(self, vectors: Vectors) -> Vectors:
        """What the softmax takes: [n, dim] to [n, classes]; higher is likelier."""

    @abstractmethod
    def arrays(self) -> dict[str, Vectors]:
        """All arrays that it is made of, by name."""

    def settings(self) -> dict[str, Any]:
        """What else it is made of."""
        return {"scale": self.scale}

    @property
    def fingerprint(self) -> str:
        """Changes with anything that its answers depend on."""
        made_of = {name: array.tobytes() for name, array in sorted(self.arrays().items())}
        return key_of(self.kind, self.model.fingerprint, self.labels, self.settings(), made_of)

    def require(self, model: ModelRef) -> None:
        """Raise ModelMismatchError unless the classifier was made for this model's vectors."""
        self.model.require(model, what="the classifier", repair="make it again with this model")

    def probabilities(self, vectors: Vectors) -> Vectors:
        """Softmax over the classes: [n, dim] to [n, classes].

        Raises:
            ModelMismatchError: the vectors are of another width.
        """
        if vectors.shape[-1] != self.model.dim:
            raise ModelMismatchError(
                f"the vectors have {vectors.shape[-1]} dimensions, expected {self.model.dim} of "
                f"{self.model}; encode the images with that model"
            )
        return softmax(self.logits(vectors))

    def predict(self, vectors: Vectors, keys: Sequence[str], k: int = 5) -> list[list[Prediction]]:
        """The ``k`` likeliest labels of each image, best first.

        Args:
            vectors: float32 [n, dim], rows of unit length.
            keys: the images' keys.
            k: how many labels; at most as many as there are.
        """
        return rank(self.probabilities(vectors), self.labels, keys, k)

    def group_probabilities(self, vectors: Vectors) -> dict[str, NDArray[np.float32]]:
        """The probability of each group above the labels, [n]: the sum of those below it."""
        found = self.probabilities(vectors)
        return {
            name: found[:, members].sum(axis=1) for name, members in parents(self.labels).items()
        }


def rank(
    scores: Vectors, labels: Sequence[str], keys: Sequence[str], k: int
) -> list[list[Prediction]]:
    """The ``k`` labels of highest score of each image, best first."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [
        [Prediction(key, labels[j], float(row[j])) for j in order]
        for key, row, order in zip(keys, scores, best, strict=True)
    ]


class ZeroShotClassifier(Classifier):
    """Class weights made of captions (Radford et al. 2021, section 3.1.4).

    Attributes:
        labels: the classes, in the order of the rows of ``weights``.
        weights: float32 [classes, dim], rows of unit length.
        scale: the model's logit scale.
        model: the model whose vectors it takes.
        background: float32 [captions, dim], what an image may show that no label names.
        threshold: the least probability of any label at which an image counts as showing one.
    """

    kind = "zero-shot"

    def __init__(
        self,
        labels: Sequence[str],
        weights: Vectors,
        scale: float,
        model: ModelRef,
        background: Vectors | None = None,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(labels, scale, model)
        self.weights, self.threshold = weights, threshold
        self.background = np.empty((0, model.dim), np.float32) if background is None else background

    @classmethod
    def from_labels(
        cls,
        encoder: Encoder,
        labels: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        background: bool = False,
    ) -> "ZeroShotClassifier":
        """Build the weights: per label, the mean of its captions' unit vectors, of unit length.

        Weights of many captions are kept in the person's cache.

        Args:
            encoder: the model.
            labels: the classes; those with synonyms (``Label``) have captions for each.
            templates: captions with a ``{}`` where the label goes.
            background: encode generic captions too, for ``any_of`` and ``each_alone``.

        Raises:
            CaptionError: labels or templates that are empty, repeated, lack the slot, or do not
                fit in 77 tokens.
        """
        check_labels(labels)
        weights = class_weights(encoder, labels, templates)
        generic = background_weights(encoder, labels) if background else None
        return cls(labels, weights, encoder.logit_scale, encoder.model, generic)

    def logits(self, vectors: Vectors) -> Vectors:
        """The scaled cosines of images and class weights."""
        return np.asarray(self.scale * vectors @ self.weights.T, np.float32)

    def arrays(self) -> dict[str, Vectors]:
        """The class weights and those of the generic captions."""
        return {"weights": self.weights, "background": self.background}

    def settings(self) -> dict[str, Any]:
        """The scale and the threshold."""
        return {"scale": self.scale, "threshold": self.threshold}

    @classmethod
    def restore(
        cls,
        labels: Sequence[str],
        model: ModelRef,
        arrays: Mapping[str, Vectors],
        settings: Mapping[str, Any],
    ) -> "ZeroShotClassifier":
        """The classifier of these arrays and settings."""
        return cls(
            labels,
            arrays["weights"],
            settings["scale"],
            model,
            arrays["background"],
            settings["threshold"],
        )

    def any_of(self, vectors: Vectors) -> NDArray[np.float32]:
        """The probability that an image shows any of the labels, [n].

        The labels' share in a softmax over labels and generic captions ("a photo of an object.").

        Raises:
            CaptionError: made without generic captions.
        """
        labels = _log_sum(self.logits(vectors))
        return _sigmoid(labels - self._generic(vectors))

    def each_alone(self, vectors: Vectors) -> Vectors:
        """The probability of each label by itself, against the generic captions: [n, classes].

        These do not add up to 1: an image may show several labels, or none.

        Raises:
            CaptionError: made without generic captions.
        """
        return _sigmoid(self.logits(vectors) - self._generic(vectors)[:, None])

    def calibrate(self, vectors: Vectors, kept: float = KEPT) -> None:
        """Set the threshold by images that do show one of the labels.

        Of further images like these at least the share ``kept`` stays above it, whatever the
        model (split conformal prediction, Vovk et al. 2005, section 2.2).

        Args:
            vectors: float32 [n, dim].
            kept: share of such images to keep, in (0, 1).

        Raises:
            CaptionError: too few images for that share, or made without generic captions.
        """
        scores = np.sort(self.any_of(vectors))
        place = int((1 - kept) * (len(scores) + 1) + 1e-9)
        if place < 1:
            least = int(np.ceil(1 / (1 - kept) - 1e-9)) - 1
            raise CaptionError(
                f"{len(scores)} images were given to calibrate rejection, expected at least "
                f"{least} to keep {kept:.0%}; add images that show one of the labels"
            )
        self.threshold = float(scores[place - 1])

    def _generic(self, vectors: Vectors) -> NDArray[np.float32]:
        if not len(self.background):
            raise CaptionError(
                "the classifier was made without generic captions, expected some to hold labels "
                "against; make it again with them"
            )
        return _log_sum(np.asarray(self.scale * vectors @ self.background.T, np.float32))


def _log_sum(logits: Vectors) -> NDArray[np.float32]:
    top = logits.max(axis=1)
    return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)), np.float32)


def _sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(0.5 * (1 + np.tanh(values / 2)), np.float32)
