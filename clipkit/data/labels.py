"""What the labels of a table of pairs decide: how often a row is drawn, and what it weighs."""

from collections.abc import Mapping
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from clipkit.data.sources import Source
from clipkit.errors import ConfigError, DataError

_SHOWN = 8  # labels


def class_numbers(source: Source) -> NDArray[np.int64]:
    """Each row's label as a number counted from 0, int64 [rows].

    Raises:
        ConfigError: the source streams.
        DataError: a row has no label.
    """
    if source.streaming:
        raise ConfigError(
            f"data.balance draws rows at random, but {source.spec} streams; set "
            'data.streaming = "no", or leave data.balance empty'
        )
    labels = list(source.rows["label"])
    bare = [number for number, label in enumerate(labels) if not label]
    if bare:
        key = source.rows[bare[0]]["key"]
        raise DataError(
            f"{len(bare)} of {len(labels)} rows of {source.spec} have no label (for example "
            f'{key}), expected one in each for data.balance = "label"; name data.label_column, '
            "or leave data.balance empty"
        )
    numbers: NDArray[np.int64] = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    return numbers


def require_labels(source: Source, weights: Mapping[str, float]) -> None:
    """Refuse weights of labels that no row of a table has; those of a stream are not known.

    Raises:
        DataError: a label named in ``weights`` does not occur; with the nearest that does.
    """
    if source.streaming or not weights:
        return
    known = sorted(set(source.rows["label"]) - {None})
    for label in weights:
        if label in known:
            continue
        close = get_close_matches(label, known, n=1)
        some = ", ".join(known[:_SHOWN]) + (", …" if len(known) > _SHOWN else "")
        hint = f"did you mean {close[0]!r}" if close else f"its labels are: {some or 'none'}"
        raise DataError(
            f"data.caption_weights names {label!r}, which is no label of {source.spec} ({hint})"
        )
