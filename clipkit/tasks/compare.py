"""Compare two models on the same data: ``clipkit eval compare A B --data D``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipkit.classifiers.heads import Templates, list_templates, read_labels_or_classifier
from clipkit.classifiers.zero_shot import Classifier
from clipkit.data.labels import Label
from clipkit.data.open_source import Data, open_source
from clipkit.display.dataframe import data_frame
from clipkit.display.html import card, table
from clipkit.errors import DataError
from clipkit.evaluation.report import ClassificationOutcome, Report, RetrievalOutcome
from clipkit.evaluation.retrieval import EqualCaptions
from clipkit.evaluation.significance import Difference, compare_classification, compare_retrieval
from clipkit.models.encoder import BatchSize, Encoder
from clipkit.models.loading import load_model
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items.

    Attributes:
        reports: the report of each model.
        names: the names of the models.
        headline: the difference in mean recall, or in top-1 accuracy.
        differences: the differences in all other metrics; their p-values are corrected for the
            number of metrics.
    """

    reports: tuple[Report, Report]
    names: tuple[str, str]
    headline: Difference
    differences: list[Difference]

    @property
    def better(self) -> str | None:
        """The name of the significantly better model; None if the difference may be chance."""
        return self.better_at(self.headline)

    def better_at(self, difference: Difference) -> str | None:
        """The name of the significantly better model at one metric, or None."""
        return None if difference.better is None else self.names[difference.better]

    @property
    def verdict(self) -> str:
        """Which model is better, by how much, and whether that may be chance: one sentence."""
        headline, change = self.headline, self.headline.difference
        values = (
            f"{headline.name} is {headline.first:.3f} with {self.names[0]} and "
            f"{headline.second:.3f} with {self.names[1]}, a difference of {change.value:+.3f} "
            f"({change.low:+.3f} to {change.high:+.3f}) on {self.reports[0].counts['images']} "
            f"images, p = {'unknown' if headline.p is None else f'{headline.p:.2g}'}"
        )
        if self.better is not None:
            return f"{self.better} is better: {values}"
        smallest = (change.high - change.low) / 2
        return (
            f"no significant difference: {values}; this many images can show differences of about "
            f"{smallest:.3f} or more"
        )

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data for JSON."""

        def plain(one: Difference) -> dict[str, Any]:
            return asdict(one) | {"better": self.better_at(one)}

        return {
            "verdict": self.verdict,
            "better": self.better,
            "headline": plain(self.headline),
            "metrics": [plain(one) for one in self.differences],
            "reports": [report.to_dict() for report in self.reports],
        }

    def to_pandas(self) -> Any:
        """A data frame with a row for each metric, the headline first.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        rows = [self.headline, *self.differences]
        return data_frame(
            {
                "metric": [one.name for one in rows],
                self.names[0]: [one.first for one in rows],
                self.names[1]: [one.second for one in rows],
                "difference": [one.difference.value for one in rows],
                "low": [one.difference.low for one in rows],
                "high": [one.difference.high for one in rows],
                "p": [one.p for one in rows],
                "better": [self.better_at(one) for one in rows],
            }
        )

    def _repr_html_(self) -> str:
        rows = [
            (
                one.name,
                f"{one.first:.3f}",
                f"{one.second:.3f}",
                f"{one.difference.value:+.3f}",
                f"{one.difference.low:+.3f} to {one.difference.high:+.3f}",
                "" if one.p is None else f"{one.p:.2g}",
                self.better_at(one) or "",
            )
            for one in (self.headline, *self.differences)
        ]
        header = ("", *self.names, "difference", "95 % interval", "p", "better")
        return card(self.verdict, []) + table(header, rows)


def compare(
    first: Encoder | str | Path,
    second: Encoder | str | Path,
    data: Data,
    *,
    labels: Sequence[str | Label] | str | Path | None = None,
    templates: Templates = None,
    equal_captions: EqualCaptions = "merge",
    names: tuple[str, str] | None = None,
    batch_size: BatchSize = "auto",
    workers: int | str = "auto",
    progress: bool = True,
) -> Comparison:
    """Compare two models by retrieval, or by zero-shot classification if labels are given.

    Args:
        first: an encoder or a MODEL as for ``load_model``.
        second: the other one.
        data: images with captions, or with labels.
        labels: the classes: a list, a file with one label per line, or ``"imagenet"``.
        templates: captions with a ``{}`` in place of the label, as for ``evaluate_zero_shot``.
        equal_captions: as for ``evaluate_retrieval``.
        names: what to call the models.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: ``labels`` is a single label instead of a list.
        DataError: no image; no caption or no label; or a label of the data is not among ``labels``.
        CaptionError: labels or templates that cannot be used.
    """
    source = open_source(data) if labels is None else open_source(data, caption="")
    classes = None if labels is None else read_labels_or_classifier(labels)
    if isinstance(classes, Classifier):
        raise TypeError(
            "labels is a classifier, which belongs to one model; expected labels, from which each "
            "model builds its own classifier"
        )
    captions = list_templates(templates)
    encoders = [load_model(m) if isinstance(m, (str, Path)) else m for m in (first, second)]
    if classes is None:
        reports = [
            evaluate_retrieval(
                source,
                encoder,
                equal_captions=equal_captions,
                batch_size=batch_size,
                workers=workers,
                progress=progress,
            )
            for encoder in encoders
        ]
    else:
        reports = [
            evaluate_zero_shot(
                source,
                encoder,
                classes,
                captions,
                batch_size=batch_size,
                workers=workers,
                progress=progress,
            )
            for encoder in encoders
        ]
    one, other = (report.outcome for report in reports)
    if one.keys != other.keys:
        raise DataError(
            f"{source.spec} changed during the comparison: {len(one.keys)} images for one model, "
            f"{len(other.keys)} for the other; compare again"
        )
    if isinstance(one, RetrievalOutcome) and isinstance(other, RetrievalOutcome):
        headline, rows = compare_retrieval(one.results, other.results, len(one.keys))
    else:
        assert isinstance(one, ClassificationOutcome)
        assert isinstance(other, ClassificationOutcome)
        headline, rows = compare_classification(one.result, other.result)
    if names is None:
        given = zip((first, second), encoders, strict=True)
        one_name, other_name = (str(e.model) if m is e else str(m) for m, e in given)
        names = (one_name, other_name)
    return Comparison((reports[0], reports[1]), names, headline, rows)
