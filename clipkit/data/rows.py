"""The rows of a source: in memory by number (``Table``), or front to back (``Stream``)."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.data.images import Reduction, read_image
from clipkit.errors import ImageError

if TYPE_CHECKING:
    import pyarrow as pa


_TOGETHER = 16  # rows made Python objects at a time, images and all
_TEXTS_TOGETHER = 1000  # likewise, without images
_STREAMED = 1000  # rows in a batch of a table that is read as a stream


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image as its source holds it: encoded bytes, or the path of a file."""

    data: bytes | None = None
    path: str | None = None

    @property
    def file(self) -> Path | bytes:
        """What an image can be read from; raises ImageError if there is neither."""
        if self.data is not None:
            return self.data
        if self.path is None:
            raise ImageError("has neither bytes nor a path")
        return Path(self.path)

    def read(self, reduction: Reduction | None = None) -> Image.Image:
        """Decode the image as ``read_image`` does, to RGB; raises ImageError if that fails."""
        return read_image(self.file, reduction)


@dataclass(frozen=True, slots=True)
class Row:
    """An image with its captions.

    Attributes:
        key: identifies the image in its source.
        image: the image, not decoded; without bytes and path in a row of ``texts``.
        captions: may be empty.
        label: its class; None if it has none.
        metadata: other columns of a table, by name; None if the source was opened without them.
    """

    key: str
    image: StoredImage
    captions: list[str]
    label: str | None = None
    metadata: dict[str, Any] | None = None

    def read_image(self, reduction: Reduction | None = None) -> Image.Image:
        """Decode the image, to RGB; raises ImageError if that fails."""
        return self.image.read(reduction)

    def record(self) -> dict[str, Any]:
        """What a store keeps of the row beside its vector; ``content_hash`` is still None."""
        data, path = self.image.data, self.image.path
        size, mtime_ns = len(data or b""), 0
        if data is None and path is not None:
            try:
                status = os.stat(path)
            except OSError:
                pass  # reading the image fails as well, and gives the reason
            else:
                size, mtime_ns = status.st_size, status.st_mtime_ns
        return {
            "key": self.key,
            "captions": self.captions,
            "label": self.label,
            "size": size,
            "mtime_ns": mtime_ns,
            "content_hash": None,
            **(self.metadata or {}),
        }


_NO_IMAGE = StoredImage()


class Rows(Protocol):
    """What tables and streams have in common."""

    def __iter__(self) -> Iterator[Row]:
        """The rows in order."""

    def texts(self) -> Iterator[Row]:
        """The rows in order; those of a table come without their images, which is faster."""

    def map(self, change: Callable[[Row], Row]) -> "Rows":
        """The rows as ``change`` returns them."""


class Table:
    """Rows in memory, or mapped into it, by number.

    Reading key, captions and label of a row takes 2 µs; its image, not decoded, 2 µs more.

    Args:
        table: with the columns of ``schema``.
        numbers: the rows of ``table`` that this one has, int64 [rows]; None: all, in order.
    """

    def __init__(self, table: "pa.Table", numbers: NDArray[np.int64] | None = None) -> None:
        self._table, self._numbers = table, numbers
        self._keys, self._labels = table.column("key"), table.column("label")
        self._captions = table.column("captions")
        self._data, self._paths = table.column("image").flatten()
        self._labelled = self._labels.null_count < len(self._labels)

    def __len__(self) -> int:
        return len(self._table) if self._numbers is None else len(self._numbers)

    def __getitem__(self, number: int) -> Row:
        metadata = None
        if "metadata" in self._table.column_names:
            metadata = self._table.column("metadata")[self._place(number)].as_py()
        return replace(self.text(number), image=self.image(number), metadata=metadata)

    def __iter__(self) -> Iterator[Row]:
        if self._numbers is not None:
            return map(self.__getitem__, range(len(self)))
        return (row for batch in self.batches(_TOGETHER) for row in rows_of(batch))

    def texts(self) -> Iterator[Row]:
        """The rows in order, without images and metadata."""
        if self._numbers is not None:
            yield from map(self.text, range(len(self)))
            return
        columns = self._keys, self._captions, self._labels
        for start in range(0, len(self), _TEXTS_TOGETHER):
            parts = (column[start : start + _TEXTS_TOGETHER].to_pylist() for column in columns)
            for key, captions, label in zip(*parts, strict=True):
                yield Row(key, _NO_IMAGE, captions, label)

    def text(self, number: int) -> Row:
        """A row without its image and metadata."""
        at = self._place(number)
        label = self._labels[at].as_py() if self._labelled else None
        return Row(self._keys[at].as_py(), _NO_IMAGE, self._captions[at].as_py(), label)

    def image(self, number: int) -> StoredImage:
        """The image of a row, not decoded."""
        at = self._place(number)
        return StoredImage(self._data[at].as_py(), self._paths[at].as_py())

    @property
    def keys(self) -> list[str]:
        """The key of each row."""
        keys: list[str] = self._values(self._keys)
        return keys

    @property
    def labels(self) -> list[str | None]:
        """The label of each row."""
        labels: list[str | None] = self._values(self._labels)
        return labels

    def with_prefix(self, prefix: str) -> "Table":
        """The same rows, with ``prefix`` before each key."""
        import pyarrow as pa

        keys = pa.array([prefix + key for key in self._keys.to_pylist()], pa.string())
        return Table(self._table.set_column(0, "key", keys), self._numbers)

    def image_sizes(self) -> NDArray[np.int64]:
        """Bytes of each image inside the table, int64 [rows]; -1 for images that are files."""
        import pyarrow.compute as pc

        lengths = pc.fill_null(pc.binary_length(self._data), -1)
        sizes: NDArray[np.int64] = lengths.to_numpy().astype(np.int64)
        return sizes if self._numbers is None else sizes[self._numbers]

    def select(self, numbers: "Sequence[int] | NDArray[np.int64]") -> "Table":
        """The rows of these numbers, in this order."""
        chosen = np.asarray(numbers, np.int64)
        return Table(self._table, chosen if self._numbers is None else self._numbers[chosen])

    @classmethod
    def concat(cls, tables: "Sequence[Table]") -> "Table":
        """The rows of several tables, one after the other; metadata only if all have the same."""
        import pyarrow as pa

        whole = [table._table for table in tables]
        if any(table.schema != whole[0].schema for table in whole):
            whole = [table.select(schema().names) for table in whole]
        starts = np.cumsum([0, *map(len, whole)])
        numbers = None
        if any(table._numbers is not None for table in tables):
            chosen = (np.arange(len(t)) if t._numbers is None else t._numbers for t in tables)
            numbers = np.concatenate([n + at for n, at in zip(chosen, starts, strict=False)])
        return cls(pa.concat_tables(whole), numbers)

    def map(self, change: Callable[[Row], Row]) -> "Table":
        """The rows as ``change`` returns them."""
        import pyarrow as pa

        rows = [_to_dict(change(row)) for row in self]
        return Table(pa.Table.from_pylist(rows, self._table.schema))

    def batches(self, size: int, start: int = 0) -> Iterator["pa.RecordBatch"]:
        """The rows from number ``start`` on, at most ``size`` in a batch."""
        import pyarrow as pa

        for first in range(start, len(self), size):
            if self._numbers is None:
                part = self._table.slice(first, size)
            else:
                # Arrow's own selection may copy the whole column first.
                single = [self._table.slice(n, 1) for n in self._numbers[first : first + size]]
                part = pa.concat_tables(single).combine_chunks()
            yield from part.to_batches()

    def stream(self) -> "Stream":
        """The same rows, front to back."""

        def read(_: Any, at: Position) -> Iterator[tuple["pa.RecordBatch", Position]]:
            end = at or 0
            for batch in self.batches(_STREAMED, end):
                end += len(batch)
                yield batch, end

        return Stream(read, [None])

    def _place(self, number: int) -> int:
        return number if self._numbers is None else int(self._numbers[number])

    def _values(self, column: "pa.ChunkedArray") -> list[Any]:
        values: list[Any] = column.to_pylist()
        return values if self._numbers is None else [values[n] for n in self._numbers]


Position = Any
"""Where reading of a shard continues, as values that JSON can hold; None: at its start."""
Read = Callable[[Any, Position], Iterator[tuple["pa.RecordBatch", Position]]]
"""Reads the rows of a shard from a position on, in batches, each with the position after it."""
Place = list[Any]
"""The position of a batch, and how many of its rows come before."""


@dataclass(frozen=True)
class Stream:
    """Rows in the order of their shards, each of which can be read from any position on.

    Consecutive rows of the same image are merged. Other repeated keys are not noticed, which
    would take unlimited memory.

    Attributes:
        read: reads a shard.
        shards: the arguments of ``read``.
        steps: functions that each row passes through; None from one leaves the row out.
        most: maximum number of rows; None: no limit.
    """

    read: Read
    shards: list[Any]
    steps: tuple[Callable[[Row], Row | None], ...] = ()
    most: int | None = None

    def __iter__(self) -> Iterator[Row]:
        rows = (row for shard in self.shards for row, _ in self.rows(shard))
        return islice(rows, self.most)

    def texts(self) -> Iterator[Row]:
        """The rows in order; a stream reads their images all the same."""
        return iter(self)

    def with_prefix(self, prefix: str) -> Self:
        """The same rows, with ``prefix`` before each key."""
        return self.map(lambda row: replace(row, key=prefix + row.key))

    def filter(self, keep: Callable[[Row], bool]) -> Self:
        """The rows for which ``keep`` is true."""
        return replace(self, steps=(*self.steps, lambda row: row if keep(row) else None))

    def map(self, change: Callable[[Row], Row]) -> Self:
        """The rows as ``change`` returns them."""
        return replace(self, steps=(*self.steps, change))

    def take(self, most: int) -> Self:
        """The first rows, in order."""
        return replace(self, most=most)

    def batches(self) -> Iterator["pa.RecordBatch"]:
        """The content of the shards in order, before ``steps``."""
        return (batch for shard in self.shards for batch, _ in self.read(shard, None))

    def rows(self, shard: Any, place: Place | None = None) -> Iterator[tuple[Row, Place]]:
        """The rows of a shard from a place on, each with the place after it."""
        for row, after in merge_neighbours(self._single_rows(shard, *(place or (None, 0)))):
            kept: Row | None = row
            for step in self.steps:
                kept = kept if kept is None else step(kept)
            if kept is not None:
                yield kept, after

    def _single_rows(self, shard: Any, start: Position, before: int) -> Iterator[tuple[Row, Place]]:
        for batch, after in self.read(shard, start):
            for first in range(before, len(batch), _TOGETHER):
                for number, row in enumerate(rows_of(batch.slice(first, _TOGETHER)), first + 1):
                    # After its last row, a batch need not be read again.
                    yield row, [start, number] if number < len(batch) else [after, 0]
            start, before = after, 0


@dataclass(frozen=True)
class Mixture:
    """The rows of several tables and streams, at least one of them a stream.

    They are read one after the other; ``streaming.stream_batches`` mixes them.
    """

    parts: list[Table | Stream]

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self.parts)

    def texts(self) -> Iterator[Row]:
        """The rows in order, those of tables without their images."""
        return chain.from_iterable(part.texts() for part in self.parts)

    def map(self, change: Callable[[Row], Row]) -> "Mixture":
        """The rows as ``change`` returns them."""
        return Mixture([part.map(change) for part in self.parts])


def merge_neighbours(rows: Iterable[tuple[Row, Place]]) -> Iterator[tuple[Row, Place]]:
    """Merge consecutive rows of the same image; the place of the last one holds."""
    last: tuple[Row, Place] | None = None
    for row, after in rows:
        if last is not None and last[0].key == row.key and last[0].image == row.image:
            last[0].captions.extend(row.captions)
            merged = last[0] if last[0].label else replace(last[0], label=row.label)
            last = merged, after
            continue
        if last is not None:
            yield last
        last = row, after
    if last is not None:
        yield last


def schema(metadata: "pa.Schema | None" = None) -> "pa.Schema":
    """The Arrow columns of every source, and those of its metadata."""
    import pyarrow as pa

    columns = [
        pa.field("key", pa.string()),
        pa.field("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("label", pa.string()),
    ]
    if metadata is not None:
        columns.append(pa.field("metadata", pa.struct(list(metadata))))
    return pa.schema(columns)


def rows_of(batch: "pa.RecordBatch") -> Iterator[Row]:
    """The rows of an Arrow batch with the columns of ``schema``."""
    data, paths = batch.column("image").flatten()
    columns = [data, paths, *(batch.column(name) for name in ("key", "captions", "label"))]
    if "metadata" in batch.schema.names:
        columns.append(batch.column("metadata"))
    for one, path, *rest in zip(*(column.to_pylist() for column in columns), strict=True):
        yield Row(rest[0], StoredImage(one, path), *rest[1:])


def _to_dict(row: Row) -> dict[str, Any]:
    """The values of a row, for Arrow."""
    image = {"bytes": row.image.data, "path": row.image.path}
    values = {"key": row.key, "image": image, "captions": row.captions, "label": row.label}
    return values if row.metadata is None else {**values, "metadata": row.metadata}
