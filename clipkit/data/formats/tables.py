"""Tables of images and captions: CSV and TSV, JSON, Parquet."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from clipkit.data.captions import single, strings
from clipkit.data.formats.columns import Columns, Common, find_columns
from clipkit.data.formats.csv_tables import CsvTable
from clipkit.data.formats.image_paths import SAMPLE
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
_TEXT_GROWTH = 4  # memory for the rows of a text table while it is read, per byte of the file
_HEAD_BYTES = 4 << 20  # of a text table read ahead
_CHUNK = 4096  # rows of a text table in a batch
_CHUNK_BYTES = 32 << 20  # likewise, which matters if the images are inside
_ROWS = 256  # of a Parquet file, images and all
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
            parquet = ParquetRows.open(files, wanted, skipped, notes)
            common, shards = parquet.common, parquet.groups
            read = partial(parquet.read, size=_STREAMED_ROWS if streams else _ROWS)
        else:
            (common, read), shards = _text(form, files, wanted, skipped, notes, split), files
    except OSError as error:
        raise DataError(f"{spec} cannot be read: {error}") from None
    prints = fingerprint_of(
        [(file.name, file) for file in files], wanted, *([split] if split else [])
    )
    rows: Any = Stream(read, shards)
    if not streams:
        rows = in_memory(rows.batches(), skipped, common.metadata_schema)
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
        more = columns.metadata(types, str(files[0]), notes) if wanted.metadata else None
        width = len(str(max(rows - 1, 0)))
        values = _path_values(groups, columns)
        paths = columns.find_images(values, files[0], wanted, notes)
        return cls(groups, Common(columns, paths, skipped, width, metadata=more, notes=notes))

    def batches(
        self, group: Group, size: int, start: int = 0
    ) -> Iterator[tuple["pa.RecordBatch", int]]:
        """The rows of a group in the common columns, ``size`` rows of the file at a time.

        Each batch comes with the number of rows of the group read so far. A group can only be read
        from its start: rows before ``start``, which is where a batch ends, are decoded and dropped.
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
        """The rows of a group; rows that cannot be read are added to the skipped items."""
        import pyarrow as pa

        done = at or 0
        try:
            for batch, end in self.batches(group, size, done):
                yield batch, end
                done = end
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = f"row group {group.number} cannot be read from row {group.first + done} on"
            self.common.skipped.append(Skipped(group.file.name, f"{reason}: {error}"))


def _path_values(groups: list[Group], columns: Columns) -> list[str]:
    """The first values of an image column, if it holds paths."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values: list[str] = []
    for group in groups[:1]:
        with pq.ParquetFile(group.file) as table:
            leaves = arrow_leaves(table.schema_arrow)
            if is_image(leaves.get(columns.path(columns.image), pa.string())):
                break
            with suppress(pa.ArrowException):  # is reported when the rows are read
                batch = next(table.iter_batches(SAMPLE, row_groups=[0], columns=columns.stored))
                found = columns.plain(batch, []).column(columns.image).to_pylist()
                values = [value for value in found if isinstance(value, str)]
    return values


def columns_of(schema: "pa.Schema", wanted: Wanted, spec: str, notes: list[str]) -> Columns:
    """The columns of an Arrow schema, with the class names that ``datasets`` keeps in it."""
    from datasets import ClassLabel, Features

    leaves = arrow_leaves(schema)
    nested = Nested.find(leaves, notes)
    types: dict[str, pa.DataType | None] = {".".join(path): leaves[path] for path in leaves}
    types |= {name: leaves.get(path) for name, path in nested.paths.items()}
    columns = find_columns(types, wanted, spec, notes)
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
    tables: dict[Path, CsvTable | JsonTable] = {}
    columns: Columns | None = None
    values: list[str] = []
    for file in files:
        table: CsvTable | JsonTable
        if form == "csv":
            table = CsvTable.open(file, notes, wanted.encoding)
        else:
            table = JsonTable.open(file, split, notes)
        names = table.names()
        columns = columns or find_columns(dict.fromkeys(names), wanted, str(file), notes)
        _check_same(columns, names, file, files[0])
        table = tables[file] = table.using(columns)
        bad: list[Skipped] = []  # reported when the whole file is read
        head = _head(table.records(bad))
        if not head:
            reason = f" ({bad[0].key} {bad[0].reason})" if bad else ""
            raise DataError(f"{file} holds no rows{reason}, expected a {form} table of images")
        values = values or [text for row in head for text in strings(row.get(columns.image))[:1]]
    assert columns is not None
    if len({file.parent for file in files}) > 1 and wanted.image_root is None:
        raise DataError(_different_folders(files))
    more = None
    if wanted.metadata:  # types are those of all rows: a pass of its own
        from clipkit.data.formats.metadata import infer_types

        typed = form != "csv"
        types = [
            infer_types((record for record, _ in table.records([])), typed=typed)
            for table in tables.values()
        ]
        more = columns.metadata(types, str(files[0]), notes)
    paths = columns.find_images(values, files[0], wanted, notes)
    common = Common(columns, paths, skipped, metadata=more, notes=notes)

    def read(file: Path, at: Position) -> Iterator[tuple["pa.RecordBatch", Position]]:
        start, first = at or ((0, 0), 0)
        own = replace(common, prefix=f"{file.name}:") if len(files) > 1 else common
        for chunk in _chunks(tables[file].records(skipped, start), start[0]):
            batch = _arrow([record for record, _ in chunk], own)
            yield own.batch(batch, first), [chunk[-1][1], first := first + len(chunk)]

    return common, read


def _head(records: Iterable[tuple[RowDict, Position]]) -> list[RowDict]:
    """The first 1,000 records, or as many as fit in a few MiB."""
    head: list[RowDict] = []
    for record, (offset, _) in records:
        head.append(record)
        if len(head) == 1000 or offset > _HEAD_BYTES:
            break
    return head


def _chunks(
    records: Iterable[tuple[RowDict, Position]], start: int
) -> Iterator[list[tuple[RowDict, Position]]]:
    """Records, as many at a time as go into a batch; ``start`` is the offset of the first."""
    chunk: list[tuple[RowDict, Position]] = []
    for item in records:
        chunk.append(item)
        if len(chunk) == _CHUNK or item[1][0] - start > _CHUNK_BYTES:
            yield chunk
            start, chunk = item[1][0], []
    if chunk:
        yield chunk


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
