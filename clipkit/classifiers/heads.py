"""Classifiers fitted on a few labelled vectors, and the directories that classifiers are saved in.

The encoder stays as it is: a head is a small function of its vectors.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from clipkit.arguments import require_encoder, require_items
from clipkit.artifacts import (
    MANIFEST,
    ArtifactWriter,
    Manifest,
    ModelRef,
    read_manifest,
)
from clipkit.classifiers.zero_shot import Classifier, Vectors, ZeroShotClassifier
from clipkit.data.labels import Label, to_labels
from clipkit.data.prompts import IMAGENET, TEMPLATE_SETS, read_labels, read_templates
from clipkit.errors import ArtifactError, CaptionError
from clipkit.models.encoder import Encoder
from clipkit.models.loading import load_model, load_model_ref

Labels = Sequence[str | Label] | str | Path | Classifier
"""A list of labels, a file with one label per line, a saved classifier, or a classifier."""
Templates = Sequence[str] | str | Path | None
"""A list of templates, a file with one per line, ``"openai"``, ``"simple"``, or the default."""
VOTE_SCALE = 1 / 0.07
"""Neighbours vote with exp(cosine / 0.07) (Wu et al. 2018, section 4.1)."""
ARRAYS = "classifier.safetensors"
_LEAST = 1e-12  # votes for a class without a neighbour


class LinearHead(Classifier):
    """Logistic regression on the vectors.

    Attributes:
        weights: float32 [classes, dim].
        bias: float32 [classes].
    """

    kind = "linear"

    def __init__(
        self, labels: Sequence[str | Label], weights: Vectors, bias: Vectors, model: ModelRef
    ) -> None:
        super().__init__(labels, 1.0, model)
        self.weights, self.bias = weights, bias

    def logits(self, vectors: Vectors) -> Vectors:
        """A linear function of the vectors."""
        return np.asarray(vectors @ self.weights.T + self.bias, np.float32)

    def arrays(self) -> dict[str, Vectors]:
        """The weights and the bias."""
        return {"weights": self.weights, "bias": self.bias}

    @classmethod
    def restore(
        cls,
        labels: Sequence[str | Label],
        model: ModelRef,
        arrays: Mapping[str, Vectors],
        settings: Mapping[str, Any],
    ) -> Self:
        """The head with these ``arrays()``."""
        del settings
        return cls(labels, arrays["weights"], arrays["bias"], model)


class NeighbourHead(Classifier):
    """The ``k`` nearest labelled vectors vote; nearer ones count more.

    Attributes:
        keys: float32 [m, dim], the labelled vectors.
        values: float32 [m, classes], their classes as one-hot rows.
        k: the number of neighbours.
    """

    kind = "neighbours"

    def __init__(
        self, labels: Sequence[str | Label], keys: Vectors, values: Vectors, k: int, model: ModelRef
    ) -> None:
        super().__init__(labels, VOTE_SCALE, model)
        self.keys, self.values, self.k = keys, values, k

    def logits(self, vectors: Vectors) -> Vectors:
        """The logarithms of the votes; their softmax is the share of each class."""
        scores = vectors @ self.keys.T
        if self.k < len(self.keys):
            nearest = np.partition(scores, -self.k, axis=1)[:, -self.k :].min(axis=1)
            scores = np.where(scores >= nearest[:, None], scores, -np.inf)
        # Relative to the nearest one, so that no vote underflows.
        weights = np.exp(self.logit_scale * (scores - scores.max(axis=1, keepdims=True)))
        return np.asarray(np.log(np.maximum(weights @ self.values, _LEAST)), np.float32)

    def arrays(self) -> dict[str, Vectors]:
        """The labelled vectors and their classes."""
        return {"keys": self.keys, "values": self.values}

    def settings(self) -> dict[str, Any]:
        """The number of neighbours."""
        return {"k": self.k}

    @classmethod
    def restore(
        cls,
        labels: Sequence[str | Label],
        model: ModelRef,
        arrays: Mapping[str, Vectors],
        settings: Mapping[str, Any],
    ) -> Self:
        """The head with these ``arrays()`` and ``settings()``."""
        return cls(labels, arrays["keys"], arrays["values"], settings["k"], model)


class TipAdapterHead(Classifier):
    """Captions and labelled vectors together (Zhang et al. 2022, equations 5 and 6).

    Attributes:
        weights: float32 [classes, dim], the zero-shot weights.
        keys: float32 [m, dim], the labelled vectors, fine-tuned or not.
        values: float32 [m, classes], their classes as one-hot rows.
        alpha: the weight of the labelled vectors relative to the captions.
        beta: how quickly the weight of a labelled vector falls with its distance.
    """

    kind = "tip-adapter"

    def __init__(
        self,
        labels: Sequence[str | Label],
        weights: Vectors,
        cache: tuple[Vectors, Vectors],
        strength: tuple[float, float],
        logit_scale: float,
        model: ModelRef,
    ) -> None:
        super().__init__(labels, logit_scale, model)
        self.weights = weights
        self.keys, self.values = cache
        self.alpha, self.beta = strength

    def logits(self, vectors: Vectors) -> Vectors:
        """The scaled cosines of the captions, plus the votes of the labelled vectors."""
        near = np.exp(-self.beta * (1 - vectors @ self.keys.T))
        logits = self.logit_scale * vectors @ self.weights.T + self.alpha * near @ self.values
        return np.asarray(logits, np.float32)

    def arrays(self) -> dict[str, Vectors]:
        """The zero-shot weights, and the labelled vectors with their classes."""
        return {"weights": self.weights, "keys": self.keys, "values": self.values}

    def settings(self) -> dict[str, Any]:
        """The logit scale, alpha and beta."""
        return {"scale": self.logit_scale, "alpha": self.alpha, "beta": self.beta}

    @classmethod
    def restore(
        cls,
        labels: Sequence[str | Label],
        model: ModelRef,
        arrays: Mapping[str, Vectors],
        settings: Mapping[str, Any],
    ) -> Self:
        """The head with these ``arrays()`` and ``settings()``."""
        return cls(
            labels,
            arrays["weights"],
            (arrays["keys"], arrays["values"]),
            (settings["alpha"], settings["beta"]),
            settings["scale"],
            model,
        )


def one_hot(targets: NDArray[np.int64], classes: int) -> Vectors:
    """Class numbers as one-hot rows: float32 [n, classes]."""
    rows = np.zeros((len(targets), classes), np.float32)
    rows[np.arange(len(targets)), targets] = 1
    return rows


_KINDS = {
    kind.kind: kind for kind in (ZeroShotClassifier, LinearHead, NeighbourHead, TipAdapterHead)
}


def save_classifier(
    classifier: Classifier, path: str | Path, source: Mapping[str, Any] | None = None
) -> None:
    """Write a classifier as a directory; an existing classifier is replaced.

    Args:
        classifier: of any kind.
        path: the directory.
        source: what the classifier was built from, for the manifest.

    Raises:
        ArtifactError: ``path`` is something else, or cannot be written.
    """
    from safetensors.numpy import save_file

    detail = {
        "type": classifier.kind,
        "labels": [list(label.path) for label in classifier.labels],
        "settings": classifier.settings(),
    }
    manifest = Manifest(
        "classifier",
        classifier.model,
        len(classifier.labels),
        source=dict(source or {}),
        detail=detail,
    )
    with ArtifactWriter(Path(path), "classifier", replace=True) as writer:
        # safetensors writes the memory as it is, whatever its order.
        arrays = {name: np.ascontiguousarray(one) for name, one in classifier.arrays().items()}
        save_file(arrays, writer.temp / ARRAYS)
        writer.finish(manifest)


def open_classifier(path: str | Path) -> Classifier:
    """Read a saved classifier.

    Raises:
        ArtifactError: it is missing, incomplete, damaged, or of an unknown type.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    manifest = read_manifest(path, "classifier")
    model, detail = manifest.require_model(), manifest.detail
    if detail.get("type") not in _KINDS:
        raise ArtifactError(
            f"{path} holds a classifier of type {detail.get('type')!r}, expected one of "
            f"{', '.join(_KINDS)}; upgrade clipkit to at least {manifest.clipkit}"
        )
    try:
        arrays = load_file(path / ARRAYS)
        labels = [Label(parts[-1], tuple(parts[:-1])) for parts in detail["labels"]]
        kind: type[Classifier] = _KINDS[detail["type"]]
        return kind.restore(labels, model, arrays, detail["settings"])
    except (OSError, SafetensorError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); build the classifier again") from None


def load_classifier(
    labels: Labels,
    encoder: Encoder | None = None,
    templates: Templates = None,
    *,
    background: bool = False,
) -> tuple[Encoder, Classifier]:
    """The classifier for the given labels, and the encoder that belongs to it.

    Args:
        labels: a list of labels; a file with one label per line; ``"imagenet"``; the directory of a
            saved classifier; or a classifier.
        encoder: the model; None loads the model of a saved classifier, else the default model.
        templates: captions with a ``{}`` in place of the label, a file with one per line,
            ``"openai"`` or ``"simple"``; None for ``DEFAULT_TEMPLATES``.
        background: encode background captions too, for rejection and independent labels.

    Raises:
        TypeError: ``labels`` is a single label instead of a list.
        CaptionError: labels or templates that cannot be used, or templates for a classifier whose
            captions are already encoded.
        ArtifactError: the saved classifier cannot be read.
        ModelMismatchError: the classifier was built for another model.
    """
    require_encoder(encoder)
    found = read_labels_or_classifier(labels, templates, single=background)
    if isinstance(found, Classifier):
        encoder = encoder or load_model_ref(found.model, "the classifier")
        found.require(encoder.model)
        return encoder, found
    captions = list_templates(templates)
    encoder = encoder or load_model()
    return encoder, ZeroShotClassifier.from_labels(encoder, found, captions, background=background)


def read_labels_or_classifier(
    labels: Labels, templates: Templates = None, *, single: bool = False
) -> list[Label] | Classifier:
    """Labels as a list, or the classifier; see ``load_classifier`` and ``check_labels``."""
    if not isinstance(labels, (str, Path, Classifier)):
        return to_labels(labels)
    if isinstance(labels, Classifier) or is_classifier(labels):
        if templates is not None:
            raise CaptionError(
                "templates were given for a classifier whose captions are already encoded; leave "
                "them out, or give labels instead of the classifier"
            )
        return labels if isinstance(labels, Classifier) else open_classifier(Path(labels))
    if isinstance(labels, Path) or os.path.isfile(labels) or labels == IMAGENET:
        return read_labels(labels, single=single)
    raise TypeError(
        f"labels is one string, {labels[:80]!r}, expected a list such as ['dog', 'cat'], a file "
        "with one label per line, or a saved classifier"
    )


def is_classifier(path: str | Path) -> bool:
    """Whether a path is the directory of an artifact, such as a saved classifier."""
    # Not Path.is_file, which fails for a text longer than a file name.
    return os.path.isfile(os.path.join(path, MANIFEST))


def list_templates(templates: Templates) -> list[str]:
    """Templates as a list; see ``load_classifier``.

    Raises:
        TypeError: ``templates`` is a single template instead of a list.
        CaptionError: the file cannot be used.
    """
    if isinstance(templates, str) and "{}" in templates:
        raise TypeError(
            f"templates is one string, {templates[:80]!r}, expected a list such as "
            f"['a photo of a {{}}.'], a file with one template per line, or one of "
            f"{', '.join(TEMPLATE_SETS)}"
        )
    if templates is None or isinstance(templates, (str, Path)):
        return read_templates(templates)
    found = require_items("templates", templates, "['a photo of a {}.']")
    if not found:
        raise CaptionError("templates is empty, expected at least one; None is the default")
    return found
