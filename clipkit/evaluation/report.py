"""The report of an evaluation: metrics with intervals, and what they were measured on."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from clipkit.artifacts import ModelRef
from clipkit.data.images import Skipped
from clipkit.display.dataframe import data_frame
from clipkit.display.html import bullets, card, table
from clipkit.evaluation.bootstrap import Estimate
from clipkit.evaluation.classification import ClassificationResult
from clipkit.evaluation.retrieval import RetrievalResult

Task = Literal["retrieval", "zero-shot"]


@dataclass(frozen=True)
class RetrievalOutcome:
    """The queries of a retrieval.

    Attributes:
        results: the ranks by direction, ``"text_to_image"`` and ``"image_to_text"``.
        keys: the keys of the images.
        captions: the captions; equal ones once, if they were merged.
    """

    results: dict[str, RetrievalResult]
    keys: list[str]
    captions: list[str]


@dataclass(frozen=True)
class ClassificationOutcome:
    """The items of a classification.

    Attributes:
        result: the predictions.
        keys: the keys of the images.
        labels: the names of the classes.
        logit_scale: the logit scale of the classifier.
        fitted: the factor for ``logit_scale`` with the lowest negative log-likelihood on these
            items; None for fewer than 20 items.
    """

    result: ClassificationResult
    keys: list[str]
    labels: list[str]
    logit_scale: float
    fitted: float | None


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Attributes:
        task: ``"retrieval"`` or ``"zero-shot"``.
        model: the model.
        data: the name of the data.
        fingerprint: of the data.
        settings: what else the metrics depend on.
        counts: the number of images, captions, classes, truncated captions and skipped images.
        estimates: the metrics with their 95 % intervals. Shares are in [0, 1]; ranks start at 1.
        outcome: the individual queries or items.
        notes: caveats about the data, as sentences.
        skipped: images that could not be used.
        truncated: the captions cut to 77 tokens, described in words; empty if there are none.
    """

    task: Task
    model: ModelRef
    data: str
    fingerprint: str
    settings: dict[str, Any]
    counts: dict[str, int]
    estimates: dict[str, Estimate]
    outcome: RetrievalOutcome | ClassificationOutcome = field(repr=False)
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    truncated: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics without their intervals."""
        return {name: estimate.value for name, estimate in self.estimates.items()}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON; a metric without a value is None."""
        return {
            "task": self.task,
            "model": str(self.model),
            "fingerprint": self.model.fingerprint,
            "precision": self.model.precision,
            "data": self.data,
            "data_fingerprint": self.fingerprint,
            "settings": self.settings,
            **self.counts,
            **{name: _finite(value) for name, value in self.metrics.items()},
            "intervals": {
                name: [_finite(one.low), _finite(one.high)] for name, one in self.estimates.items()
            },
            "notes": self.notes,
        }

    def to_pandas(self) -> Any:
        """A data frame with a row for each metric: metric, value, low, high.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return data_frame(
            {
                "metric": list(self.estimates),
                "value": [one.value for one in self.estimates.values()],
                "low": [one.low for one in self.estimates.values()],
                "high": [one.high for one in self.estimates.values()],
            }
        )

    def _repr_html_(self) -> str:
        rows = [
            (name, f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}")
            for name, one in self.estimates.items()
        ]
        title = f"{self.task} on {self.data}: {self.counts['images']:,} images, {self.model}"
        return card(title, []) + table(("", "", "95 % interval"), rows) + bullets(self.notes)


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
