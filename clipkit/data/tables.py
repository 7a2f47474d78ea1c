"""Tables of images and captions: CSV and TSV, JSON lines, Parquet."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from clipkit.data.columns import Columns, Common, find_columns
from clipkit.data.images import Skipped
from clipkit.data.rows import (
    MEMORY_LIMIT,
    Row,
    Skips,
    Source,
    Wanted,
    as_stream,
    chunks,
    clean_text,
    fingerprint_of,
    in_memory,
)
from clipkit.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

TABLES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
Read = Callable[[list[Any]], Iterator["pa.RecordBatch"]]
"""Gives the rows of shards, in the common form."""
_SEPARATORS = ",;\t|"
_TEXT_GROWTH = 4  # rows of a text table take about four times its size while they are gathered
_CHUNK = 4096  # rows of a text table held at a time
_ROWS = 256  # of a Parquet file, pictures and all


def open_table(
    files: list[Path], wanted: Wanted, streaming: bool | None, *, kind: str | None = None
) -> Source:
    """Open one CSV or JSON lines file, or Parquet files of the same columns.

    Raises:
        DataError: a file is no such table, or the columns needed are not there.
    """
    form = TABLES[files[0].suffix.lower()]
    spec, root, skipped = str(files[0]), files[0].parent, Skips()
    if form != "parquet" and len(files) > 1:
        raise DataError(f"{len(files)} {form} tables found, expected one; join them into one file")
    growth = 1 if form == "parquet" else _TEXT_GROWTH
    read: Read
    shards: list[Any]
    try:
        size = sum(file.stat().st_size for file in files) * growth
        if form == "parquet":
            held = ParquetRows.open(files, wanted, skipped)
            common, read, shards = held.common, held.read, held.groups
        else:
            (common, read), shards = _text(form, files[0], wanted, skipped), files
    except OSError as error:
        raise DataError(f"{spec} cannot be read: {error}") from None
    prints = fingerprint_of([(file.name, file) for file in files], wanted)
    rows: Any
    if size > MEMORY_LIMIT if streaming is None else streaming:
        rows = as_stream(read, shards, common.told)
    else:
        rows = in_memory(read(shards), prints, skipped, common.told)
    return Source(spec, kind or form, rows, root, prints, skipped)


@dataclass(frozen=True)
class Group:
    """A row group of a Parquet file; ``first`` is its first row's number among those of all."""

    file: Path
    number: int
    first: int


@dataclass(frozen=True)
class ParquetRows:
    """The rows of Parquet files of the same columns, a row group at a time.

    Attributes:
        groups: in order.
        common: brings what is read into the common columns.
    """

    groups: list[Group]
    common: Common

    @classmethod
    def open(cls, files: list[Path], wanted: Wanted, skipped: list[Skipped]) -> Self:
        """Read what the files say of themselves; raises DataError where one is damaged."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        groups, rows = [], 0
        types: list[dict[str, pa.DataType]] = []
        for file in files:
            try:
                with pq.ParquetFile(file) as table:
                    schema = table.schema_arrow
                    for number in range(table.num_row_groups):
                        groups.append(Group(file, number, rows))
                        rows += table.metadata.row_group(number).num_rows
            except pa.ArrowException as error:
                raise DataError(f"{file} is no intact Parquet file: {error}") from None
            types.append({part.name: part.type for part in schema})
            if file is files[0]:
                columns = columns_of(schema, wanted, str(file))
        more = columns.metadata(types, str(files[0])) if wanted.metadata else None
        width = len(str(max(rows - 1, 0)))
        return cls(groups, Common(columns, files[0].parent, skipped, width, metadata=more))

    def batches(self, group: Group, size: int) -> Iterator["pa.RecordBatch"]:
        """The rows of a group in the common columns, of ``size`` rows of the file at a time."""
        import pyarrow.parquet as pq

        first = group.first
        with pq.ParquetFile(group.file) as table:
            used = self.common.used
            for batch in table.iter_batches(size, row_groups=[group.number], columns=used):
                yield self.common.batch(batch, first)
                first += len(batch)

    def read(self, groups: list[Any]) -> Iterator["pa.RecordBatch"]:
        """The rows of some groups; what cannot be read is told among what was left out."""
        import pyarrow as pa

        for group in groups:
            done = group.first
            try:
                for batch in self.batches(group, _ROWS):
                    yield batch
                    done += _ROWS
            except (pa.ArrowException, OSError, KeyError) as error:
                reason = f"row group {group.number} cannot be read from row {done} on: {error}"
                self.common.skipped.append(Skipped(group.file.name, reason))


def columns_of(schema: "pa.Schema", wanted: Wanted, spec: str) -> Columns:
    """The columns of an Arrow schema, with the class names that ``datasets`` keeps in it."""
    from datasets import ClassLabel, Features

    columns = find_columns({part.name: part.type for part in schema}, wanted, spec)
    if columns.label and b"huggingface" in (schema.metadata or {}):
        kind = Features.from_arrow_schema(schema)[columns.label]
        if isinstance(kind, ClassLabel):
            return replace(columns, classes=kind.names)
    return columns


def _text(form: str, file: Path, wanted: Wanted, skipped: list[Skipped]) -> tuple[Common, Read]:
    records = _csv_records if form == "csv" else _json_records
    # Told at the second, full reading; the names alone are wanted here.
    head = list(islice(records(file, []), 1000))
    names = dict.fromkeys(name for record in head for name in record)
    if not names:
        raise DataError(f"{file} holds no rows, expected a {form} table of images")
    columns = find_columns(names, wanted, str(file))
    more = None
    if wanted.metadata:  # types are those of all rows: a pass of its own
        from clipkit.data.metadata import infer_types

        types = infer_types(records(file, []), typed=form == "jsonl")
        more = columns.metadata([types], str(file))
    common = Common(columns, file.parent, skipped, metadata=more)

    def read(files: list[Path]) -> Iterator["pa.RecordBatch"]:
        first = 0
        for one in files:
            for batch in _arrow(records(one, skipped), common):
                yield common.batch(batch, first)
                first += len(batch)

    return common, read


def _arrow(records: Iterable[Row], common: Common) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    columns = common.columns
    for chunk in chunks(records, _CHUNK):
        arrays = {}
        for name in columns.used:
            values = [_texts(record.get(name)) for record in chunk]
            if name in columns.captions:
                arrays[name] = pa.array(values, pa.list_(pa.string()))
            else:
                first = [value[0] if value else None for value in values]
                arrays[name] = pa.array(first, pa.string())
        if common.metadata:
            arrays |= common.metadata.texts(chunk)
        yield pa.RecordBatch.from_pydict(arrays)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [clean_text(one) for one in values if one is not None]


def _csv_records(file: Path, skipped: list[Skipped]) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        first = stream.readline()
        separator = max(
            _SEPARATORS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), []))
        )
        stream.seek(0)
        reader = csv.reader(stream, delimiter=separator)
        try:
            header = [name.strip() for name in next(reader, [])]
            for record in reader:
                if len(record) == len(header):
                    yield dict(zip(header, record, strict=True))
                elif record:
                    found = f"has {len(record)} fields, its header has {len(header)}"
                    skipped.append(Skipped(f"{file.name}:{reader.line_num}", found))
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num} is not CSV: {error}") from None


def _json_records(file: Path, skipped: list[Skipped]) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                skipped.append(Skipped(f"{file.name}:{number}", f"is not JSON: {error}"))
                continue
            if isinstance(record, dict):
                yield record
            elif line.strip():
                skipped.append(Skipped(f"{file.name}:{number}", "is no JSON object"))
