"""Columns of an index's records, and conditions on them: ``label=red``, ``year>=2020``."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipkit.index.filters import FOLDER, folders_of
from clipkit.web.security import RequestError

Rows = NDArray[np.bool_]
"""bool [rows], True for those that are meant."""
MOST_VALUES = 50
"""A text column of more values is nothing to choose from."""
MOST_LETTERS = 100
_OWN = ("key", "size", "mtime_ns", "captions", "content_hash", "id")  # not for choosing by
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    ">": pc.greater,
    "<": pc.less,
}


@dataclass(frozen=True)
class Column:
    """A column that pictures can be chosen by.

    Attributes:
        name: its name.
        kind: what it holds.
        values: of a text or truth column with few values, each with how many pictures have it.
        low: the smallest number or time, as text; None where there is none.
        high: the largest.
    """

    name: str
    kind: Literal["text", "number", "time", "truth"]
    values: list[tuple[str, int]]
    low: str | None
    high: str | None


@dataclass(frozen=True)
class Condition:
    """One condition: a column, how to compare, and the value as it was written."""

    column: str
    compare: str
    value: str


def with_folder(records: pa.Table) -> pa.Table:
    """The records with a column that says in which folder each lies, unless all lie in one."""
    folders = folders_of(records["key"])
    if FOLDER in records.column_names or pc.count_distinct(folders).as_py() < 2:
        return records
    return records.append_column(FOLDER, folders)


def find_columns(records: pa.Table) -> list[Column]:
    """The columns that pictures can be chosen by; one that is empty is none."""
    names = [name for name in records.column_names if name not in _OWN]
    found = (_column(name, records[name]) for name in names)
    return [column for column in found if column is not None]


def _column(name: str, data: pa.ChunkedArray) -> Column | None:
    kind = _kind(data.type)
    if kind is None or data.null_count == len(data):
        return None
    if kind in ("number", "time"):
        ends = pc.min_max(data)
        return Column(name, kind, [], str(ends["min"].as_py()), str(ends["max"].as_py()))
    counts = pc.value_counts(data.drop_null().cast(pa.string())).to_pylist()
    few = len(counts) <= MOST_VALUES and all(len(i["values"]) <= MOST_LETTERS for i in counts)
    values = sorted((item["values"], item["counts"]) for item in counts) if few else []
    return Column(name, kind, values, None, None)


def _kind(data: pa.DataType) -> Literal["text", "number", "time", "truth"] | None:
    types = pa.types
    if types.is_string(data) or types.is_large_string(data):
        return "text"
    if types.is_integer(data) or types.is_floating(data):
        return "number"
    if types.is_timestamp(data) or types.is_date(data):
        return "time"
    return "truth" if types.is_boolean(data) else None


def parse_conditions(texts: Iterable[str], columns: Sequence[Column]) -> list[Condition]:
    """Conditions from texts like ``label=red``.

    Raises:
        RequestError: one has no such form, or names a column that is not there.
    """
    names = [column.name for column in columns]
    conditions = []
    for text in texts:
        match = re.fullmatch(r"(.+?)\s*(>=|<=|!=|=|>|<|~)\s*(.*)", text, re.DOTALL)
        if match is None:
            raise RequestError(
                422, f"{text!r} is no condition, expected COLUMN=VALUE, or with != >= <= > < or ~"
            )
        if match[1] not in names:
            close = difflib.get_close_matches(match[1], names, 1)
            found = ", ".join(names) or "none"
            there = f"did you mean {close[0]}?" if close else f"there are: {found}"
            raise RequestError(422, f"there is no column {match[1]!r} to choose by; {there}")
        conditions.append(Condition(*match.groups()))
    return conditions


def rows_where(records: pa.Table, conditions: Sequence[Condition]) -> Rows:
    """The rows for which all conditions hold; of several values of one column, any will do.

    Raises:
        RequestError: a value is not of its column's kind.
    """
    alternatives: dict[str, list[pa.ChunkedArray]] = {}
    required = []
    for condition in conditions:
        rows = pc.fill_null(_holds(records[condition.column], condition), False)
        if condition.compare == "=":
            alternatives.setdefault(condition.column, []).append(rows)
        else:
            required.append(rows)
    required += [reduce(pc.or_, rows) for rows in alternatives.values()]
    every = pa.array(np.ones(len(records), bool))
    return np.asarray(reduce(pc.and_, required, every), bool)


def _holds(data: pa.ChunkedArray, condition: Condition) -> pa.ChunkedArray:
    value = condition.value
    if condition.compare == "~":
        return pc.match_substring(data.cast(pa.string()), value, ignore_case=True)
    if not value:
        return data.is_null() if condition.compare == "=" else data.is_valid()
    try:
        wanted = pa.scalar(value).cast(data.type)
    except pa.ArrowException:
        raise RequestError(
            422,
            f"{value!r} cannot be compared with the column {condition.column!r}, which holds "
            f"{_kind(data.type)}s; write the value as one",
        ) from None
    return _COMPARE[condition.compare](data, wanted)
