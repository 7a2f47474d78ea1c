"""Which of two models is better on the same data: ``clipkit compare A B --data D``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clipkit.data.open_source import Source
from clipkit.data.prompts import DEFAULT_TEMPLATES
from clipkit.errors import DataError
from clipkit.evaluation.report import Classification, EqualCaptions, Report, Retrieval
from clipkit.evaluation.significance import Difference, compare_classification, compare_retrieval
from clipkit.models.encoder import Encoder
from clipkit.tasks.evaluate import evaluate_retrieval, evaluate_zero_shot


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items.

    Attributes:
        reports: what each was found to do.
        names: by which the models were asked for.
        headline: the difference that decides: mean recall, or top-1 accuracy.
        rows: the differences of all other figures; their p-values hold for all together.
        verdict: which is better, by how much, and whether that could be chance.
    """

    reports: tuple[Report, Report]
    names: tuple[str, str]
    headline: Difference
    rows: list[Difference]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "verdict": self.verdict,
            "better": self.better,
            "headline": self._row(self.headline),
            "figures": [self._row(row) for row in self.rows],
            "reports": [report.to_dict() for report in self.reports],
        }

    @property
    def better(self) -> str | None:
        """The name of the better model; None if chance would do."""
        return self.better_at(self.headline)

    def better_at(self, row: Difference) -> str | None:
        """The name of the model with the better figure; None if chance would do."""
        return None if row.better is None else self.names[row.better]

    def _row(self, row: Difference) -> dict[str, Any]:
        return asdict(row) | {"better": self.better_at(row)}


def compare_retrievals(
    source: Source,
    encoders: tuple[Encoder, Encoder],
    names: tuple[str, str],
    *,
    equal_captions: EqualCaptions = "merge",
    progress: bool = True,
) -> Comparison:
    """Compare how two models let captions find images and the reverse.

    Args:
        source: images with captions.
        encoders: the two models.
        names: what to call them.
        equal_captions: see ``evaluate_retrieval``.
        progress: show a bar on stderr.

    Raises:
        DataError: no image or no caption.
    """
    one, other = (
        evaluate_retrieval(source, encoder, equal_captions=equal_captions, progress=progress)
        for encoder in encoders
    )
    first, second = one.outcome, other.outcome
    assert isinstance(first, Retrieval)
    assert isinstance(second, Retrieval)
    _require_same(source, first.keys, second.keys)
    headline, rows = compare_retrieval(first.found, second.found, len(first.keys))
    return _comparison((one, other), names, headline, rows, len(first.keys))


def compare_zero_shot(
    source: Source,
    encoders: tuple[Encoder, Encoder],
    names: tuple[str, str],
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    progress: bool = True,
) -> Comparison:
    """Compare how two models classify by captions.

    Args:
        source: images with labels.
        encoders: the two models.
        names: what to call them.
        labels: the classes to choose from.
        templates: captions with a ``{}`` where the label goes.
        progress: show a bar on stderr.

    Raises:
        DataError: no image, no labels, or a label of the data that is not among ``labels``.
        CaptionError: labels or templates that cannot be used.
    """
    one, other = (
        evaluate_zero_shot(source, encoder, labels, templates, progress=progress)
        for encoder in encoders
    )
    first, second = one.outcome, other.outcome
    assert isinstance(first, Classification)
    assert isinstance(second, Classification)
    _require_same(source, first.keys, second.keys)
    headline, rows = compare_classification(first.found, second.found)
    return _comparison((one, other), names, headline, rows, len(first.keys))


def _require_same(source: Source, one: list[str], other: list[str]) -> None:
    if one != other:
        raise DataError(
            f"{source.spec} gave {len(one)} images to one model and {len(other)} to the other; "
            "it changed meanwhile: compare again"
        )


def _comparison(
    reports: tuple[Report, Report],
    names: tuple[str, str],
    headline: Difference,
    rows: list[Difference],
    items: int,
) -> Comparison:
    return Comparison(reports, names, headline, rows, _verdict(names, headline, items))


def _verdict(names: tuple[str, str], headline: Difference, items: int) -> str:
    change = headline.difference
    what = (
        f"{headline.name} is {headline.one:.3f} with {names[0]} and {headline.other:.3f} with "
        f"{names[1]}, a difference of {change.value:+.3f} ({change.low:+.3f} to "
        f"{change.high:+.3f}) on {items} images"
    )
    if headline.better is not None:
        winner, p = names[headline.better], _p(headline.p)
        return f"{winner} is better: {what}; chance alone would do this with p = {p}"
    seen = (change.high - change.low) / 2
    return (
        f"neither is better for sure: {what}, which chance alone does with p = {_p(headline.p)}; "
        f"so many images show differences of about {seen:.3f} and more"
    )


def _p(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"
