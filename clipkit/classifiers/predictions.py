"""Predictions: the labels of each image with their probabilities."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from clipkit.artifacts import ModelRef
from clipkit.data.images import Skipped
from clipkit.data.labels import Label, to_labels
from clipkit.data.rows import StoredImage
from clipkit.display.dataframe import data_frame
from clipkit.display.html import gallery
from clipkit.display.thumbnails import thumbnail
from clipkit.errors import ImageError

NO_MATCH = "none of these"
"""The label of a rejected image."""


@dataclass(frozen=True)
class LabelScore:
    """A label or group of labels, and its probability in [0, 1].

    Attributes:
        label: the name.
        score: the probability.
        path: the groups of the label and its own name, outermost first; may be empty.
    """

    label: str
    score: float
    path: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Prediction:
    """The labels of one image.

    Attributes:
        key: the key of the image.
        top: the most probable labels, best first.
        groups: the groups above the labels, most probable first.
        image: the image, not decoded; None if only its vector is known.
        shows_any: the probability that the image shows any of the labels; None if not computed.
        rejected: whether the image counts as showing none of the labels.
    """

    key: str
    top: tuple[LabelScore, ...]
    groups: tuple[LabelScore, ...] = ()
    image: StoredImage | None = field(default=None, repr=False)
    shows_any: float | None = None
    rejected: bool = False

    @property
    def label(self) -> str:
        """The most probable label, or ``"none of these"``."""
        return NO_MATCH if self.rejected else self.top[0].label

    @property
    def score(self) -> float:
        """The probability of ``label``."""
        if self.rejected and self.shows_any is not None:
            return 1 - self.shows_any
        return self.top[0].score

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain data for JSON."""

        def plain(scores: Sequence[LabelScore]) -> list[dict[str, Any]]:
            return [{"label": one.label, "score": one.score} for one in scores]

        result: dict[str, Any] = {"key": self.key, "predictions": plain(self.top)}
        if self.groups:
            result["groups"] = plain(self.groups)
        if self.shows_any is not None:
            result |= {"shows_any": self.shows_any, "rejected": self.rejected}
        return result

    def to_row(self) -> dict[str, Any]:
        """The prediction as one row of a table, with ``label_1``, ``probability_1`` and so on."""
        row: dict[str, Any] = {"key": self.key, "label": self.label, "probability": self.score}
        if self.shows_any is not None:
            row["shows_any"] = self.shows_any
        if self.groups:
            row["group"], row["group_probability"] = self.groups[0].label, self.groups[0].score
        for place, one in enumerate(self.top, 1):
            row[f"label_{place}"], row[f"probability_{place}"] = one.label, one.score
        return row


@dataclass(frozen=True)
class Predictions(Sequence[Prediction]):
    """The predictions for several images, in their order.

    Attributes:
        items: a prediction for each image.
        model: the model that encoded the images.
        skipped: the images that could not be read.
    """

    items: tuple[Prediction, ...]
    model: ModelRef | None = None
    skipped: tuple[Skipped, ...] = ()

    @overload
    def __getitem__(self, place: int) -> Prediction: ...
    @overload
    def __getitem__(self, place: slice) -> "Predictions": ...
    def __getitem__(self, place: int | slice) -> "Prediction | Predictions":
        if isinstance(place, slice):
            return Predictions(self.items[place], self.model)
        return self.items[place]

    def __len__(self) -> int:
        return len(self.items)

    def to_pandas(self) -> Any:
        """A data frame with a row for each image.

        The columns are key, label, probability, and then ``label_1``, ``probability_1`` and so on.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        rows = [one.to_row() for one in self.items]
        return data_frame({name: [row[name] for row in rows] for name in rows[0]} if rows else {})

    def _repr_html_(self) -> str:
        count = len(self.skipped)
        title = f"{count} image{'s' if count > 1 else ''} could not be read" if count else ""
        shown = ((_thumbnail(p), f"{p.label} {p.score:.0%}", _others(p)) for p in self.items)
        return gallery(title, shown, len(self.items))


def rank(
    scores: NDArray[np.floating], labels: Sequence[str | Label], keys: Sequence[str], k: int
) -> Iterator[Prediction]:
    """A prediction with the ``k`` labels of highest score for each row of scores.

    Args:
        scores: [n, classes].
        labels: the classes.
        keys: the keys of the n images.
        k: labels per image, at most as many as there are.
    """
    classes = [(str(label), label.path) for label in to_labels(labels)]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    for key, row, order in zip(keys, scores, best, strict=True):
        top = ((*classes[j], float(row[j])) for j in order)
        yield Prediction(key, tuple(LabelScore(name, score, path) for name, path, score in top))


def _thumbnail(prediction: Prediction) -> bytes | None:
    if prediction.image is None:
        return None
    try:
        return thumbnail(prediction.image.read())
    except ImageError:
        return None


def _others(prediction: Prediction) -> str:
    others = [one for one in prediction.top if one.label != prediction.label]
    return " · ".join([prediction.key, *(f"{one.label} {one.score:.0%}" for one in others)])
