"""Classifiers of image vectors, and CLIP's zero-shot classifier, which is built from captions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from clipkit.artifacts import ModelRef
from clipkit.classifiers.predictions import LabelScore, Prediction, Predictions, rank
from clipkit.data.labels import Label, parents, to_labels
from clipkit.data.prompts import BACKGROUND, DEFAULT_TEMPLATES, check_labels, label_captions
from clipkit.errors import CaptionError, ModelMismatchError
from clipkit.evaluation.calibration import softmax
from clipkit.models.encoder import Encoder
from clipkit.models.tokenizer import CONTEXT, ROOM, encode, shorten
from clipkit.progress import progress_bar
from clipkit.user_cache import key_of, user_cache

Vectors = NDArray[np.float32]
ACCEPTED = 0.95
"""The share of images with a label that a calibrated rejection accepts."""
EVEN = 0.5
"""Judged by itself, a label is shown if it is more probable than the background captions."""
CACHED_FROM = 256
"""Weights of at least this many captions are cached; fewer are encoded in about a second."""
_AT_ONCE = 2048  # captions encoded per update of the progress bar


class Classifier(ABC):
    """Maps image vectors of one model to probabilities of labels.

    Attributes:
        labels: the classes.
        logit_scale: the inverse temperature of the softmax.
        model: the model whose vectors it takes.
    """

    kind: ClassVar[str]

    def __init__(self, labels: Sequence[str | Label], logit_scale: float, model: ModelRef) -> None:
        self.labels = to_labels(labels)
        self.logit_scale = logit_scale
        self.model = model

    @abstractmethod
    def logits(self, vectors: Vectors) -> Vectors:
        """The input of the softmax: float32 [n, dim] to [n, classes]."""

    @abstractmethod
    def arrays(self) -> dict[str, Vectors]:
        """The arrays to save, by name."""

    def settings(self) -> dict[str, Any]:
        """The numbers to save, by name."""
        return {"scale": self.logit_scale}

    @classmethod
    @abstractmethod
    def restore(
        cls,
        labels: Sequence[str | Label],
        model: ModelRef,
        arrays: Mapping[str, Vectors],
        settings: Mapping[str, Any],
    ) -> Self:
        """The classifier with these ``arrays()`` and ``settings()``."""

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the predictions depend on."""
        content = {name: array.tobytes() for name, array in sorted(self.arrays().items())}
        names = [str(label) for label in self.labels]
        return key_of(self.kind, self.model.fingerprint, names, self.settings(), content)

    def require(self, model: ModelRef) -> None:
        """Raise ModelMismatchError unless the classifier was built for this model's vectors."""
        self.model.require(model, what="the classifier", repair="build it again with this model")

    def probabilities(self, vectors: Vectors) -> Vectors:
        """Softmax over the classes: float32 [n, dim] to [n, classes].

        Raises:
            ModelMismatchError: the vectors have another dimension.
        """
        if vectors.shape[-1] != self.model.dim:
            raise ModelMismatchError(
                f"the vectors have {vectors.shape[-1]} dimensions, expected {self.model.dim} of "
                f"{self.model}; encode the images with that model"
            )
        return np.asarray(softmax(self.logits(vectors)), np.float32)

    def predict(self, vectors: Vectors, keys: Sequence[str], k: int = 5) -> Predictions:
        """The ``k`` most probable labels of each image, and the probabilities of groups of labels.

        Args:
            vectors: float32 [n, dim], unit rows.
            keys: the keys of the n images.
            k: labels per image, at most as many as there are.
        """
        probabilities = self.probabilities(vectors)
        predictions = rank(probabilities, self.labels, keys, k)
        groups = {
            name: probabilities[:, members].sum(axis=1)
            for name, members in parents(self.labels).items()
        }
        if groups:
            predictions = (
                replace(one, groups=_by_score({name: p[i] for name, p in groups.items()}))
                for i, one in enumerate(predictions)
            )
        return Predictions(tuple(predictions), self.model)


def _by_score(scores: Mapping[str, float]) -> tuple[LabelScore, ...]:
    found = [LabelScore(name, float(score)) for name, score in scores.items()]
    return tuple(sorted(found, key=lambda one: -one.score))


class ZeroShotClassifier(Classifier):
    """Class weights built from captions (Radford et al. 2021, section 3.1.4).

    Attributes:
        labels: the classes, in the order of the rows of ``weights``.
        weights: float32 [classes, dim], unit rows.
        logit_scale: of the model.
        model: the model whose vectors it takes.
        background: float32 [captions, dim], captions of what an image may show besides the labels.
        threshold: the lowest ``any_of`` at which an image counts as showing one of the labels.
    """

    kind = "zero-shot"

    def __init__(
        self,
        labels: Sequence[str | Label],
        weights: Vectors,
        logit_scale: float,
        model: ModelRef,
        background: Vectors | None = None,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(labels, logit_scale, model)
        self.weights, self.threshold = weights, threshold
        self.background = np.empty((0, model.dim), np.float32) if background is None else background

    @classmethod
    def from_labels(
        cls,
        encoder: Encoder,
        labels: Sequence[str | Label],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        background: bool = False,
    ) -> "ZeroShotClassifier":
        """Encode the captions of each label; their normalised mean is the weight of the label.

        Args:
            encoder: the model.
            labels: the classes; a ``Label`` with synonyms has captions for each of them. With
                ``background``, a single one suffices.
            templates: captions with a ``{}`` in place of the label.
            background: encode background captions too, for ``any_of`` and ``each_alone``.

        Raises:
            TypeError: ``labels`` or ``templates`` is a single string instead of a list.
            CaptionError: labels or templates are empty or repeated, lack the ``{}``, or do not fit
                in 77 tokens.
        """
        check_labels(labels, single=background)
        weights = class_weights(encoder, labels, templates)
        generic = background_weights(encoder, labels) if background else None
        return cls(labels, weights, encoder.logit_scale, encoder.model, generic)

    def logits(self, vectors: Vectors) -> Vectors:
        """The scaled cosines of images and class weights."""
        return np.asarray(self.logit_scale * vectors @ self.weights.T, np.float32)

    def arrays(self) -> dict[str, Vectors]:
        """The class weights and the background."""
        return {"weights": self.weights, "background": self.background}

    def settings(self) -> dict[str, Any]:
        """The logit scale and the threshold."""
        return {"scale": self.logit_scale, "threshold": self.threshold}

    @classmethod
    def restore(
        cls,
        labels: Sequence[str | Label],
        model: ModelRef,
        arrays: Mapping[str, Vectors],
        settings: Mapping[str, Any],
    ) -> Self:
        """The classifier with these ``arrays()`` and ``settings()``."""
        return cls(
            labels,
            arrays["weights"],
            settings["scale"],
            model,
            arrays["background"],
            settings["threshold"],
        )

    def any_of(self, vectors: Vectors) -> Vectors:
        """The probability that an image shows any of the labels: float32 [n, dim] to [n].

        It is the share of the labels in a softmax over labels and background captions.

        Raises:
            CaptionError: the classifier has no background captions.
        """
        labels = np.logaddexp.reduce(self.logits(vectors), axis=1)
        return np.asarray(
            np.exp(labels - np.logaddexp(labels, self._background_logits(vectors))), np.float32
        )

    def each_alone(self, vectors: Vectors) -> Vectors:
        """The probability of each label against the background captions: [n, dim] to [n, classes].

        The rows do not sum to 1: an image may show several labels, or none.

        Raises:
            CaptionError: the classifier has no background captions.
        """
        labels = self.logits(vectors)
        background = self._background_logits(vectors)[:, None]
        return np.asarray(np.exp(labels - np.logaddexp(labels, background)), np.float32)

    def predict_each(self, vectors: Vectors, keys: Sequence[str], k: int = 5) -> Predictions:
        """As ``predict``, with each label judged by itself.

        An image is rejected if no label is more probable than the background captions.

        Raises:
            CaptionError: the classifier has no background captions.
        """

        def judged(one: Prediction) -> Prediction:
            best = one.top[0].score
            return replace(one, shows_any=best, rejected=best < EVEN)

        found = rank(self.each_alone(vectors), self.labels, keys, k)
        return Predictions(tuple(map(judged, found)), self.model)

    def calibrate(self, vectors: Vectors, accepted: float = ACCEPTED) -> None:
        """Set the threshold by images that show one of the labels.

        At least the share ``accepted`` of further images like these is accepted, whatever the model
        (split conformal prediction, Vovk et al. 2005, section 2.2).

        Args:
            vectors: float32 [n, dim].
            accepted: the share of such images to accept, in (0, 1).

        Raises:
            CaptionError: too few images for this share, or no background captions.
        """
        scores = np.sort(self.any_of(vectors))
        place = int((1 - accepted) * (len(scores) + 1) + 1e-9)
        if place < 1:
            least = int(np.ceil(1 / (1 - accepted) - 1e-9)) - 1
            raise CaptionError(
                f"rejection was calibrated with {len(scores)} images, expected at least {least} to "
                f"accept {accepted:.0%}; add images that show one of the labels"
            )
        self.threshold = float(scores[place - 1])

    def _background_logits(self, vectors: Vectors) -> Vectors:
        """The logit of all background captions together: [n]."""
        if not len(self.background):
            raise CaptionError(
                "the classifier has no background captions, which rejection and independent labels "
                "need; build it again with background=True"
            )
        logits = np.asarray(self.logit_scale * vectors @ self.background.T, np.float32)
        return np.asarray(np.logaddexp.reduce(logits, axis=1), np.float32)


def class_weights(
    encoder: Encoder, labels: Sequence[str | Label], templates: Sequence[str]
) -> Vectors:
    """The normalised mean of the caption vectors of each label: float32 [labels, dim].

    Weights of many captions are stored in the user's cache.

    Args:
        encoder: the model.
        labels: the classes.
        templates: captions with a ``{}`` in place of the label.

    Raises:
        TypeError: ``labels`` or ``templates`` is a single string instead of a list.
        CaptionError: a template lacks the ``{}``, or a caption does not fit in 77 tokens.
    """
    labels = to_labels(labels)
    captions = label_captions(labels, templates)
    count = sum(map(len, captions))
    cache = user_cache() if count >= CACHED_FROM else None
    name = key_of("classes", encoder.model.fingerprint, encoder.model.precision, captions)
    cached = cache.get(name) if cache else None
    if cached is not None:
        return cached.arrays["weights"]
    weights = np.empty((len(labels), encoder.dim), np.float32)
    shown = count > _AT_ONCE
    with progress_bar(total=count, unit="caption", desc="encoding labels", shown=shown) as bar:
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


def background_weights(encoder: Encoder, labels: Sequence[str | Label]) -> Vectors:
    """The vectors of the background captions that name none of the labels: float32 [m, dim]."""
    phrases = [phrase for label in to_labels(labels) for phrase in label.phrases]
    words = {word for phrase in phrases for word in phrase.lower().split()}
    texts = [text for text in BACKGROUND if text.rstrip(".").split()[-1] not in words]
    return encoder.encode_text(texts)


def _parts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of labels with at most ``_AT_ONCE`` captions, or a single label."""
    parts, first, total = [], 0, 0
    for number, size in enumerate(sizes):
        if total and total + size > _AT_ONCE:
            parts.append((first, number))
            first, total = number, 0
        total += size
    return [*parts, (first, len(sizes))]


def _encode(encoder: Encoder, texts: Sequence[str], labels: Sequence[Label]) -> Vectors:
    try:
        return encoder.encode_text(texts, policy="error")
    except CaptionError:
        for text in texts:
            needed = len(encode(text))
            if needed > ROOM:
                label = next(one for one in labels if any(p in text for p in one.phrases))
                raise CaptionError(
                    f"the caption {shorten(text, 60)!r} of the label {shorten(str(label), 60)!r} "
                    f"has {needed + 2} tokens, expected at most {CONTEXT}; shorten it, or split it "
                    "into several phrases with semicolons"
                ) from None
        raise
