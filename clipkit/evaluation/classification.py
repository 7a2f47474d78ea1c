"""Classification metrics: accuracy, precision, F1, ROC-AUC and calibration, with intervals.

scikit-learn computes the same values (the tests compare them), but not for 1,000 bootstrap
resamples at once: every metric here takes rows of weights, and is a matrix product over items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from clipkit.evaluation.bootstrap import Estimate, estimate
from clipkit.evaluation.calibration import (
    cross_fitted,
    expected_calibration_error,
    fit_logit_scale,
    softmax,
)

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]
Numbers = NDArray[np.float64]
KS = (1, 5)
FEWEST = 20
"""The fewest items on which a logit scale is fitted."""
_ROWS = 4096  # items whose probabilities are compared at a time


@dataclass(frozen=True)
class ClassificationResult:
    """The predictions for n items, compared with their true classes.

    Attributes:
        classes: the number of classes.
        targets: int64 [n], the true class.
        predictions: int64 [n], the most probable class; the first one among equals.
        ranks: int64 [n], how many wrong classes are at least as probable as the true one, so that
            ties count against the model.
        confidence: float64 [n], the probability of the predicted class.
        nll: float64 [n], the negative log-likelihood of the true class.
        auroc: float64 [classes], the area under the ROC curve of each class against all others;
            NaN for a class with no item or all items.
        auroc_parts: float64 [n], how much the mean area changes when an item is drawn once more
            (the placements of DeLong et al. 1988); they sum to 0.
    """

    classes: int
    targets: Integers
    predictions: Integers
    ranks: Integers
    confidence: Numbers
    nll: Numbers
    auroc: Numbers
    auroc_parts: Numbers

    @classmethod
    def from_probabilities(cls, probabilities: Floats, targets: Integers) -> "ClassificationResult":
        """Compare probabilities with the true classes.

        Args:
            probabilities: [n, classes], rows that sum to 1.
            targets: int64 [n], the true class of each item.
        """
        count, classes = probabilities.shape
        items = np.arange(count)
        true = probabilities[items, targets]
        ranks = np.empty(count, np.int64)
        for start in range(0, count, _ROWS):
            part = slice(start, start + _ROWS)
            # The true class is as probable as itself, hence the -1.
            ranks[part] = (probabilities[part] >= true[part, None]).sum(axis=1) - 1
        predictions = probabilities.argmax(axis=1).astype(np.int64)
        areas, parts = _areas(probabilities, targets)
        return cls(
            classes=classes,
            targets=targets,
            predictions=predictions,
            ranks=np.where(np.isnan(true), classes, ranks),
            confidence=probabilities[items, predictions].astype(np.float64),
            nll=-np.log(np.maximum(true, np.finfo(np.float32).tiny).astype(np.float64)),
            auroc=areas,
            auroc_parts=parts,
        )

    @property
    def correct(self) -> NDArray[np.bool_]:
        """bool [n], whether the true class is more probable than every other one."""
        return self.ranks < 1

    @property
    def confusion(self) -> Integers:
        """int64 [classes, classes]: items by true class (row) and predicted class (column)."""
        cells = self.targets * self.classes + self.predictions
        counts = np.bincount(cells, minlength=self.classes**2)
        return counts.reshape(self.classes, self.classes).astype(np.int64)


def measure_classification(
    logits: Floats, targets: Integers
) -> tuple[ClassificationResult, dict[str, Estimate], float | None]:
    """Compare logits with the true classes, and estimate the metrics by a bootstrap over items.

    ``nll_fitted`` and ``ece_fitted`` use a logit scale fitted on the half of the items that an item
    is not in.

    Args:
        logits: [n, classes].
        targets: int64 [n], the true class of each item.

    Returns:
        The result, the metrics, and the factor for the logit scale that fits all items best (None
        for fewer than 20 items).
    """
    result = ClassificationResult.from_probabilities(softmax(logits), targets)
    items = len(targets)
    metrics = estimate(partial(classification_metrics, result), items)
    if items < FEWEST:
        return result, metrics, None
    refitted = ClassificationResult.from_probabilities(cross_fitted(logits, targets), targets)
    fitted = estimate(partial(classification_metrics, refitted), items)
    metrics |= {f"{name}_fitted": fitted[name] for name in ("nll", "ece")}
    return result, metrics, fit_logit_scale(logits, targets)


def classification_metrics(
    result: ClassificationResult, weights: Numbers, ks: Sequence[int] = KS
) -> dict[str, Numbers]:
    """The metrics of weighted items.

    ``mean_per_class`` is the mean of the accuracies of the classes: balanced accuracy, or macro
    recall. ``macro_precision`` and ``macro_f1`` are means over the classes that have items. A class
    that is never predicted has precision 0.

    Args:
        result: the predictions.
        weights: float64 [b, n], how often each item counts.
        ks: for top-k accuracy; those larger than the number of classes are left out.

    Returns:
        float64 [b] by name.
    """
    total = weights.sum(axis=1)
    metrics = {f"top{k}": weights @ (result.ranks < k) / total for k in ks if k <= result.classes}
    recall, precision, f1 = per_class(result, weights)
    metrics["mean_per_class"] = _finite_mean(recall)
    metrics["macro_precision"] = _finite_mean(precision)
    metrics["macro_f1"] = _finite_mean(f1)
    finite = np.isfinite(result.auroc)
    area = result.auroc[finite].mean() if finite.any() else np.nan
    # The mean area is not a mean over items. To first order, it is one over these parts.
    metrics["roc_auc"] = np.clip(area + weights @ result.auroc_parts / total, 0, 1)
    metrics["nll"] = weights @ result.nll / total
    metrics["ece"] = expected_calibration_error(result.confidence, result.correct, weights)
    return metrics


def per_class(result: ClassificationResult, weights: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Recall, precision and F1 of each class: float64 [b, classes], NaN for a class without items.

    Args:
        result: the predictions.
        weights: float64 [b, n], how often each item counts.
    """
    hits = _group_sums(weights * result.correct, result.targets, result.classes)
    support = _group_sums(weights, result.targets, result.classes)
    predicted = _group_sums(weights, result.predictions, result.classes)
    empty = support == 0
    recall = hits / np.where(empty, np.nan, support)
    precision = np.where(empty, np.nan, hits / np.maximum(predicted, 1))
    return recall, precision, 2 * hits / np.where(empty, np.nan, support + predicted)


def sums_per_item(result: ClassificationResult, ks: Sequence[int] = KS) -> dict[str, Numbers]:
    """What each item adds to the metrics that are means over items: float64 [n] each."""
    values = {f"top{k}": (result.ranks < k).astype(float) for k in ks if k <= result.classes}
    support = np.bincount(result.targets, minlength=result.classes)
    values["mean_per_class"] = result.correct / support[result.targets]
    values["nll"] = result.nll
    return values


def auroc(positive: Floats, negative: Floats) -> float:
    """The area under the ROC curve: how often a positive score is above a negative one.

    Ties count half, as in the Mann-Whitney statistic.
    """
    return float(_placements(positive, np.sort(negative)).mean())


def _areas(probabilities: Floats, targets: Integers) -> tuple[Numbers, Numbers]:
    """The AUROC of each class, and the items' parts in the mean of them."""
    count, classes = probabilities.shape
    areas, parts = np.full(classes, np.nan), np.zeros(count)
    for one in np.unique(targets):
        mine = targets == one
        positive, negative = probabilities[mine, one], probabilities[~mine, one]
        if not len(negative):
            continue
        above = _placements(positive, np.sort(negative))
        areas[one] = above.mean()
        parts[mine] += (above - areas[one]) * count / len(positive)
        below = 1 - _placements(negative, np.sort(positive))
        parts[~mine] += (below - areas[one]) * count / len(negative)
    return areas, parts / max(int(np.isfinite(areas).sum()), 1)


def _placements(values: Floats, ascending: Floats) -> Numbers:
    """The share of the sorted scores that each value is above; ties count half."""
    below = np.searchsorted(ascending, values, side="left")
    upto = np.searchsorted(ascending, values, side="right")
    placements: Numbers = (below + upto) / (2 * len(ascending))
    return placements


def _group_sums(weights: Numbers, groups: Integers, classes: int) -> Numbers:
    """The sum of the weights of each group: [b, n] to [b, classes]."""
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    sums = np.zeros((len(weights), classes))
    sums[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums


def _finite_mean(values: Numbers) -> Numbers:
    """The mean of the finite values of each row: [b, classes] to [b]."""
    finite = np.isfinite(values)
    means: Numbers = np.where(finite, values, 0).sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
    return means
