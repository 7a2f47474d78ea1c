"""Accuracy, precision, recall, F1 and ROC-AUC of classifications."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipkit.evaluation.calibration import calibration_sums
from clipkit.evaluation.retrieval import Floats, Integers

Numbers = NDArray[np.float64]
KS = (1, 5)
_ROWS = 4096  # items whose probabilities are compared at a time


@dataclass(frozen=True)
class Classified:
    """What a classifier said of each of n items, beside what is true.

    Attributes:
        classes: how many there are to choose from.
        targets: int64 [n], the right class.
        predictions: int64 [n], the likeliest one; of equal ones the first.
        ranks: int64 [n], how many wrong classes are at least as likely as the right one.
        confidence: float64 [n], the probability of the likeliest class.
        surprise: float64 [n], minus the logarithm of the probability of the right one.
        auc: float64 [classes], the area under each class's ROC curve, against all others; no number
            for a class that no item or every item has.
        auc_parts: float64 [n], what each item moves the mean of these areas by when it is drawn
            once more (the placements of DeLong et al. 1988); they add up to 0.
    """

    classes: int
    targets: Integers
    predictions: Integers
    ranks: Integers
    confidence: Numbers
    surprise: Numbers
    auc: Numbers
    auc_parts: Numbers

    @property
    def right(self) -> NDArray[np.bool_]:
        """bool [n], whether the right class is likelier than every other one."""
        return self.ranks < 1

    @property
    def confusion(self) -> Integers:
        """int64 [classes, classes]: how many items of a class (row) were called each (column)."""
        cells = self.targets * self.classes + self.predictions
        counts = np.bincount(cells, minlength=self.classes**2)
        return counts.reshape(self.classes, self.classes).astype(np.int64)


def classified(probabilities: Floats, targets: Integers) -> Classified:
    """Compare probabilities with what is true.

    Args:
        probabilities: float32 [n, classes], rows that add up to 1.
        targets: int64 [n], the right class of each.
    """
    count, classes = probabilities.shape
    items = np.arange(count)
    right = probabilities[items, targets]
    ranks = np.empty(count, np.int64)
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        # The right class is as likely as itself; ties with others count against the model.
        ranks[part] = (probabilities[part] >= right[part, None]).sum(axis=1) - 1
    predictions = probabilities.argmax(axis=1).astype(np.int64)
    auc, parts = _areas(probabilities, targets)
    return Classified(
        classes=classes,
        targets=targets,
        predictions=predictions,
        ranks=np.where(np.isnan(right), classes, ranks),
        confidence=probabilities[items, predictions].astype(np.float64),
        surprise=-np.log(np.maximum(right, np.finfo(np.float32).tiny).astype(np.float64)),
        auc=auc,
        auc_parts=parts,
    )


def classification_figures(
    found: Classified, weights: Numbers, ks: Sequence[int] = KS
) -> dict[str, Numbers]:
    """Figures of weighted items.

    ``mean_per_class`` is the mean of the classes' own accuracies, which is balanced accuracy and
    macro recall; ``macro_`` precision and F1 likewise are means over the classes that have items.
    A class that is never predicted has precision 0.

    Args:
        found: of ``classified``.
        weights: float64 [b, n], how often each item counts.
        ks: for top-k accuracy; those larger than the number of classes are left out.

    Returns:
        by name, float64 [b].
    """
    total = weights.sum(axis=1)
    figures = {f"top{k}": weights @ (found.ranks < k) / total for k in ks if k <= found.classes}
    recall, precision, f1 = per_class(found, weights)
    figures["mean_per_class"] = _mean_known(recall)
    figures["macro_precision"] = _mean_known(precision)
    figures["macro_f1"] = _mean_known(f1)
    known = np.isfinite(found.auc)
    area = found.auc[known].mean() if known.any() else np.nan
    # The mean of areas is no mean over items; to first order it is one over these parts.
    figures["roc_auc"] = np.clip(area + weights @ found.auc_parts / total, 0, 1)
    figures["nll"] = weights @ found.surprise / total
    figures["ece"] = calibration_sums(found.confidence, found.right, weights) / total
    return figures


def per_class(found: Classified, weights: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Recall, precision and F1 of each class, float64 [b, classes]; no number where it has no item.

    Args:
        found: of ``classified``.
        weights: float64 [b, n], how often each item counts.
    """
    hits = _sums(weights * found.right, found.targets, found.classes)
    support = _sums(weights, found.targets, found.classes)
    predicted = _sums(weights, found.predictions, found.classes)
    none = support == 0
    recall = hits / np.where(none, np.nan, support)
    precision = np.where(none, np.nan, hits / np.maximum(predicted, 1))
    return recall, precision, 2 * hits / np.where(none, np.nan, support + predicted)


def item_sums(found: Classified, ks: Sequence[int] = KS) -> dict[str, Numbers]:
    """What each item adds to the figures that are means over items, float64 [n] each."""
    values = {f"top{k}": (found.ranks < k).astype(float) for k in ks if k <= found.classes}
    support = np.bincount(found.targets, minlength=found.classes)
    values["mean_per_class"] = found.right / support[found.targets]
    values["nll"] = found.surprise
    return values


def _sums(weights: Numbers, groups: Integers, classes: int) -> Numbers:
    """Sums of the weights of each group, [b, n] to [b, classes]."""
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    sums = np.zeros((len(weights), classes))
    sums[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums


def _mean_known(values: Numbers) -> Numbers:
    """The mean of the finite values of each row, [b, classes] to [b]."""
    known = np.isfinite(values)
    means: Numbers = np.where(known, values, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return means


def _areas(probabilities: Floats, targets: Integers) -> tuple[Numbers, Numbers]:
    """The area under the ROC curve of each class, and the items' parts in the mean of them."""
    count, classes = probabilities.shape
    areas, parts = np.full(classes, np.nan), np.zeros(count)
    for one in np.unique(targets):
        mine = targets == one
        positive, negative = np.sort(probabilities[mine, one]), np.sort(probabilities[~mine, one])
        if not len(negative):
            continue
        # The share of the others that an item beats; ties count half.
        beats = _placement(probabilities[mine, one], negative)
        areas[one] = beats.mean()
        parts[mine] += (beats - areas[one]) * count / len(positive)
        beaten = 1 - _placement(probabilities[~mine, one], positive)
        parts[~mine] += (beaten - areas[one]) * count / len(negative)
    return areas, parts / max(int(np.isfinite(areas).sum()), 1)


def _placement(values: Floats, ascending: Floats) -> Numbers:
    below = np.searchsorted(ascending, values, side="left")
    upto = np.searchsorted(ascending, values, side="right")
    placement: Numbers = (below + upto) / (2 * len(ascending))
    return placement
