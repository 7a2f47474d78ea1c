"""Labels of data found among the labels that a classifier knows."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clipkit.data.label_set import Label
from clipkit.errors import DataError

_SHOWN = 10  # labels


def targets_of(
    found: Sequence[str | None], labels: Sequence[str], spec: str
) -> tuple[list[int], NDArray[np.int64]]:
    """The rows that have a label, and its number among ``labels``, int64 [rows].

    A label is found by its words: capitals, hyphens and underscores do not matter.

    Args:
        found: the label of each row of the data, or None.
        labels: what may be chosen.
        spec: the data's name, for the error.

    Raises:
        DataError: no row has a label, or one that is not among ``labels``.
    """
    rows = [i for i, label in enumerate(found) if label is not None]
    if not rows:
        raise DataError(f"{spec} has no labels; expected one folder per class, or a label column")
    numbers = {_words(label): number for number, label in enumerate(labels)}
    names = [str(found[i]) for i in rows]
    unknown = Counter(name for name in names if _words(name) not in numbers)
    if unknown:
        raise DataError(
            f"{spec} has labels that are not among --labels: "
            f"{', '.join(sorted(unknown)[:_SHOWN])} ({len(unknown)} in all); add them or rename "
            "them"
        )
    return rows, np.array([numbers[_words(name)] for name in names], np.int64)


def own_labels(found: Sequence[str | None], spec: str) -> list[Label]:
    """The labels that occur in data, sorted; captions say them without underscores and hyphens.

    Args:
        found: the label of each row, or None.
        spec: the data's name, for the error.

    Raises:
        DataError: fewer than two.
    """
    names = sorted({label for label in found if label is not None})
    if len(names) < 2:
        raise DataError(
            f"{spec} has {len(names) or 'no'} label{'s' if not names else ''}, expected two or "
            "more; name a label column, or a folder with one folder per class"
        )
    return [
        Label([name], [" ".join(name.replace("_", " ").replace("-", " ").split())])
        for name in names
    ]


def empty_classes(targets: NDArray[np.int64], labels: Sequence[str]) -> str:
    """A sentence about labels that no image has; empty if there are none."""
    empty = [labels[i] for i in sorted(set(range(len(labels))) - set(targets.tolist()))]
    if not empty:
        return ""
    more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
    return (
        f"labels without an image: {len(empty)} of {len(labels)} ({', '.join(empty[:_SHOWN])}"
        f"{more}); they can be chosen, and count in no mean over classes"
    )


def _words(label: str) -> str:
    return " ".join(label.lower().replace("_", " ").replace("-", " ").split())
