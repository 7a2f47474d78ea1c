"""The rows of an index, found by key or by content, for comparing a folder with the index."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipkit.index.segments import ID
from clipkit.index.vector_index import VectorIndex
from clipkit.store.shards import SCHEMA, Record, Vectors


class IndexedRows:
    """The rows of an index, numbered in the order of its records."""

    def __init__(self, index: VectorIndex) -> None:
        self._index, self._facts = index, index.records()
        self.keys: list[str] = self._facts["key"].to_pylist()
        self._rows = {key: row for row, key in enumerate(self.keys)}
        self._ids = self._facts[ID.name].to_numpy()
        self._metadata = set(self._facts.column_names) - {*SCHEMA.names, ID.name}
        self._contents: dict[bytes, int] = {}
        for row, content in enumerate(self._facts["content_hash"].to_pylist()):
            if content:
                self._contents.setdefault(bytes.fromhex(content), row)

    def row(self, key: str) -> int | None:
        """The row of a key; None if the index does not have it."""
        return self._rows.get(key)

    def id(self, row: int) -> int:
        """The id of a row."""
        return int(self._ids[row])

    def fact(self, row: int, name: str) -> Any:
        """One value of a row's record."""
        return self._facts[name][row].as_py()

    def same_file(self, row: int, record: Record) -> bool:
        """Whether size and modification time are unchanged; images inside a table have no time."""
        names = ("size", "mtime_ns")
        return bool(record["mtime_ns"]) and all(
            self.fact(row, name) == record[name] for name in names
        )

    def same_words(self, row: int, record: Record) -> bool:
        """Whether captions, label and metadata are unchanged."""
        captions = self.fact(row, "captions") or []
        if captions != record["captions"] or self.fact(row, "label") != record["label"]:
            return False
        names = self._metadata | record.keys() - {*SCHEMA.names, ID.name}
        return all(self._same_value(row, name, record.get(name)) for name in names)

    def _same_value(self, row: int, name: str, value: Any) -> bool:
        indexed = self.fact(row, name) if name in self._metadata else None
        if indexed == value or indexed is None or value is None:
            return bool(indexed == value)
        try:  # metadata of other sources may have turned numbers into text, or days into times
            return bool(pa.scalar(value).cast(self._facts[name].type).as_py() == indexed)
        except pa.ArrowException:
            return False

    def same_content(self, content_hash: str) -> int | None:
        """A row of the same content, whatever its key; None if there is none."""
        return self._contents.get(bytes.fromhex(content_hash))

    def as_is(self, record: Record) -> bool:
        """Whether the index has this image unchanged, as far as is known without reading it."""
        row = self.row(record["key"])
        if row is None or not self.same_words(row, record):
            return False
        hashed = record["content_hash"]
        known = hashed is not None and hashed == self.fact(row, "content_hash")
        return self.same_file(row, record) or (
            known and record["mtime_ns"] == self.fact(row, "mtime_ns")
        )

    def vector(self, row: int) -> Vectors | None:
        """The vector of a row, float32 [1, dim]; None if an older clipkit stored no exact one."""
        segment, place = self._index.locate(int(self._index.places[row]))
        return None if segment.vectors is None else np.array(segment.vectors[place : place + 1])

    def places(self, rows: list[int]) -> NDArray[np.int64]:
        """The places of rows, for ``IndexWriter.remove_rows``."""
        return self._index.places[np.array(rows, np.int64)]
