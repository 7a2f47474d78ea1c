"""Keep an index up to date with its images: ``clipkit index add`` and ``clipkit index sync``.

Only new content is encoded; known content reuses its stored vector.
"""

import os
import shlex
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from clipkit.arguments import require_encoder
from clipkit.artifacts import is_complete
from clipkit.data.images import Decode, Skipped
from clipkit.data.open_source import Row, Source, open_listed, open_source
from clipkit.data.source import Data
from clipkit.data.workers import worker_count
from clipkit.errors import ArtifactError, DataError
from clipkit.index.roots import (
    Root,
    Scope,
    extended,
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
from clipkit.progress import print_status
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.store.incremental import IncrementalPass, KnownRows
from clipkit.store.shards import Record, Vectors, shard_numbers

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
        records = writer.index.records()
        self.ids = records[ID.name].to_numpy()
        self.indexed = KnownRows(records.drop_columns([ID.name]), self._vector)
        self.changes = Changes()
        self.delta = writer.path.with_name(f".{writer.path.name}.delta")
        self._fingerprint: dict[str, str] = {}

    def _vector(self, row: int) -> Vectors | None:
        """The vector of a row of the index; None if an older clipkit stored no exact one."""
        index = self.writer.index
        segment, place = index.locate(int(index.places[row]))
        return None if segment.vectors is None else np.array(segment.vectors[place : place + 1])

    def encode(
        self,
        source: Source,
        encoder: "Encoder | None",
        batch_size: "BatchSize",
        workers: int | str,
    ) -> tuple[EmbeddingStore, IncrementalPass]:
        """Write new and changed images into a store beside the index, or continue that store.

        Raises:
            DataError: the source has no images.
        """
        index = self.writer.index
        what = f"the index {index.path}"
        require_encoder(encoder)
        if encoder is not None:
            index.model.require(encoder.model, what=what, repair="encode with its own model")

        def encode(rows: Iterator[Row], **hooks: Any) -> Iterator[tuple[Vectors, list[Row]]]:
            first = next(rows, None)
            if first is not None:  # load the model only if there is an image to read
                yield from encoded_batches(
                    encoder or load_model_ref(index.model, what),
                    chain([first], rows),
                    batch_size=batch_size,
                    workers=worker_count(workers),
                    decode=cast(Decode, index.decode),
                    **hooks,
                )

        with EmbeddingStore.create(
            self.delta, index.model, decode=index.decode, replace=True
        ) as delta:
            # A complete store is there if a process died before it changed the index.
            leftover = KnownRows.of_store(delta.path, delta.owner)
            work = IncrementalPass(
                source,
                delta,
                [self.indexed, leftover],
                rewrite=False,
                key=lambda key: self._key_of(key, source),
            )
            work.run(encode)
            if not work.seen:
                raise DataError(
                    f"{source.spec} holds no images, nothing was removed; name a folder of images"
                )
            store = delta.finish({})
        self.changes.unchanged += work.unchanged
        self.changes.encoded += work.encoded
        self.changes.skipped += work.skipped
        if self.scope == Scope(self.roots[0]):
            self._fingerprint = {"fingerprint": source.fingerprint}
        return store, work

    def _key_of(self, key: str, source: Source) -> str | None:
        """The key in the index of an image of the source; None if it is not in this scope."""
        below = f"{self.scope.below}/"
        if self.scope.below and source.root == Path(self.scope.root.where):
            if not key.startswith(below):
                return None
            key = key.removeprefix(below)
        return self._key(key, source.spec)

    def _key(self, key: str, source: str) -> str:
        """The key in the index of an image of this scope.

        Raises:
            ArtifactError: the key would belong to another root.
        """
        key = self.scope.key(key)
        found = owner(self.roots, key)
        if found != self.scope.root:
            raise ArtifactError(
                f"{source} has an image whose key {key!r} would belong to {found}; rename its "
                "folder"
            )
        return key

    def gone(self, work: IncrementalPass) -> list[int]:
        """Rows of the index whose image no longer exists; rows in unreadable folders stay."""
        start = self.scope.key("")
        below = tuple(f"{key}/" for key in work.absent)

        def is_gone(key: str) -> bool:
            if key in work.seen:
                return key in work.unreadable
            return not (key in work.absent or key.startswith(below))

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
            keys = [self._key(key, str(store.path)) for key in table["key"].to_pylist()]
            place = table.column_names.index("key")
            table = table.set_column(place, "key", pa.array(keys, pa.string()))
            fresh = [not self.indexed.as_is(record) for record in table.to_pylist()]
            self.changes.unchanged += fresh.count(False)
            yield vectors[fresh], table.filter(pa.array(fresh))

    def apply(self, shards: Shards, gone: list[int]) -> None:
        """Add rows and remove ``gone`` and the old rows of the same keys in one atomic commit."""
        lost: dict[str, list[int]] = defaultdict(list)
        for row in gone:
            content = self.indexed.content_hash(row)
            if content is not None:
                lost[content].append(row)
        out = list(gone)
        for vectors, table in shards:
            ids = [self._id(record, lost, out) for record in table.to_pylist()]
            self.writer.append(np.asarray(vectors), table.append_column(ID, pa.array(ids, ID.type)))
        self.changes.removed = len(gone) - self.changes.renamed
        self.writer.remove_rows(self.writer.index.places[np.array(out, np.int64)])
        source = {**self.writer.index.manifest.source, **self._fingerprint}
        self.writer.commit(source=with_roots(source, self.roots))

    def _id(self, record: Record, lost: dict[str, list[int]], out: list[int]) -> int | None:
        """The id of an image in the index, or None if it is new; adds its old row to ``out``."""
        at, content = self.indexed.row(record["key"]), record["content_hash"]
        if at is not None:
            out.append(at)
            same = content is not None and self.indexed.content_hash(at) == content
            if same and self.indexed.same_words(at, record):
                self.changes.unchanged += 1  # only the modification time changed
            else:
                self.changes.changed += 1
        elif content is not None and lost[content]:
            at = lost[content].pop(0)
            self.changes.renamed += 1
        else:
            self.changes.added += 1
        return None if at is None else int(self.ids[at])

    def clear(self) -> None:
        """Delete the store beside the index; its rows are now in the index."""
        shutil.rmtree(self.delta, ignore_errors=True)


def sync_index(
    index: str | Path | VectorIndex,
    data: Data | None = None,
    encoder: "Encoder | None" = None,
    *,
    image: str | None = None,
    caption: str | None = None,
    image_root: str | Path | None = None,
    batch_size: "BatchSize" = "auto",
    workers: int | str = "auto",
) -> Changes:
    """Bring an index up to date with its images: new, changed, renamed and deleted ones.

    Images with the same key, size and modification time are not read. Images whose content is in
    the index under any key reuse its vector; renamed images also keep their id. All others are
    encoded, and encoded images survive an interruption. Each folder is updated atomically.

    Args:
        index: the index.
        data: one of its folders or tables, a folder within one, or a folder that was moved, at its
            new place; None: all that it was built from. If single images or patterns were indexed,
            these are read again.
        encoder: the model of the index; None loads it if there is something to encode.
        image: image column of a table; None: as when it was indexed.
        caption: likewise, the caption column; "" ignores captions.
        image_root: likewise, the folder that the image paths of a table start from.
        batch_size: images encoded at once; ``"auto"`` fits the device.
        workers: decoding threads; ``"auto"`` is one per core.

    Raises:
        DataError: the images cannot be opened, or there are none, or a folder no longer exists;
            then nothing is removed.
        ModelMismatchError: ``encoder`` is another model.
        ArtifactError: ``data`` is not part of the index, or another process is writing it.
    """
    columns = {"image": image, "caption": caption}
    named = {name: column for name, column in columns.items() if column is not None}
    data = str(data) if isinstance(data, Path) else data
    with IndexWriter(index) as writer:
        roots = roots_of(writer.index.manifest)
        if data is None:
            _require_sources(roots, writer.path)
        total = Changes()
        for number in range(len(roots)) if data is None else [_number(data, roots)]:
            if number is None:
                assert data is not None
                source = open_source(
                    data, image=image, caption=caption, metadata=True, image_root=image_root
                )
                source, scope, roots = _scope_of(source, roots, writer.index)
                if scope.below and isinstance(data, str):
                    # Labels and captions of a folder can come from the folders above it.
                    source = _open_root(scope.root)
            else:
                root = replace(roots[number], columns={**roots[number].columns, **named})
                if image_root is not None and not root.folder:
                    root = replace(root, base=os.path.abspath(image_root))
                source, scope, roots[number] = _open_root(root), Scope(root), root
            update = Update(writer, scope, roots)
            store, work = update.encode(source, encoder, batch_size, workers)
            update.apply(store.shards(), update.gone(work))
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
        scope = find_scope(roots, wanted)
        if scope is not None and prefix is not None:
            raise ArtifactError(
                f"{wanted.where} is part of {scope.root.where}, which is already in the index and "
                "determines the keys; omit --prefix"
            )
        if scope is None and isinstance(opened, Source) and opened.kind == "image":
            raise ArtifactError(
                f"{wanted.where} is not in a folder of {writer.path}; add the folder containing it"
            )
        new = scope is None
        if scope is None:
            scope = Scope(new_root(roots, writer.index.keys, wanted, prefix))
            roots = [*roots, scope.root]
        else:
            scope, roots = extended(roots, scope, wanted)
        update = Update(writer, scope, roots)
        if isinstance(opened, Source):
            store, _ = update.encode(opened, encoder, batch_size, workers)
            update.apply(store.shards(), [])
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
    return root_of({**source.origin, "spec": spec})


def _number(data: Data, roots: Sequence[Root]) -> int | None:
    """The number of the root that a path or name is; None if it is none of them."""
    names = (data, os.path.abspath(data)) if isinstance(data, str) else ()
    return next((number for number, root in enumerate(roots) if root.where in names), None)


def _open_root(root: Root) -> Source:
    if root.folder and root.listed:
        return open_listed(Path(root.where), root.listed, root.columns)
    return open_source(
        list(root.listed) or root.where,
        image=root.columns.get("image"),
        caption=root.columns.get("caption"),
        label=root.columns.get("label"),
        metadata=True,
        image_root=root.base or None,
        encoding=root.columns.get("encoding"),
    )


def _require_sources(roots: Sequence[Root], index: Path) -> None:
    """Raise DataError if a source of the index cannot be read again or a folder is gone."""
    for root in roots:
        if not root.where:
            raise DataError(
                f"items of {index} were given as Python objects, which cannot be read again, "
                "nothing was changed; name one of its folders, or build the index again"
            )
        if root.folder and not os.path.isdir(root.where):
            command = f"clipkit index sync {shlex.quote(str(index))} NEWFOLDER"
            raise DataError(
                f"the folder {root.where} no longer exists, nothing was changed; if it was moved, "
                f"run `{command}`, which keeps the vectors of its images"
            )


def _scope_of(
    source: Source, roots: list[Root], index: VectorIndex
) -> tuple[Source, Scope, list[Root]]:
    """The scope of a source in an index, and the index's roots, one of which may have moved.

    The source is opened again if its folder was indexed in part.

    Raises:
        ArtifactError: the source is not part of the index, or not all of a folder.
    """
    wanted = _root(source)
    scope = find_scope(roots, wanted)
    if scope is not None and wanted.listed:
        raise ArtifactError(
            f"only {len(wanted.listed)} images or patterns of {wanted.where} are named, expected a "
            "whole folder, since a sync removes all other images from the index; add images with "
            "`clipkit index add`"
        )
    if scope is not None and (not scope.root.listed or _is_listed(scope)):
        return source, scope, roots
    lost = [root for root in roots if root.folder and not os.path.isdir(root.where)]
    if scope is None and wanted.folder and lost:
        found = Counter(
            root.prefix
            for key in index.keys
            if (root := owner(roots, key)) in lost
            and os.path.exists(os.path.join(wanted.where, root.relative(key)))
        )
        old = max(lost, key=lambda root: found[root.prefix])
        if found[old.prefix]:
            print_status(f"{old.where} no longer exists, its images moved to {wanted.where}")
            moved = replace(old, where=wanted.where)
            source = _open_root(moved) if moved.listed else source
            return source, Scope(moved), [moved if root is old else root for root in roots]
    raise ArtifactError(
        f"{source.spec} is not part of {index.path}, expected one of "
        f"{', '.join(map(str, roots))}; use `clipkit index add` to add other images"
    )


def _is_listed(scope: Scope) -> bool:
    """Whether a sub-folder of a root is in a folder that the root lists."""
    below = Path(scope.below)
    return any(below.is_relative_to(name) for name in scope.root.listed)
