"""Keep an index up to date with its images: ``clipkit index add`` and ``clipkit index sync``.

Only new content is encoded; known content reuses its stored vector.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from clipkit.artifacts import is_complete
from clipkit.data.images import Decode, Skipped, content_hash
from clipkit.data.open_source import Row, Source, open_source, row_record, row_source
from clipkit.data.source import Data
from clipkit.data.workers import worker_count
from clipkit.errors import ArtifactError, DataError
from clipkit.index.incremental import IndexedRows
from clipkit.index.roots import (
    Root,
    Scope,
    find_scope,
    new_root,
    owner,
    root_of,
    roots_of,
    with_roots,
)
from clipkit.index.segments import ID
from clipkit.index.vector_index import VectorIndex
from clipkit.index.writer import IndexWriter
from clipkit.models.embed_source import encoded_batches
from clipkit.models.loading import load_model_ref
from clipkit.progress import print_status, progress_bar
from clipkit.store.embedding_store import EmbeddingStore, StoreWriter
from clipkit.store.incremental import StoredVectors
from clipkit.store.shards import Record, Vectors, digest, shard_numbers

if TYPE_CHECKING:
    from clipkit.models.encoder import BatchSize, Encoder


Shards = Iterable[tuple[Vectors, pa.Table]]


@dataclass
class Changes:
    """What ``add_images`` or ``sync_index`` changed.

    Attributes:
        added: images that are new to the index.
        changed: images with new content, captions or label.
        renamed: images with a new key.
        removed: images that no longer exist.
        unchanged: all others.
        encoded: number of images that were encoded.
        skipped: unreadable images and the reasons.
        prefix: key prefix of a folder that is new to the index; empty if it has none.
    """

    added: int = 0
    changed: int = 0
    renamed: int = 0
    removed: int = 0
    unchanged: int = 0
    encoded: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    prefix: str = ""

    def add(self, other: "Changes") -> None:
        """Add the counts of another folder of the index."""
        for name in ("added", "changed", "renamed", "removed", "unchanged", "encoded", "skipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Update:
    """The update of an index from one source."""

    def __init__(self, writer: IndexWriter, scope: Scope, roots: list[Root]) -> None:
        self.writer, self.scope, self.roots = writer, scope, roots
        self.indexed = IndexedRows(writer.index)
        self.changes = Changes()
        self.delta = writer.path.with_name(f".{writer.path.name}.delta")
        self._seen: set[str] = set()
        self._unreadable: set[str] = set()
        self._fingerprint: dict[str, str] = {}

    def encode(
        self,
        source: Source,
        encoder: "Encoder | None",
        batch_size: "BatchSize",
        workers: int | str,
    ) -> EmbeddingStore:
        """Write new and changed images into a store beside the index, or continue that store.

        Raises:
            DataError: the source has no images.
        """
        index, wanted = self.writer.index, set[str]()
        if encoder is not None:
            what = f"the index {index.path}"
            index.model.require(encoder.model, what=what, repair="encode with its own model")
        total = None if source.streaming else len(source.rows)
        with (
            EmbeddingStore.create(
                self.delta, index.model, decode=index.decode, replace=True
            ) as delta,
            progress_bar(total=total, unit="img", desc="reading") as bar,
        ):
            rows = self._rows(source, delta, wanted, bar)
            first = next(rows, None)
            if first is not None:
                encoder = encoder or load_model_ref(index.model, f"the index {index.path}")
                self._encode(chain([first], rows), delta, encoder, batch_size, workers, bar)
            if not self._seen:
                raise DataError(
                    f"{source.spec} holds no images, nothing was removed; name a folder of images"
                )
            for key in delta.done.keys() - wanted:
                delta.forget(key)
            self._note_skipped(source)
            if self.scope == Scope(self.roots[0]):
                self._fingerprint = {"fingerprint": source.fingerprint}
            return delta.finish({})

    def _rows(
        self, source: Source, delta: StoreWriter, wanted: set[str], bar: Any
    ) -> Iterator[Row]:
        """The rows whose image must be read; their keys are added to ``wanted``."""
        for row in source.rows:
            key = self.scope.key(row["key"])
            if key in self._seen:
                taken = Skipped(key, "its key is taken by an earlier image")
                self.changes.skipped.append(taken)
                continue
            self._refuse_foreign_key(key, source.spec)
            self._seen.add(key)
            record, at = {**row_record(row), "key": key}, self.indexed.row(key)
            if self.indexed.as_is(record):
                self.changes.unchanged += 1
                bar.update()
                continue
            wanted.add(key)
            done = delta.done.get(key)
            if done == digest(record):  # encoded before an interruption
                bar.update()
                continue
            if done is not None:
                delta.forget(key)
            yield {**row, "key": key, "record": record, "at": at, "same": None, "known": False}

    def _refuse_foreign_key(self, key: str, source: str) -> None:
        found = owner(self.roots, key)
        if found != self.scope.root:
            raise ArtifactError(
                f"{source} has an image whose key {key!r} would belong to {found}; rename its "
                "folder"
            )

    def _encode(
        self,
        rows: Iterator[Row],
        delta: StoreWriter,
        encoder: "Encoder",
        batch_size: "BatchSize",
        workers: int | str,
        bar: Any,
    ) -> None:
        leftover = StoredVectors(delta.path, delta.owner)

        def known(row: Row) -> Vectors | None:
            """The stored vector of a row's content, if any; called by the decoding threads."""
            content = row["record"]["content_hash"] = content_hash(row_source(row))
            at = row["at"]
            if at is None or self.indexed.fact(at, "content_hash") != content:
                at = self.indexed.same_content(content)
            vector = None if at is None else self.indexed.vector(at)
            row["same"] = at
            if vector is None and (place := leftover.same_content(content)) is not None:
                vector = leftover.vector(place)
            row["known"] = vector is not None
            return vector

        try:
            for vectors, encoded in encoded_batches(
                encoder,
                rows,
                batch_size=batch_size,
                workers=worker_count(workers),
                on_skip=self._skip,
                decode=cast(Decode, self.writer.index.decode),
                known=known,
            ):
                self._store(vectors, encoded, delta)
                bar.update(len(encoded))
        except KeyboardInterrupt:
            bar.close()
            print_status(
                f"stopped: {len(delta.done)} images are saved; "
                "run the same command again to continue"
            )
            raise

    def _store(self, vectors: Vectors, rows: list[Row], delta: StoreWriter) -> None:
        """Write encoded rows into the store, except rows that are unchanged in the index."""
        self.changes.encoded += sum(not row["known"] for row in rows)
        fresh = []
        for number, row in enumerate(rows):
            at, record = row["at"], row["record"]
            if (
                at is not None
                and row["same"] == at
                and self.indexed.same_words(at, record)
                and self.indexed.fact(at, "mtime_ns") == record["mtime_ns"]
            ):
                self.changes.unchanged += 1
            else:
                fresh.append(number)
        delta.append(vectors[fresh], [rows[number]["record"] for number in fresh])

    def _skip(self, key: str, reason: str) -> None:
        self.changes.skipped.append(Skipped(key, reason))
        self._unreadable.add(key)

    def _note_skipped(self, source: Source) -> None:
        named = [(self.scope.key(item.key), item.reason) for item in source.skipped]
        self.changes.skipped += [Skipped(*item) for item in named if item[0] not in self._seen]

    def gone(self, source: Source) -> list[int]:
        """Rows of the index whose image no longer exists; rows in unreadable folders stay."""
        start = self.scope.key("")
        hidden = tuple(self.scope.key(item.key) for item in source.skipped)
        below = tuple(f"{key}/" for key in hidden)

        def is_gone(key: str) -> bool:
            if key in self._unreadable:
                return True
            out_of_sight = key in hidden or key.startswith(below)
            return not (key in self._seen or out_of_sight)

        return [
            row
            for row, key in enumerate(self.indexed.keys)
            if key.startswith(start) and is_gone(key) and owner(self.roots, key) == self.scope.root
        ]

    def shards_of(self, store: EmbeddingStore) -> Iterator[tuple[Vectors, pa.Table]]:
        """Yield the new and changed rows of a store, with their keys in the index.

        Raises:
            ModelMismatchError: the store was built with another model.
            ArtifactError: the store uses another decoder, or a key would belong to another root.
        """
        index = self.writer.index
        index.model.require(
            store.model,
            what=f"the index {index.path}",
            repair=f"embed the images of {store.path} again with it",
        )
        if store.decode != index.decode:
            raise ArtifactError(
                f"the images of {store.path} were read with --decode {store.decode}, those of "
                f"{index.path} with --decode {index.decode}; embed them again"
            )
        for vectors, table in store.shards():
            keys = [self.scope.key(key) for key in table["key"].to_pylist()]
            for key in keys:
                self._refuse_foreign_key(key, str(store.path))
            place = table.column_names.index("key")
            table = table.set_column(place, "key", pa.array(keys, pa.string()))
            fresh = [not self.indexed.as_is(record) for record in table.to_pylist()]
            self.changes.unchanged += fresh.count(False)
            yield vectors[fresh], table.filter(pa.array(fresh))

    def apply(self, shards: Shards, gone: list[int]) -> None:
        """Add rows and remove ``gone`` and the old rows of the same keys in one atomic commit."""
        lost: dict[str, list[int]] = defaultdict(list)
        for row in gone:
            lost[self.indexed.fact(row, "content_hash")].append(row)
        out = list(gone)
        for vectors, table in shards:
            ids = [self._id(record, lost, out) for record in table.to_pylist()]
            self.writer.append(np.asarray(vectors), table.append_column(ID, pa.array(ids, ID.type)))
        self.changes.removed = len(gone) - self.changes.renamed
        self.writer.remove_rows(self.indexed.places(out))
        source = {**self.writer.index.manifest.source, **self._fingerprint}
        self.writer.commit(source=with_roots(source, self.roots))

    def _id(self, record: Record, lost: dict[str, list[int]], out: list[int]) -> int | None:
        """The id of an image in the index, or None if it is new; adds its old row to ``out``."""
        at, content = self.indexed.row(record["key"]), record["content_hash"]
        if at is not None:
            out.append(at)
            same = content is not None and self.indexed.fact(at, "content_hash") == content
            if same and self.indexed.same_words(at, record):
                self.changes.unchanged += 1  # only the modification time changed
            else:
                self.changes.changed += 1
        elif content is not None and lost[content]:
            at = lost[content].pop(0)
            self.changes.renamed += 1
        else:
            self.changes.added += 1
        return None if at is None else self.indexed.id(at)

    def clear(self) -> None:
        """Delete the store beside the index; its rows are now in the index."""
        shutil.rmtree(self.delta, ignore_errors=True)


def sync_index(
    index: str | Path | VectorIndex,
    data: str | Path | Source | None = None,
    encoder: "Encoder | None" = None,
    *,
    batch_size: "BatchSize" = "auto",
    workers: int | str = "auto",
) -> Changes:
    """Bring an index up to date with its images: new, changed, renamed and deleted ones.

    Images with the same key, size and modification time are not read. Images whose content is in
    the index under any key reuse its vector; renamed images also keep their id. All others are
    encoded, and encoded images survive an interruption. Each folder is updated atomically.

    Args:
        index: the index.
        data: one of its folders or tables, a folder within one, or its only folder at a new
            place; None: all that it was built from.
        encoder: the model of the index; None loads it if there is something to encode.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.

    Raises:
        DataError: the images cannot be opened, or there are none; then nothing is removed.
        ModelMismatchError: ``encoder`` is another model.
        ArtifactError: ``data`` is not part of the index, or another process is writing it.
    """
    with IndexWriter(index) as writer:
        roots = roots_of(writer.index.manifest)
        total = Changes()
        for where in [root.where for root in roots] if data is None else [data]:
            source = where if isinstance(where, Source) else open_source(where, metadata=True)
            scope, roots = _scope_of(source, roots, writer.path)
            update = Update(writer, scope, roots)
            store = update.encode(source, encoder, batch_size, workers)
            update.apply(store.shards(), update.gone(source))
            update.clear()
            total.add(update.changes)
        return total


def add_images(
    index: str | Path | VectorIndex,
    data: Data | EmbeddingStore,
    encoder: "Encoder | None" = None,
    *,
    prefix: str | None = None,
    batch_size: "BatchSize" = "auto",
    workers: int | str = "auto",
) -> Changes:
    """Add images, or an embedding store, to an index; update images that it already has.

    Keys of images in a folder of the index are relative to that folder. Keys of other images get a
    prefix, which keeps them unique.

    Args:
        index: the index.
        data: a store, or anything that ``open_source`` accepts.
        encoder: as for ``sync_index``.
        prefix: prefix of the keys of a folder that is new to the index; None: its name.
        batch_size: as for ``sync_index``.
        workers: as for ``sync_index``.

    Raises:
        DataError: the images cannot be opened, or there are none.
        ModelMismatchError: the store or ``encoder`` uses another model.
        ArtifactError: ``prefix`` is taken, or another process is writing the index.
    """
    opened = _open(data)
    with IndexWriter(index) as writer:
        roots = roots_of(writer.index.manifest)
        wanted = _root(opened) if isinstance(opened, Source) else root_of(opened.manifest.source)
        alone = isinstance(opened, Source) and opened.kind == "image"
        scope = find_scope(roots, wanted, whole=not alone)
        if scope is not None and prefix is not None:
            raise ArtifactError(
                f"{wanted.where} is part of {scope.root.where}, which is already in the index and "
                "determines the keys; omit --prefix"
            )
        if scope is None and alone:
            raise ArtifactError(
                f"{wanted.where} is not in a folder of {writer.path}; add the folder containing it"
            )
        new = scope is None
        if scope is None:
            scope = Scope(new_root(roots, writer.index.keys, wanted, prefix))
            roots = [*roots, scope.root]
        update = Update(writer, scope, roots)
        if isinstance(opened, Source):
            update.apply(update.encode(opened, encoder, batch_size, workers).shards(), [])
            update.clear()
        else:
            update.apply(update.shards_of(opened), [])
        update.changes.prefix = scope.root.prefix if new else ""
        return update.changes


def _open(data: Data | EmbeddingStore) -> Source | EmbeddingStore:
    if isinstance(data, Source | EmbeddingStore):
        return data
    if isinstance(data, str | Path) and is_complete(Path(data)) and shard_numbers(Path(data)):
        return EmbeddingStore.open(data)
    return open_source(data, metadata=True)


def _root(source: Source) -> Root:
    """The root of an open source; for a single image, the folder that contains it."""
    spec = source.spec if source.kind == "hub" else os.path.abspath(source.spec)
    if source.kind == "image":
        return Root("", str(source.root), True)
    return root_of({"spec": spec, "kind": source.kind, "root": source.root and str(source.root)})


def _scope_of(source: Source, roots: list[Root], path: Path) -> tuple[Scope, list[Root]]:
    """The scope of a source in an index, and the index's roots, one of which may have moved."""
    wanted = _root(source)
    scope = find_scope(roots, wanted) if source.kind != "image" else None
    if scope is not None:
        return scope, roots
    if len(roots) == 1 and wanted.folder and roots[0].folder and not os.path.exists(roots[0].where):
        print_status(
            f"{roots[0].where} no longer exists, assuming its images moved to {wanted.where}"
        )
        moved = Root("", wanted.where, True)
        return Scope(moved), [moved]
    raise ArtifactError(
        f"{source.spec} is not part of {path}, expected one of {', '.join(map(str, roots))}; "
        "use `clipkit index add` to add other images"
    )
