"""Incremental encoding for ``embed``, ``index add`` and ``index sync``.

A pass over a source compares each image with the rows that already have a vector:

- The same key, size and modification time: the vector is reused and the file is not read.
- The same content under any key, found by its hash: the vector is reused.
- Otherwise the image is encoded.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa

from clipkit.artifacts import is_complete
from clipkit.data.images import Skipped, content_hash
from clipkit.data.rows import Row
from clipkit.data.source import Source
from clipkit.errors import DataError, SkipLimitError
from clipkit.progress import print_status, progress_bar
from clipkit.store.embedding_store import EmbeddingStore, Owner, StoreWriter, require_decode
from clipkit.store.shards import SCHEMA, Record, Vectors, digest

_FACTS = ["key", "size", "mtime_ns", "content_hash"]
EARLIEST_STOP = 1000
"""A pass over fewer images checks the skip limit only at the end."""


class KnownRows:
    """Rows that already have a vector, found by key or by content.

    Args:
        records: their records. ``same_words`` compares all columns, the rest only key, size,
            mtime_ns and content_hash.
        vector: the vector of a row number, float32 [1, dim]; None if it is not stored exactly.
    """

    def __init__(self, records: pa.Table, vector: Callable[[int], Vectors | None]) -> None:
        self._records, self.vector = records.combine_chunks(), vector
        self.keys: list[str] = records["key"].to_pylist()
        self._rows = {key: row for row, key in enumerate(self.keys)}
        self._sizes, self._times = (records[name].to_numpy() for name in ("size", "mtime_ns"))
        self._metadata = set(records.column_names) - set(SCHEMA.names)
        self._contents: dict[bytes, int] = {}
        for row, content in enumerate(records["content_hash"].to_pylist()):
            if content:
                self._contents.setdefault(bytes.fromhex(content), row)

    @classmethod
    def of_store(cls, path: Path, owner: Owner) -> Self:
        """The rows of a complete store; none if there is no store at ``path``.

        Args:
            path: directory of the store, which need not exist.
            owner: the model and the decoder that the store must have.

        Raises:
            ModelMismatchError: the store is of another model.
            ArtifactError: the store uses another decoder, or is damaged.
        """
        shards: list[Vectors] = []
        starts: list[int] = []
        tables = [SCHEMA.empty_table().select(_FACTS)]
        if is_complete(path):
            store = EmbeddingStore.open(path)
            store.model.require(
                owner.model,
                what=f"the store {path}",
                repair="name another place with --out, or remove it",
            )
            require_decode(f"the store {path} was", store.decode, owner.decode)
            for vectors, table in store.shards():
                starts.append(sum(map(len, tables)))
                shards.append(vectors)
                tables.append(table.select(_FACTS))

        def vector(row: int) -> Vectors:
            shard = bisect_right(starts, row) - 1
            start = row - starts[shard]
            return np.asarray(shards[shard][start : start + 1])

        return cls(pa.concat_tables(tables), vector)

    def row(self, key: str) -> int | None:
        """The row of a key; None if there is none."""
        return self._rows.get(key)

    def same_content(self, content_hash: str) -> int | None:
        """A row of the same content, whatever its key; None if there is none."""
        return self._contents.get(bytes.fromhex(content_hash))

    def content_hash(self, row: int) -> str | None:
        """The content hash of a row; None if an older clipkit wrote it."""
        found: str | None = self._records["content_hash"][row].as_py()
        return found

    def same_file(self, row: int, record: Record) -> bool:
        """Whether size and modification time are equal; images inside a table have time 0."""
        return bool(self._sizes[row] == record["size"] and self._times[row] == record["mtime_ns"])

    def same_words(self, row: int, record: Record) -> bool:
        """Whether captions, label and metadata are equal."""
        captions = self._value(row, "captions") or []
        if captions != record["captions"] or self._value(row, "label") != record["label"]:
            return False
        names = self._metadata | record.keys() - set(SCHEMA.names)
        return all(self._same_value(row, name, record.get(name)) for name in names)

    def as_is(self, record: Record) -> bool:
        """Whether a record of this key is equal, as far as is known without reading the image."""
        row = self.row(record["key"])
        if row is None or self._times[row] != record["mtime_ns"]:
            return False
        hashed = record["content_hash"]
        same_file = record["mtime_ns"] and self.same_file(row, record)
        same_content = hashed is not None and hashed == self.content_hash(row)
        return bool(same_file or same_content) and self.same_words(row, record)

    def _value(self, row: int, name: str) -> Any:
        return self._records[name][row].as_py()

    def _same_value(self, row: int, name: str, value: Any) -> bool:
        known = self._value(row, name) if name in self._metadata else None
        if known == value or known is None or value is None:
            return bool(known == value)
        try:  # metadata of other sources may have turned numbers into text, or days into times
            return bool(pa.scalar(value).cast(self._records[name].type).as_py() == known)
        except pa.ArrowException:
            return False


class EncodeRows(Protocol):
    """Encodes rows in batches, as ``models.embed_source.encoded_batches`` does."""

    def __call__(  # noqa: D102
        self,
        rows: Iterator[Row],
        *,
        on_skip: Callable[[str, str], None],
        known: Callable[[Row], Vectors | None],
    ) -> Iterator[tuple[Vectors, list[Row]]]: ...


@dataclass
class _Task:
    """An image that must be read.

    Attributes:
        record: its record; reading the image adds the content hash.
        at: the known row of its key.
        unchanged: whether that row has the same content.
        encode: whether no vector of the content is known.
    """

    record: Record
    at: int | None
    unchanged: bool = False
    encode: bool = True


class IncrementalPass:
    """One pass over a source, which writes rows and their vectors into a store.

    Args:
        source: the images.
        writer: the store to write. Rows of an interrupted pass that are still valid stay in it.
        known: rows that have a vector; keys are compared with the first of them.
        rewrite: write all rows. False writes only those that differ from the known row of their
            key.
        key: gives the key of an image in the store from its key in the source; None leaves the
            image out.
        skip_limit: maximum fraction of unreadable images; None for no limit.

    Attributes:
        seen: the keys of all images of the source, also of unreadable ones.
        unchanged: how many were left out because they do not differ.
        encoded: how many were encoded.
        unreadable: keys of images that cannot be read, and why.
        absent: keys that the source itself skipped, and why.
        duplicates: images whose key an earlier image has.
    """

    def __init__(
        self,
        source: Source,
        writer: StoreWriter,
        known: Sequence[KnownRows],
        *,
        rewrite: bool = True,
        key: Callable[[str], str | None] = str,
        skip_limit: float | None = None,
    ) -> None:
        if source.parts:
            raise DataError(
                f"{source.spec} mixes several kinds of data, whose images have no common root; "
                "embed or index each by itself, and join them with `clipkit index add`"
            )
        self.source, self.writer, self.known = source, writer, known
        self.rewrite, self.key, self.skip_limit = rewrite, key, skip_limit
        self.seen: set[str] = set()
        self.unchanged = self.encoded = 0
        self.unreadable: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        self.duplicates: list[Skipped] = []
        self._total = source.count or 0
        self._written: set[str] = set()
        self._tasks: dict[str, _Task] = {}

    @property
    def skipped(self) -> list[Skipped]:
        """All images that are not in the store, with reasons."""
        bad = {**self.unreadable, **self.absent}
        return [*self.duplicates, *(Skipped(*item) for item in bad.items())]

    def run(self, encode: EncodeRows) -> None:
        """Read the source and write the store; Ctrl-C keeps what is encoded.

        Args:
            encode: encodes the images that must be read. It calls ``known`` in its threads.

        Raises:
            SkipLimitError: too many images, or all of them, are unreadable.
        """
        with progress_bar(total=self._total or None, unit="img", desc="embedding") as self._bar:
            try:
                for vectors, rows in encode(
                    self._rows_to_read(), on_skip=self._skip, known=self._known_vector
                ):
                    self._store(vectors, rows)
            except KeyboardInterrupt:
                self._bar.close()
                print_status(
                    f"stopped: {len(self.writer.done)} encoded images are saved; "
                    "run the same command again to continue"
                )
                raise
        for item in self.source.skipped:
            key = self.key(item.key)
            if key is None:
                continue
            self.writer.skip(item.key, item.reason)
            if key not in self.seen:  # otherwise the source only skipped one of its captions
                self.absent.setdefault(key, item.reason)
        self._check_limit(len(self.seen | self.absent.keys()))
        for key in self.writer.done.keys() - self._written:
            self.writer.forget(key)

    def _rows_to_read(self) -> Iterator[Row]:
        """Yield the rows whose image must be read; handle all others."""
        first = self.known[0]
        for row in self.source.rows:
            key = self.key(row.key)
            if key is None:
                self._advance(1)
                continue
            if key in self.seen:
                reason = "its key is taken by an earlier image"
                self.writer.skip(key, reason)
                self.duplicates.append(Skipped(key, reason))
                continue
            self.seen.add(key)
            record = {**row.record(), "key": key}
            if not self.rewrite and first.as_is(record):
                self.unchanged += 1
                self._advance(1)
                continue
            self._written.add(key)
            done = self.writer.done.get(key)
            if done == digest(record):
                self._advance(1)
                continue
            if done is not None:
                self.writer.forget(key)
            at = first.row(key)
            # Bytes in a table have no modification time, so compare their hash.
            if at is not None and record["mtime_ns"] and first.same_file(at, record):
                content, vector = first.content_hash(at), first.vector(at)
                if content is not None and vector is not None:
                    self.writer.append(vector, [{**record, "content_hash": content}])
                    self._advance(1)
                    continue
            self._tasks[row.key] = _Task(record, at)
            yield row

    def _known_vector(self, row: Row) -> Vectors | None:
        """The known vector of a row's content, possibly under another key; None to encode it.

        Hashes the content and records the hash. Called by the decoding threads.
        """
        task = self._tasks[row.key]
        content = task.record["content_hash"] = content_hash(row.image.file)
        first = self.known[0]
        places = [(known, known.same_content(content)) for known in self.known]
        if task.at is not None:
            old = first.content_hash(task.at)
            task.unchanged = old == content or (
                old is None and first.same_file(task.at, task.record)
            )
            if task.unchanged:
                places.insert(0, (first, task.at))
        vectors = (known.vector(place) for known, place in places if place is not None)
        vector = next((vector for vector in vectors if vector is not None), None)
        task.encode = vector is None
        return vector

    def _store(self, vectors: Vectors, rows: list[Row]) -> None:
        """Write rows and their vectors, float32 [n, dim], except rows that need not be written."""
        tasks = [self._tasks.pop(row.key) for row in rows]
        differ = [self.rewrite or not self._is_unchanged(task) for task in tasks]
        self.unchanged += differ.count(False)
        records = [task.record for task, wanted in zip(tasks, differ, strict=True) if wanted]
        self.writer.append(vectors[differ], records)
        encoded = sum(task.encode for task in tasks)
        self.encoded += encoded
        self._bar.update(encoded)
        self._advance(len(tasks) - encoded)

    def _is_unchanged(self, task: _Task) -> bool:
        first, at = self.known[0], task.at
        return (
            at is not None
            and task.unchanged
            and first.same_file(at, task.record)
            and first.same_words(at, task.record)
        )

    def _advance(self, images: int) -> None:
        """Advance the bar and its start: images not encoded must not distort images/s and ETA."""
        if not self._bar.disable:
            self._bar.initial += images
            self._bar.update(images)

    def _skip(self, key: str, reason: str) -> None:
        key = self._tasks.pop(key).record["key"]
        self.unreadable[key] = reason
        self.writer.skip(key, reason)
        self._bar.update()
        self._check_limit(max(self._total or len(self.seen), EARLIEST_STOP), "at least ")

    def _check_limit(self, total: int, least: str = "") -> None:
        bad = len(self.unreadable) + len(self.absent)
        if not bad or self.skip_limit is None:
            return
        if bad < total and bad <= self.skip_limit * total:
            return
        key, reason = next(chain(self.unreadable.items(), self.absent.items()))
        share = f"all {total}" if bad == total else f"{least}{bad} of {total}"
        raise SkipLimitError(
            f"{share} images of {self.source.spec} are unreadable (first {key}: {reason}), "
            f"expected at most {self.skip_limit:.0%}; fix them, `clipkit data check` lists them"
        )
