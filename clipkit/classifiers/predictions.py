"""What a classifier says of one image, for people and for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clipkit.classifiers.zero_shot import Prediction, ZeroShotClassifier, rank
from clipkit.data.open_source import Row, row_image
from clipkit.display.html import gallery
from clipkit.display.thumbnails import thumbnail
from clipkit.errors import ImageError
from clipkit.models.encoder import Vectors

NONE = "none of these"
EVEN = 0.5
"""Judged by itself, a label is shown that is likelier than the generic captions."""


@dataclass(frozen=True)
class Answer:
    """What an image shows.

    Attributes:
        key: of the image.
        predictions: labels and their probabilities, likeliest first.
        groups: the groups above the labels, likeliest first.
        image: where the picture is: ``{"bytes": …, "path": …}``.
        shows_any: the probability that it shows any of the labels; None if that was not asked.
        rejected: whether it counts as showing none of them.
    """

    key: str
    predictions: list[Prediction]
    groups: list[Prediction]
    image: dict[str, Any]
    shows_any: float | None = None
    rejected: bool = False

    @property
    def label(self) -> str:
        """The likeliest label, or ``none of these``."""
        return NONE if self.rejected else self.predictions[0].label

    @property
    def score(self) -> float:
        """The probability of ``label``."""
        if self.rejected and self.shows_any is not None:
            return 1 - self.shows_any
        return self.predictions[0].score

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; only what was asked for."""

        def plain(found: Sequence[Prediction]) -> list[dict[str, Any]]:
            return [{"label": one.label, "score": one.score} for one in found]

        asked: dict[str, Any] = {"key": self.key, "predictions": plain(self.predictions)}
        if self.groups:
            asked["groups"] = plain(self.groups)
        if self.shows_any is not None:
            asked |= {"shows_any": self.shows_any, "rejected": self.rejected}
        return asked


class Answers(list[Answer]):
    """A list of answers that shows itself as pictures in a notebook."""

    def _repr_html_(self) -> str:
        items = ((_thumbnail(a), f"{a.label} {a.score:.0%}", _others(a)) for a in self)
        return gallery("", items, len(self))


def _thumbnail(answer: Answer) -> bytes | None:
    try:
        return thumbnail(row_image({"image": answer.image}))
    except ImageError:
        return None


def _others(answer: Answer) -> str:
    others = [one for one in answer.predictions if one.label != answer.label]
    return " · ".join([answer.key, *(f"{one.label} {one.score:.0%}" for one in others)])


def answer_each(
    classifier: ZeroShotClassifier, vectors: Vectors, rows: Sequence[Row], k: int
) -> Iterator[Answer]:
    """Each label by itself: an image shows none of them where none is likelier than not.

    Args:
        classifier: with generic captions.
        vectors: float32 [n, dim].
        rows: the n rows they belong to.
        k: labels per image.
    """
    scores = classifier.each_alone(vectors)
    found = rank(scores, classifier.labels, [row["key"] for row in rows], k)
    for row, predictions in zip(rows, found, strict=True):
        best = predictions[0].score
        yield Answer(row["key"], predictions, [], row["image"], best, best < EVEN)
