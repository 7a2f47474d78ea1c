"""Conditions on the records of an index: ``year >= 2023 and folder = 'holiday'``.

The form is that of SQL's WHERE as far as comparing columns with values goes. Python's own parser
reads it and Arrow's compute engine evaluates it; nothing in it is ever run as code.
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from operator import and_, eq, ge, gt, le, lt, ne, or_
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipkit.data.formats.metadata import DAY, INTEGER, NUMBER, TEXT, TIME, TRUTH, kind_of
from clipkit.errors import DataError
from clipkit.index.segments import ID, Segment
from clipkit.store.shards import conform, widened

FOLDER = "folder"
"""A column that every index has: where an image lies, unless its source has a column so named."""
MOST_LETTERS = 4000
_ROW = "\0row"
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: eq,
    ast.NotEq: ne,
    ast.Lt: lt,
    ast.LtE: le,
    ast.Gt: gt,
    ast.GtE: ge,
}
_HOLDS = {TEXT: "text", TRUTH: "true or false", DAY: "days", TIME: "times"}
# Texts in quotes, which are doubled inside; numbers; `columns`; signs of comparison; words.
_TOKEN = re.compile(
    r"""('(?:[^']|'')*'|"(?:[^"]|"")*")|(\d[\w.]*)|`([^`]+)`|(<>|<=|>=|==|!=|=)|([^\W\d]\w*)"""
)
_WORDS = {"and", "or", "not", "in", "is"}
_CONSTANTS = {"null": "None", "none": "None", "true": "True", "false": "False"}


def rows_where(segments: Sequence[Segment], condition: str) -> NDArray[np.bool_]:
    """The rows of an index for which a condition holds, bool [n] in the order of its records.

    Only the columns that the condition names are read.

    Args:
        segments: of the index.
        condition: such as ``"year >= 2023 and folder = 'holiday'"``.

    Raises:
        DataError: a syntax error, an unknown column, or a value of another type than its column.
    """
    schema = widened(*(segment.schema for segment in segments))
    if FOLDER not in schema.names:
        schema = schema.append(pa.field(FOLDER, TEXT))
    wanted = parse_where(condition, schema)
    found = [np.empty(0, bool)]
    for segment in segments:
        rows = wanted.rows(_columns(segment, wanted.columns))
        found.append(rows if segment.live is None else rows[segment.live])
    return np.concatenate(found)


@dataclass(frozen=True)
class Condition:
    """A condition, read.

    Attributes:
        expression: of Arrow's.
        schema: the columns that it names.
    """

    expression: pc.Expression
    schema: pa.Schema

    @property
    def columns(self) -> set[str]:
        """Their names."""
        return set(self.schema.names)

    def rows(self, table: pa.Table) -> NDArray[np.bool_]:
        """The rows for which it holds, bool [rows]; a null holds only for ``is null``."""
        rows = pa.array(np.arange(len(table)))
        numbered = conform(table, self.schema).append_column(_ROW, rows)
        mask = np.zeros(len(table), bool)
        mask[numbered.filter(self.expression)[_ROW].to_numpy()] = True
        return mask


def _columns(segment: Segment, names: set[str]) -> pa.Table:
    """Some columns of a segment's records, and the keys."""
    columns: dict[str, Any] = {"key": segment.keys}
    for name in names & set(segment.schema.names):
        columns[name] = segment.ids if name == ID.name else segment.column(name)
    if FOLDER in names - columns.keys():
        columns[FOLDER] = folders_of(segment.keys)
    return pa.table(columns)


def folders_of(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where images lie, by their keys; empty for those that lie in no folder."""
    return pc.replace_substring_regex(keys, r"(^|/)[^/]*$", "")


def parse_where(text: str, schema: pa.Schema) -> Condition:
    """Read a condition on columns of a schema; errors as of ``rows_where``."""
    if len(text) > MOST_LETTERS:
        raise DataError(
            f"the condition has {len(text)} letters, expected at most {MOST_LETTERS}; shorten it"
        )
    words: dict[str, str] = {}
    try:
        tree = ast.parse(
            _TOKEN.sub(lambda match: _as_python(match, words), text).strip(), mode="eval"
        )
        reader = _Reader(text, schema, words)
        expression = reader.condition(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise DataError(_malformed(text, "")) from None
    return Condition(expression, pa.schema([schema.field(name) for name in sorted(reader.named)]))


def _as_python(match: re.Match[str], words: dict[str, str]) -> str:
    """A token as Python writes it; words get a made-up name, so that no keyword is in the way."""
    quoted, number, column, sign, word = match.groups()
    if quoted:
        mark = quoted[0]
        return repr(quoted[1:-1].replace(mark * 2, mark))
    if number:
        return str(number)
    if sign:
        return {"=": "==", "<>": "!="}.get(sign, sign)
    if column is None:
        low = word.lower()
        if low in _WORDS or low in _CONSTANTS:
            return _CONSTANTS.get(low, low)
    name = f"_{len(words)}"
    words[name] = word if column is None else column
    return name


def _malformed(text: str, found: str) -> str:
    return (
        f"{text!r} is not a condition{found}; expected columns compared with values, such as "
        "\"year >= 2023 and folder = 'holiday'\"; write texts in quotes, columns without"
    )


class _Reader:
    """Turns a syntax tree into an expression of Arrow's, and knows no more than comparisons."""

    def __init__(self, text: str, schema: pa.Schema, words: dict[str, str]) -> None:
        self._text, self._schema, self._words = text, schema, words
        self.named: set[str] = set()

    def condition(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self.condition(value) for value in values]
                return reduce(and_ if isinstance(op, ast.And) else or_, parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.condition(operand)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                lefts = [left, *rights[:-1]]
                pairs = zip(lefts, ops, rights, strict=True)
                return reduce(and_, [self._comparison(*pair) for pair in pairs])
            case ast.Name():
                name, kind = self._column(node)
                if kind != TRUTH:
                    self._refuse(f", the column {name!r} alone is not true or false")
                return pc.field(name)
        return self._refuse("")

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.In | ast.NotIn):
            found, column = self._membership(left, right)
            return ~found & column.is_valid() if isinstance(op, ast.NotIn) else found
        if not isinstance(left, ast.Name) and isinstance(right, ast.Name):
            mirrored = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
            left, op, right = right, mirrored.get(type(op), type(op))(), left
        if not isinstance(left, ast.Name):
            self._refuse(", a part of it names no column")
        name, kind = self._column(left)
        column = pc.field(name)
        if isinstance(right, ast.Constant) and right.value is None:
            if isinstance(op, ast.Eq | ast.Is):
                return column.is_null()
            if isinstance(op, ast.NotEq | ast.IsNot):
                return column.is_valid()
        if type(op) not in _COMPARE:
            self._refuse("")
        if isinstance(right, ast.Name):
            other, other_kind = self._column(right)
            if kind is None or not (kind == other_kind or {kind, other_kind} <= {INTEGER, NUMBER}):
                self._refuse(f", {name!r} and {other!r} hold things of different kinds")
            return _COMPARE[type(op)](column, pc.field(other))
        return _COMPARE[type(op)](column, self._value(right, name, kind))

    def _membership(self, left: ast.expr, right: ast.expr) -> tuple[pc.Expression, pc.Expression]:
        """``column in (1, 2)``, or ``'part' in column``, where both cases of a letter are one."""
        if isinstance(left, ast.Name):
            name, kind = self._column(left)
            listed = right.elts if isinstance(right, ast.Tuple | ast.List) else [right]
            values = pa.array([self._value(value, name, kind) for value in listed])
            column = pc.field(name)
            return column.isin(values.cast(self._schema.field(name).type)), column
        if not (isinstance(left, ast.Constant) and isinstance(left.value, str)):
            self._refuse("")
        if not isinstance(right, ast.Name):
            self._refuse(", a part of it names no column")
        name, kind = self._column(right)
        column = pc.field(name)
        if pa.types.is_list(self._schema.field(name).type):
            column = pc.binary_join(column, pc.scalar("\n"))
        elif kind != TEXT:
            self._refuse(f", the column {name!r} holds no texts to look into")
        return pc.match_substring(column, left.value, ignore_case=True), column

    def _column(self, node: ast.Name) -> tuple[str, pa.DataType | None]:
        name = self._words.get(node.id, node.id)
        if name not in self._schema.names:
            close = get_close_matches(name, self._schema.names, 1)
            there = f"did you mean {close[0]}" if close else ", ".join(self._schema.names)
            raise DataError(f"there is no column {name!r} ({there}); write texts in quotes")
        self.named.add(name)
        return name, kind_of(self._schema.field(name).type)

    def _value(self, node: ast.expr, name: str, kind: pa.DataType | None) -> pa.Scalar:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            node, sign = node.operand, -1
        if not isinstance(node, ast.Constant):
            self._refuse("")
        value = node.value
        try:
            if isinstance(value, bool):
                if kind == TRUTH:
                    return pa.scalar(value)
            elif isinstance(value, int | float):
                if kind in (INTEGER, NUMBER):
                    return pa.scalar(sign * value)
            elif isinstance(value, str) and kind in (TEXT, DAY, TIME):
                return pa.scalar(value).cast(self._schema.field(name).type)
        except (pa.ArrowException, OverflowError):
            pass
        holds = "lists" if kind is None else _HOLDS.get(kind, "numbers")
        dates = ", such as '2023-05-01'" if kind in (DAY, TIME) else ""
        raise DataError(
            f"{value!r} cannot be compared with the column {name!r}, which holds {holds}; write "
            f"the value as one{dates}"
        )

    def _refuse(self, found: str) -> NoReturn:
        raise DataError(_malformed(self._text, found))
