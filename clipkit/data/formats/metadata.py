"""Metadata: the columns of a table beyond images, captions and labels.

Only columns of plain values are kept, which filters and tables of hits can use: numbers, strings,
booleans, dates and times. Text files have no types; theirs are inferred from all of their values.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipkit.data.captions import MISSING
from clipkit.data.source import RowDict, chunks, clean_text

INTEGER, NUMBER, TRUTH = pa.int64(), pa.float64(), pa.bool_()
DAY, TIME, TEXT = pa.date32(), pa.timestamp("us"), pa.string()
"""The types of metadata. Times with a time zone are converted to UTC."""
OWN = ("key", "image", "captions", "label", "size", "mtime_ns", "content_hash", "id")
"""Fields that all records have; a table's column of such a name is renamed to ``table_…``."""
MOST = 100
"""Columns that are kept at most: a table may hold hundreds of a model's features."""
_CHUNK = 4096
_FORMS = (
    # Values with a leading zero are postcodes or article numbers, which are strings.
    (INTEGER, r"^-?(0|[1-9]\d{0,17})$"),
    (NUMBER, r"^-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,3})?$"),
    (TRUTH, r"^([Tt]rue|[Ff]alse|TRUE|FALSE)$"),
)
_TIMES = (
    (DAY, r"^\d{4}-\d\d-\d\d$"),
    (TIME, r"^\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d{1,6})?)?)?$"),
)


@dataclass(frozen=True)
class Metadata:
    """The metadata columns of a table.

    Attributes:
        types: Arrow types by the names in the table.
    """

    types: dict[str, pa.DataType]

    @property
    def schema(self) -> pa.Schema:
        """The names and types of the fields in records."""
        return pa.schema(
            [(_record_name(name, self.types), kind) for name, kind in self.types.items()]
        )

    def texts(self, records: Sequence[RowDict]) -> dict[str, pa.Array]:
        """The columns of a text file's records as strings, which ``read`` converts.

        Words for a missing value, such as NA, are null unless the column holds strings.
        """
        return {
            name: pa.array([_text(record.get(name), kind) for record in records], TEXT)
            for name, kind in self.types.items()
        }

    def read(self, batch: pa.RecordBatch) -> pa.StructArray:
        """The columns of a batch as one struct; a column that the batch lacks is null."""
        arrays = []
        for name, kind in self.types.items():
            place = batch.schema.get_field_index(name)
            missing = pa.nulls(len(batch), kind)
            arrays.append(missing if place < 0 else _converted(batch.column(place), kind))
        return pa.StructArray.from_arrays(arrays, fields=list(self.schema))


def find_metadata(
    tables: Iterable[Mapping[str, pa.DataType]],
    used: Collection[str],
    spec: str,
    notes: list[str],
) -> Metadata | None:
    """The columns of plain values that have no other use; the others are named in a note.

    Args:
        tables: Arrow types by name, for each file of the source.
        used: columns that have another use.
        spec: the source.
        notes: takes the sentence about the others.

    Returns:
        None if there is no such column.
    """
    kinds: dict[str, pa.DataType | None] = {}
    for types in tables:
        for name, given in types.items():
            # Programs write columns such as __index_level_0__ for their own use.
            if name in used or not name.strip("_ ") or name.startswith("__"):
                continue
            if pa.types.is_null(given):
                continue
            kind = kind_of(given)
            kinds[name] = joined(kinds[name], kind) if name in kinds else kind
    good = {name: kind for name, kind in kinds.items() if kind is not None}
    carried = dict(islice(good.items(), MOST))
    if left := [name for name in kinds if name not in carried]:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        notes.append(
            f"{spec}: columns that are not kept as metadata: {shown}; those of numbers, strings, "
            f"booleans and dates are, at most {MOST}"
        )
    return Metadata(carried) if carried else None


def kind_of(given: pa.DataType) -> pa.DataType | None:
    """The metadata type for a column's type; None if it does not hold plain values."""
    types = pa.types
    kind = given.value_type if types.is_dictionary(given) else given
    if types.is_uint64(kind):  # neither int64 nor float64 holds all of its values
        return TEXT
    for fits, found in (
        (types.is_boolean, TRUTH),
        (types.is_integer, INTEGER),
        (types.is_floating, NUMBER),
        (types.is_decimal, NUMBER),
        (types.is_date, DAY),
        (types.is_timestamp, TIME),
        (types.is_string, TEXT),
        (types.is_large_string, TEXT),
    ):
        if fits(kind):
            return found
    return None


def joined(one: pa.DataType | None, other: pa.DataType | None) -> pa.DataType | None:
    """The type that holds the values of two types: strings if they have nothing in common."""
    if one is None or other is None or one == other:
        return one if one == other else None
    both = {one, other}
    if both == {INTEGER, NUMBER}:
        return NUMBER
    return TIME if both == {DAY, TIME} else TEXT


def infer_types(records: Iterable[RowDict], *, typed: bool) -> dict[str, pa.DataType]:
    """Infer the Arrow types of a text file's columns from all of its records.

    Args:
        records: values by column; all strings in CSV.
        typed: strings are strings, as in JSON, unless they are dates.
    """
    found: dict[str, pa.DataType] = {}
    for chunk in chunks(records, _CHUNK):
        for name in dict.fromkeys(name for record in chunk for name in record):
            kind = _type_of([record.get(name) for record in chunk], typed)
            old = found.get(name, pa.null())
            if pa.types.is_null(old) or pa.types.is_null(kind):
                found[name] = kind if pa.types.is_null(old) else old
            else:
                found[name] = joined(kind_of(old), kind_of(kind)) or pa.list_(TEXT)
    return found


def plain_text(value: Any) -> str | None:
    """A value of a text file as a string that its type can be inferred from; None if missing."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return None if value is None or value != value else clean_text(value) or None


def _text(value: Any, kind: pa.DataType) -> str | None:
    text = plain_text(value)
    return None if text is None or (kind != TEXT and text.lower() in MISSING) else text


def _type_of(values: list[Any], typed: bool) -> pa.DataType:
    held = [value for value in values if plain_text(value) is not None]
    kinds = {type(value) for value in held}
    if not kinds:
        return pa.null()
    if kinds & {list, dict}:
        return pa.list_(TEXT)
    if kinds == {bool}:
        return TRUTH
    if kinds == {int}:
        return INTEGER if all(abs(value) < 2**63 for value in held) else TEXT
    if kinds <= {int, float}:
        return NUMBER
    if kinds != {str}:
        return TEXT
    texts = pa.array([_text(value, pa.null()) for value in held], TEXT).drop_null()
    if len(texts) == 0:
        return pa.null()
    for kind, form in _TIMES if typed else _FORMS + _TIMES:
        if pc.all(pc.match_substring_regex(texts, form)).as_py() and _is_read(texts, kind):
            return kind
    return TEXT


def _is_read(texts: pa.Array, kind: pa.DataType) -> bool:
    """Whether strings of the right form are values, which the 30th of February is not."""
    try:
        texts.cast(kind)
    except pa.ArrowException:
        return False
    return True


def _converted(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(kind, safe=kind not in (TIME, NUMBER))
    if kind == NUMBER:  # NaN is not equal to itself, and JSON does not have it
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
    return _readable(column) if kind == TEXT else column


def _readable(texts: pa.Array) -> pa.Array:
    """The strings, with U+FFFD for bytes that are not UTF-8, which Parquet files may hold."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        raw = texts.cast(pa.binary()).to_pylist()
        texts = pa.array([t and t.decode("utf-8", "replace") for t in raw], TEXT)
    return texts


def _record_name(name: str, names: Collection[str]) -> str:
    own = name
    while own in OWN or (own != name and own in names):
        own = f"table_{own}"
    return own
