"""Shards of an embedding store: reading, checking, and writing in the background.

A shard is a pair of files with the same row order, such as ``vectors-00000.npy`` and
``records-00000.parquet``.
"""

import math
import os
import re
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipkit.artifacts import replacing
from clipkit.data.formats.metadata import joined, kind_of
from clipkit.errors import ArtifactError

Vectors = NDArray[np.float32]
"""float32 [n, dim], unit-length rows."""
Record = dict[str, Any]
"""One row of a store, with the columns of ``SCHEMA``."""

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "captions": pa.list_(pa.string()),
        "label": pa.string(),
        "content_hash": pa.string(),
    }
)
_YOUNGER = ("content_hash",)
"""Columns that older stores lack; they are read as nulls."""
UNIT_TOLERANCE = 1e-3


def check_vectors(vectors: NDArray[Any], records: list[Record], dim: int) -> None:
    """Check that the vectors are float32 [len(records), dim], finite and of unit length.

    Raises:
        ArtifactError: they are not; the message names the first bad row.
    """
    expected = f"expected float32 [{len(records)}, {dim}], one row per record"
    if vectors.dtype != np.float32 or vectors.shape != (len(records), dim):
        raise ArtifactError(f"the vectors are {vectors.dtype} {list(vectors.shape)}, {expected}")
    lengths = np.linalg.norm(vectors, axis=1)
    # Negated, so that NaN, which compares false with everything, counts as bad.
    bad = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))
    if len(bad):
        raise ArtifactError(
            f"the vector of {records[bad[0]]['key']!r} has length {lengths[bad[0]]:.4g}, expected "
            "unit length and finite numbers; encode with a clipkit Encoder, which normalises"
        )


def digest(record: Record) -> int:
    """A hash of a record; equal records have equal hashes within one process."""
    captions = tuple(record["captions"] or ())
    facts = (record["key"], record["size"], record["mtime_ns"], captions, record["label"])
    more = {
        (name, _fixed(value))
        for name, value in record.items()
        if name not in SCHEMA.names and value is not None
    }
    return hash((facts, frozenset(more)))


def _fixed(value: Any) -> Any:
    return value if isinstance(value, Hashable) else repr(value)


def shard_names(number: int) -> tuple[str, str]:
    """The file names of a shard's vectors and records."""
    return f"vectors-{number:05d}.npy", f"records-{number:05d}.parquet"


def shard_numbers(folder: Path) -> list[int]:
    """The numbers of the shards in ``folder``, ascending, possibly with gaps."""
    names = (re.fullmatch(r"vectors-(\d{5,})\.npy", name) for name in os.listdir(folder))
    return sorted(int(name[1]) for name in names if name)


def read_shard(folder: Path, number: int, dim: int) -> tuple[Vectors, pa.Table]:
    """Return a shard's vectors, memory-mapped float32 [m, dim], and its table of m records.

    Raises:
        ArtifactError: a file is missing, truncated or invalid, or the row counts differ.
    """
    vector_name, record_name = shard_names(number)
    try:
        vectors = np.load(folder / vector_name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(folder / vector_name, str(error)) from None
    if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape[1] != dim:
        found = f"{vectors.dtype} {list(vectors.shape)}, expected float32 [rows, {dim}]"
        raise _damaged(folder / vector_name, found)
    table = read_records(folder / record_name)
    if len(table) != len(vectors):
        found = f"{len(table)} records for {len(vectors)} vectors"
        raise _damaged(folder / record_name, found)
    return vectors, table


def read_records(file: Path) -> pa.Table:
    """Read the records of a shard: the columns of ``SCHEMA``, then any others.

    Raises:
        ArtifactError: the file is missing, truncated, or lacks a column of ``SCHEMA``.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            table = parquet.read()
        for name in _YOUNGER:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), pa.string()))
        columns = widened(table.schema)
        return table.select(columns.names).cast(columns)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise _damaged(file, str(error)) from None


def widened(*schemas: pa.Schema) -> pa.Schema:
    """Return the columns of ``SCHEMA``, then all other columns of ``schemas``.

    A column that holds numbers in one schema and strings in another becomes a string column.

    Raises:
        ArtifactError: a column has incompatible types.
    """
    fields = {field.name: field for field in SCHEMA}
    for field in (field for schema in schemas for field in schema):
        if field.name not in SCHEMA.names:
            old = fields.setdefault(field.name, field)
            fields[field.name] = _either(old, field)
    return pa.schema(list(fields.values()))


def _either(one: pa.Field, other: pa.Field) -> pa.Field:
    try:
        return pa.unify_schemas(
            [pa.schema([one]), pa.schema([other])], promote_options="permissive"
        ).field(0)
    except pa.ArrowException:
        kind = joined(kind_of(one.type), kind_of(other.type))
    if kind is None:
        raise ArtifactError(
            f"the column {one.name!r} of the records has two types ({one.type} and {other.type}), "
            "expected one; rename or convert it"
        )
    return pa.field(one.name, kind)


def together(tables: Iterable[pa.Table], *schemas: pa.Schema) -> pa.Table:
    """Concatenate tables by rows, with the columns of all tables and ``schemas``.

    Columns that a table lacks are filled with nulls.

    Raises:
        ArtifactError: a column has incompatible types.
    """
    tables = list(tables)
    schema = widened(*schemas, *(table.schema for table in tables))
    return pa.concat_tables([schema.empty_table(), *(conform(table, schema) for table in tables)])


def as_table(records: list[Record]) -> pa.Table:
    """Convert records to a table: the columns of ``SCHEMA``, then any others.

    Raises:
        ArtifactError: a column holds values of different types.
    """
    more = sorted({name for record in records for name in record} - set(SCHEMA.names))
    try:
        rest = pa.Table.from_pylist([{name: r.get(name) for name in more} for r in records])
        return pa.Table.from_pylist(records, widened(rest.schema) if more else SCHEMA)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ArtifactError(
            f"the columns {', '.join(more)} of the records cannot be stored ({reason}), expected "
            "values of one type in each; convert them"
        ) from None


def json_value(value: Any) -> str | int | float | bool | None:
    """Convert a value of any column for JSON: dates become strings, infinite numbers None."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the columns of ``schema`` from a table, filled with nulls if missing."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def write_shard(folder: Path, number: int, vectors: Vectors, records: pa.Table) -> None:
    """Write both files of a shard, each atomically, and flush them to disk.

    Raises:
        OSError: the disk is full or not writable.
    """
    vector_name, record_name = shard_names(number)
    write_file(folder / vector_name, lambda stream: np.save(stream, vectors))
    write_file(folder / record_name, lambda stream: pq.write_table(records, stream))


def remove_shard(folder: Path, number: int) -> None:
    """Remove both files of a shard."""
    for name in shard_names(number):
        (folder / name).unlink(missing_ok=True)


def write_file(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically through a stream and flush it to disk; raises OSError."""
    with replacing(file) as temp, temp.open("wb") as stream:
        write(stream)


def _damaged(file: Path, found: str) -> ArtifactError:
    reason = " ".join(found.split()).rstrip(".")
    return ArtifactError(f"{file} is damaged ({reason}); remove {file.parent} and rebuild it")


class ShardWriter:
    """Writes full shards in the background, one at a time.

    If encoding is faster than the disk, it waits for the previous shard, so that memory holds at
    most two shards.

    Args:
        folder: directory of the shards.
        number: number of the first shard to write.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._vectors: list[Vectors] = []
        self._records: list[Record] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="clipkit-shards")
        self._under_way: tuple[Future[None], list[Vectors], list[Record]] | None = None

    def append(self, vectors: Vectors, records: list[Record], size: int) -> None:
        """Add rows, float32 [m, dim] and m records; start writing once ``size`` rows are buffered.

        Raises:
            OSError: the previous shard could not be written.
        """
        self._vectors.extend(vectors)
        self._records.extend(records)
        while len(self._records) >= size:
            self._begin(size)

    def flush(self) -> None:
        """Write all buffered rows and wait until they are on disk.

        Raises:
            OSError: the disk is full or not writable; the rows stay buffered for a retry.
        """
        self.wait()
        if self._records:
            self._begin(len(self._records))
            self.wait()

    def wait(self) -> None:
        """Wait for the shard being written; raises OSError as ``flush`` does."""
        if self._under_way is None:
            return
        (future, vectors, records), self._under_way = self._under_way, None
        try:
            future.result()
        except OSError:
            self._vectors[:0], self._records[:0] = vectors, records
            self._number -= 1
            raise

    def close(self) -> None:
        """Stop the background thread; rows that were not flushed are lost."""
        self._pool.shutdown()

    def _begin(self, rows: int) -> None:
        self.wait()
        vectors, records = self._vectors[:rows], self._records[:rows]
        future = self._pool.submit(self._write, self._number, vectors, records)
        self._under_way = future, vectors, records
        self._number += 1
        del self._vectors[:rows], self._records[:rows]

    def _write(self, number: int, vectors: list[Vectors], records: list[Record]) -> None:
        write_shard(self._folder, number, np.stack(vectors), as_table(records))
