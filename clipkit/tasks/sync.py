"""Keep an index in step with its images: ``clipkit index add`` and ``clipkit index sync``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.data.sources import Source, open_source
from clipkit.errors import ArtifactError
from clipkit.manifest import is_complete
from clipkit.progress import tell
from clipkit.store.embeddings import EmbeddingStore
from clipkit.store.roots import Root, Scope, find_scope, new_root, root_of, roots_of
from clipkit.store.shards import shard_numbers
from clipkit.store.writer import IndexWriter
from clipkit.tasks.update import Changes, Update

if TYPE_CHECKING:
    from clipkit.model.encoder import Encoder


def sync_index(
    index: str | Path,
    images: str | Path | None = None,
    *,
    encoder: "Encoder | None" = None,
    workers: int | str = "auto",
) -> Changes:
    """Bring an index up to date with its images: new, changed, renamed and deleted ones.

    An image of the same key, size and modification time is not read; one of the same content as
    one that is held, under whatever key, keeps its vector and, if it was renamed, its id. All
    others are encoded, and what is encoded survives an interruption. The index changes in one step
    for each of its folders.

    Args:
        index: the index.
        images: one of its folders or tables, a folder within one, or its only folder at a new
            place; None: all that it was made of.
        encoder: the model of the index; None: it is loaded when there is something to encode.
        workers: decoding threads; ``"auto"`` is one per core.

    Raises:
        DataError: the images cannot be opened, or there are none, in which case nothing is removed.
        ModelMismatchError: ``encoder`` is another model.
        ArtifactError: ``images`` are not those of the index, or another process is writing it.
    """
    with IndexWriter(index) as writer:
        roots = roots_of(writer.index.manifest)
        total = Changes()
        for where in [root.where for root in roots] if images is None else [images]:
            source = open_source(where, metadata=True)
            scope, roots = _scope_of(source, roots, writer.path)
            update = Update(writer, scope, roots)
            store = update.encode(source, encoder, workers)
            update.apply(store.shards(), update.gone(source))
            update.clear()
            total.add(update.changes)
        return total


def add_images(
    index: str | Path,
    images: str | Path,
    *,
    encoder: "Encoder | None" = None,
    prefix: str | None = None,
    workers: int | str = "auto",
) -> Changes:
    """Add images, or an embedding store, to an index; those it holds are brought up to date.

    Images that lie in a folder of the index get keys relative to that; those of another place get
    a prefix before their keys, so that no key means two images.

    Args:
        index: the index.
        images: a store, or whatever ``open_source`` opens.
        encoder: as for ``sync_index``.
        prefix: what the keys of a place that is new to the index begin with; None: its name.
        workers: as for ``sync_index``.

    Raises:
        DataError: the images cannot be opened, or there are none.
        ModelMismatchError: the store or ``encoder`` is of another model.
        ArtifactError: ``prefix`` is taken, or another process is writing the index.
    """
    path = Path(images)
    is_store = is_complete(path) and shard_numbers(path)
    opened = EmbeddingStore.open(path) if is_store else open_source(images, metadata=True)
    with IndexWriter(index) as writer:
        roots = roots_of(writer.index.manifest)
        wanted = _root(opened) if isinstance(opened, Source) else root_of(opened.manifest.source)
        alone = isinstance(opened, Source) and opened.kind == "image"
        scope = find_scope(roots, wanted, whole=not alone)
        if scope is not None and prefix is not None:
            raise ArtifactError(
                f"the images of {wanted.where} have their keys relative to {scope.root.where}, "
                "which the index holds; leave --prefix out"
            )
        if scope is None and alone:
            raise ArtifactError(
                f"{images} lies in no folder of {index}; add the folder that it lies in"
            )
        new = scope is None
        if scope is None:
            scope = Scope(new_root(roots, writer.index.keys, wanted, prefix))
            roots = [*roots, scope.root]
        update = Update(writer, scope, roots)
        if isinstance(opened, Source):
            update.apply(update.encode(opened, encoder, workers).shards(), [])
            update.clear()
        else:
            update.apply(update.shards_of(opened), [])
        update.changes.prefix = scope.root.prefix if new else ""
        return update.changes


def _root(source: Source) -> Root:
    """The root of a source that is open; of a single image the folder that it lies in."""
    spec = source.spec if source.kind == "hub" else os.path.abspath(source.spec)
    if source.kind == "image":
        return Root("", str(source.root), True)
    return root_of({"spec": spec, "kind": source.kind, "root": source.root and str(source.root)})


def _scope_of(source: Source, roots: list[Root], path: Path) -> tuple[Scope, list[Root]]:
    """Where a source lies in an index, and the index's roots, of which one may have moved."""
    wanted = _root(source)
    scope = find_scope(roots, wanted) if source.kind != "image" else None
    if scope is not None:
        return scope, roots
    if len(roots) == 1 and wanted.folder and roots[0].folder and not os.path.exists(roots[0].where):
        tell(f"{roots[0].where} is gone, its images are taken to be those of {wanted.where}")
        moved = Root("", wanted.where, True)
        return Scope(moved), [moved]
    raise ArtifactError(
        f"{path} holds no images of {source.spec}, but those of {', '.join(map(str, roots))}; sync "
        "one of these, or `clipkit index add` the others"
    )
