"""The vectors of a finished store, found by key or by content, for encoding only what is new."""

from bisect import bisect_right
from pathlib import Path

import numpy as np
import pyarrow as pa

from clipkit.artifacts import is_complete
from clipkit.store.embedding_store import EmbeddingStore, Owner, require_decode
from clipkit.store.shards import SCHEMA, Record, Vectors

_FACTS = pa.schema([SCHEMA.field(name) for name in ("size", "mtime_ns", "content_hash")])


class StoredVectors:
    """The rows of a finished store, by key and by content; empty if there is no store yet.

    Args:
        path: directory of the store, which need not exist.
        owner: the model and the decoder that the store must have.

    Raises:
        ModelMismatchError: the store is of another model.
        ArtifactError: the store uses another decoder, or is damaged.
    """

    def __init__(self, path: Path, owner: Owner) -> None:
        self._rows: dict[str, int] = {}
        self._contents: dict[bytes, int] = {}
        self._vectors: list[Vectors] = []
        self._starts: list[int] = []
        tables = [_FACTS.empty_table()]
        if is_complete(path):
            store = EmbeddingStore.open(path)
            store.model.require(
                owner.model,
                what=f"the store {path}",
                repair="name another place with --out, or remove it",
            )
            require_decode(f"the store {path} was", store.decode, owner.decode)
            for vectors, table in store.shards():
                self._starts.append(len(self._rows))
                self._vectors.append(vectors)
                self._note(table)
                tables.append(table.select(_FACTS.names))
        self._facts = pa.concat_tables(tables).combine_chunks()

    def _note(self, table: pa.Table) -> None:
        hashes = table["content_hash"].to_pylist()
        for key, content in zip(table["key"].to_pylist(), hashes, strict=True):
            row = self._rows[key] = len(self._rows)
            if content:
                self._contents.setdefault(bytes.fromhex(content), row)

    def unchanged(self, record: Record) -> int | None:
        """The row of the same key, size and modification time; None if there is none."""
        row = self._rows.get(record["key"])
        if row is None:
            return None
        facts = (self._facts[name][row].as_py() for name in ("size", "mtime_ns"))
        return row if tuple(facts) == (record["size"], record["mtime_ns"]) else None

    def same_content(self, content_hash: str) -> int | None:
        """A row of the same content, whatever its key; None if there is none."""
        return self._contents.get(bytes.fromhex(content_hash))

    def content_hash(self, row: int) -> str | None:
        """The content hash of a row; None if an older clipkit wrote it."""
        found: str | None = self._facts["content_hash"][row].as_py()
        return found

    def vector(self, row: int) -> Vectors:
        """The vector of a row, float32 [1, dim]."""
        shard = bisect_right(self._starts, row) - 1
        start = row - self._starts[shard]
        return np.asarray(self._vectors[shard][start : start + 1])
