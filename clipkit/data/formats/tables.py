"""Tables of images and captions: CSV and TSV, JSON, Parquet."""

import csv
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from clipkit.data.captions import single, strings
from clipkit.data.formats.columns import Columns, Common, find_columns, path_sample
from clipkit.data.formats.image_paths import SAMPLE, ImagePaths, find_image_paths
from clipkit.data.formats.json_tables import JsonTable
from clipkit.data.formats.nested import FIRST_IMAGE, Nested, arrow_leaves, is_image
from clipkit.data.images import Skipped
from clipkit.data.rows import Position, Read, Stream
from clipkit.data.source import (
    MEMORY_LIMIT,
    Notes,
    RowDict,
    Skips,
    Source,
    Wanted,
    chunks,
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
    ".json": "json",
    ".parquet": "parquet",
}
_SEPARATORS = ",;\t|"
_TEXT_GROWTH = 4  # rows of a text table take about four times its size while they are gathered
_CHUNK = 4096  # rows of a text table held at a time
_ROWS = 256  # of a Parquet file, pictures and all
_STREAMED_ROWS = 64  # likewise, of which a shuffled stream holds some for each of 16 row groups


def open_table(
    files: list[Path],
    wanted: Wanted,
    streaming: bool | None,
    *,
    kind: str | None = None,
    split: str | None = None,
) -> Source:
    """Open tables of one format and with the same columns as one source.

    Args:
        files: in order; rows of the same image file in several of them are merged.
        wanted: the columns.
        streaming: read rows in order; None if they take more than 2 GiB.
        kind: of the source, if that is not the format.
        split: of a JSON table; see ``JsonTable.open``.

    Raises:
        DataError: a file is not such a table, a column needed is not in all of them, or they lie in
            different folders and hold paths.
    """
    form = TABLES[files[0].suffix.lower()]
    spec, skipped, notes = str(files[0]), Skips(), Notes()
    growth = 1 if form == "parquet" else _TEXT_GROWTH
    read: Read
    shards: list[Any]
    try:
        size = sum(file.stat().st_size for file in files) * growth
        streams = size > MEMORY_LIMIT if streaming is None else streaming
        if form == "parquet":
            held = ParquetRows.open(files, wanted, skipped, notes)
            common, shards = held.common, held.groups
            read = partial(held.read, size=_STREAMED_ROWS if streams else _ROWS)
        else:
            (common, read), shards = _text(form, files, wanted, skipped, notes, split), files
    except OSError as error:
        raise DataError(f"{spec} cannot be read: {error}") from None
    prints = fingerprint_of(
        [(file.name, file) for file in files], wanted, *([split] if split else [])
    )
    rows: Any = Stream(read, shards)
    if not streams:
        rows = in_memory(rows.batches(), skipped, common.told)
    return Source(spec, kind or form, rows, common.paths.root, prints, skipped, notes)


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
    def open(
        cls, files: list[Path], wanted: Wanted, skipped: list[Skipped], notes: list[str]
    ) -> Self:
        """Read the schemas and metadata of the files; raises DataError if one is damaged."""
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
                raise DataError(f"{file} is not an intact Parquet file: {error}") from None
            types.append({part.name: part.type for part in schema})
            if file is files[0]:
                columns = columns_of(schema, wanted, str(file), notes)
            _check_same(columns, schema.names, file, files[0])
        more = columns.metadata(types, str(files[0])) if wanted.metadata else None
        width = len(str(max(rows - 1, 0)))
        paths = _parquet_paths(groups, files[0].parent, columns, wanted, notes)
        return cls(groups, Common(columns, paths, skipped, width, metadata=more, notes=notes))

    def batches(
        self, group: Group, size: int, start: int = 0
    ) -> Iterator[tuple["pa.RecordBatch", int]]:
        """The rows of a group in the common columns, of ``size`` rows of the file at a time.

        Each batch comes with how many rows of the group were read by then. A group can be read
        from its start alone: the rows before ``start``, where a batch ends, are only decoded.
        """
        import pyarrow.parquet as pq

        done = 0
        with pq.ParquetFile(group.file) as table:
            used = self.common.used
            for batch in table.iter_batches(size, row_groups=[group.number], columns=used):
                done += len(batch)
                if done > start:
                    yield self.common.batch(batch, group.first + done - len(batch)), done

    def read(
        self, group: Group, at: Position, size: int
    ) -> Iterator[tuple["pa.RecordBatch", Position]]:
        """The rows of a group; what cannot be read is told among what was left out."""
        import pyarrow as pa

        done = at or 0
        try:
            for batch, end in self.batches(group, size, done):
                yield batch, end
                done = end
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = f"row group {group.number} cannot be read from row {group.first + done} on"
            self.common.skipped.append(Skipped(group.file.name, f"{reason}: {error}"))


def _parquet_paths(
    groups: list[Group], folder: Path, columns: Columns, wanted: Wanted, notes: list[str]
) -> ImagePaths:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values: list[str | None] = []
    for group in groups[:1]:
        with pq.ParquetFile(group.file) as table:
            leaves = arrow_leaves(table.schema_arrow)
            if is_image(leaves.get(columns.path(columns.image), pa.string())):
                break
            with suppress(pa.ArrowException):  # is reported when the rows are read
                batch = next(table.iter_batches(SAMPLE, row_groups=[0], columns=columns.stored))
                found = columns.plain(batch, []).column(columns.image).to_pylist()
                values = [value for value in found if isinstance(value, str)]
    return find_image_paths(path_sample(values), folder, wanted.image_root, notes)


def columns_of(schema: "pa.Schema", wanted: Wanted, spec: str, notes: list[str]) -> Columns:
    """The columns of an Arrow schema, with the class names that ``datasets`` keeps in it."""
    from datasets import ClassLabel, Features

    leaves = arrow_leaves(schema)
    nested = Nested.find(leaves, notes)
    types: dict[str, pa.DataType | None] = {".".join(path): leaves[path] for path in leaves}
    types |= {name: leaves.get(path) for name, path in nested.paths.items()}
    columns = find_columns(types, wanted, spec)
    columns = replace(columns, nested=nested.only(columns.used))
    if columns.label and b"huggingface" in (schema.metadata or {}):
        kind = Features.from_arrow_schema(schema).get(columns.label)
        if isinstance(kind, ClassLabel):
            return replace(columns, classes=kind.names)
    return columns


def _text(
    form: str,
    files: list[Path],
    wanted: Wanted,
    skipped: list[Skipped],
    notes: list[str],
    split: str | None,
) -> tuple[Common, Read]:
    tables = {file: _open_text(form, file, notes, split) for file in files}
    columns: Columns | None = None
    sample: list[RowDict] = []
    for file, table in tables.items():
        # The rest of the file is read later, which is when bad lines are reported.
        head = [record for record, _ in islice(table.records([]), 1000)]
        names = dict.fromkeys(name for record in head for name in record)
        if not names:
            raise DataError(f"{file} holds no rows, expected a {form} table of images")
        columns = columns or find_columns(names, wanted, str(file))
        _check_same(columns, names, file, files[0])
        sample = sample or head
    assert columns is not None
    if len({file.parent for file in files}) > 1 and wanted.image_root is None:
        raise DataError(_different_folders(files))
    tables = {file: table.using(columns.used) for file, table in tables.items()}
    more = None
    if wanted.metadata:  # types are those of all rows: a pass of its own
        from clipkit.data.formats.metadata import infer_types

        typed = form != "csv"
        types = [
            infer_types((record for record, _ in table.records([])), typed=typed)
            for table in tables.values()
        ]
        more = columns.metadata(types, str(files[0]))
    values = (text for record in sample for text in strings(record.get(columns.image))[:1])
    paths = find_image_paths(path_sample(values), files[0].parent, wanted.image_root, notes)
    common = Common(columns, paths, skipped, metadata=more, notes=notes)

    def read(file: Path, at: Position) -> Iterator[tuple["pa.RecordBatch", Position]]:
        start, first = at or ((0, 0), 0)
        own = replace(common, prefix=f"{file.name}:") if len(files) > 1 else common
        for chunk in chunks(tables[file].records(skipped, start), _CHUNK):
            batch = _arrow([record for record, _ in chunk], own)
            yield own.batch(batch, first), [chunk[-1][1], first := first + len(chunk)]

    return common, read


def _open_text(
    form: str, file: Path, notes: list[str], split: str | None
) -> "CsvTable | JsonTable":
    return CsvTable(file) if form == "csv" else JsonTable.open(file, split, notes)


def _check_same(columns: Columns, names: Collection[str], file: Path, first: Path) -> None:
    if missing := [name for name in columns.stored if name not in names]:
        raise DataError(
            f"{file} has no column {missing[0]!r}, which {first} has; open tables with different "
            "columns one by one"
        )


def _different_folders(files: list[Path]) -> str:
    other = next(file for file in files if file.parent != files[0].parent)
    return (
        f"{files[0]} and {other} lie in different folders, and image paths are relative to the "
        "folder of their table; put the tables into one folder, or name that of the images with "
        "--image-root (image_root=)"
    )


def _arrow(records: list[RowDict], common: Common) -> "pa.RecordBatch":
    import pyarrow as pa

    columns = common.columns
    arrays = {}
    for name in columns.used:
        values = [strings(record.get(name)) for record in records]
        if name in columns.captions:
            arrays[name] = pa.array(values, pa.list_(pa.string()))
        else:
            if name == columns.image and any(len(value) > 1 for value in values):
                common.notes.append(FIRST_IMAGE.format(column=name))
            arrays[name] = pa.array([single(value) for value in values], pa.string())
    if common.metadata:
        arrays |= common.metadata.texts(records)
    return pa.RecordBatch.from_pydict(arrays)


class _Lines:
    """The lines of a text file from anywhere on, parted as ``open`` parts them with newline="".

    Attributes:
        place: bytes and lines before the next one.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek((0, 0))

    def seek(self, place: Sequence[int]) -> None:
        """Go on at a place where a line begins."""
        self._stream.seek(place[0])
        self.place = list(place)
        self._parts = iter(list[bytes]())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = next(self._parts, None)
        if line is None:
            self._parts = iter(next(self._stream).splitlines(keepends=True))
            line = next(self._parts)
        offset, number = self.place
        self.place = [offset + len(line), number + 1]
        text = line.decode("utf-8", "replace")
        return text if offset else text.removeprefix("\ufeff")


@dataclass(frozen=True)
class CsvTable:
    """The records of a CSV file."""

    file: Path

    def using(self, _: Sequence[str]) -> Self:
        """The same: all columns are read."""
        return self

    def records(
        self, skipped: list[Skipped], start: Sequence[int] = (0, 0)
    ) -> Iterator[tuple[RowDict, list[int]]]:
        """The records from a position on, each with the position after it."""
        with self.file.open("rb") as stream:
            lines = _Lines(stream)
            first = next(lines, "")
            separator = max(
                _SEPARATORS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), []))
            )
            lines.seek((0, 0))
            reader = csv.reader(lines, delimiter=separator)
            try:
                header = [name.strip() for name in next(reader, [])]
                if start[0]:
                    lines.seek(start)
                for record in reader:
                    if len(record) == len(header):
                        yield dict(zip(header, record, strict=True)), lines.place
                    elif record:
                        found = f"has {len(record)} fields, its header has {len(header)}"
                        skipped.append(Skipped(f"{self.file.name}:{lines.place[1]}", found))
            except csv.Error as error:
                raise DataError(f"{self.file}:{lines.place[1]} is not CSV: {error}") from None
