"""Encode images and store their vectors: ``clipkit embed IMAGES --out STORE``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clipkit.artifacts import ModelRef, is_complete, partial_path
from clipkit.data.images import Decode, content_hash
from clipkit.data.open_source import Data, Row, Source, open_source, row_record, row_source
from clipkit.data.workers import worker_count
from clipkit.errors import DataError, SkipLimitError
from clipkit.models.embed_source import encoded_batches
from clipkit.progress import print_status, progress_bar
from clipkit.store.embedding_store import EmbeddingStore, Owner, StoreWriter, decode_of
from clipkit.store.incremental import StoredVectors
from clipkit.store.shards import Vectors, digest

if TYPE_CHECKING:
    from clipkit.models.encoder import BatchSize, Encoder


DEFAULT_DECODE: Decode = "exact"
"""Decoder of a new store.

On the 1,000 photos of the Flickr8k dev set, at 224 pixels, "fast" changes recall@1, 5 and 10 by at
most 0.1 points in both directions. With photos enlarged to 2 megapixels, text→image recall changes
by -0.22, +0.02 and +0.28, image→text recall by -0.10, +0.50 and +0.10: one of six by more than 0.3.
"""

EARLIEST_STOP = 1000
"""A run over fewer images checks the skip limit only at the end."""


def embed(
    images: Data,
    out: str | Path,
    encoder: "Encoder | None" = None,
    *,
    decode: Decode | None = None,
    batch_size: "BatchSize" = "auto",
    workers: int | str = "auto",
    skip_limit: float = 0.5,
) -> EmbeddingStore:
    """Encode every image of a source into a store, except images that are already stored.

    Decoding threads, the encoder and a writing thread run concurrently.

    An interrupted run continues where it stopped. An existing store of the same model is updated:
    images with the same key, size and modification time keep their vectors, and so do images with
    the same content under another name. New and changed images are encoded; deleted images are
    removed.

    Args:
        images: anything that ``open_source`` accepts, or an open source. Metadata are stored if
            the source was opened with them.
        out: directory of the store.
        encoder: the model; None loads the model of the store at ``out``, or the default model.
        decode: "exact" decodes images as open_clip does, "fast" at a reduced size; None uses the
            decoder of the store at ``out``, or "exact" for a new store.
        batch_size: images per batch; ``"auto"`` chooses it for the device.
        workers: decoding threads; ``"auto"`` is one per core.
        skip_limit: maximum fraction of unreadable images. The default is generous because a bad
            image does not affect others, and all are listed.

    Raises:
        DataError: the source cannot be opened or has no images.
        SkipLimitError: more than ``skip_limit`` of the images, or all of them, are unreadable.
        ModelMismatchError: the store at ``out``, complete or partial, uses another model.
        ModelError: the device does not have enough memory for one image.
        ArtifactError: ``out`` exists and is not a store, the store uses another decoder, or the
            disk is full.
    """
    source = images if isinstance(images, Source) else open_source(images, metadata=True)
    encoder = encoder or default_encoder(Path(out))
    total = None if source.streaming else len(source.rows)
    decode = decode or cast(Decode | None, decode_of(Path(out))) or DEFAULT_DECODE
    with (
        EmbeddingStore.create(out, encoder.model, decode=decode, replace=True) as writer,
        progress_bar(total=total, unit="img", desc="embedding") as bar,
    ):
        known = StoredVectors(writer.path, writer.owner)
        walk = _Walk(source, writer, known, bar, skip_limit)
        try:
            for vectors, rows in encoded_batches(
                encoder,
                walk.rows_to_encode(),
                batch_size=batch_size,
                workers=worker_count(workers),
                on_skip=walk.skip,
                decode=decode,
                known=walk.known_vector,
            ):
                walk.store(vectors, rows)
        except KeyboardInterrupt:
            bar.close()
            print_status(
                f"stopped: {len(writer.done)} encoded images are saved for {writer.path}; "
                "run the same command again to continue"
            )
            raise
        walk.finish()
        origin = {"root": str(source.root) if source.root else None, "kind": source.kind}
        return writer.finish({"spec": source.spec, **origin, "fingerprint": source.fingerprint})


def stored_model(store: Path) -> ModelRef | None:
    """The model of the store at a path, finished or half-written; None if there is no store.

    Raises:
        ArtifactError: something else is there.
    """
    owner = Owner.read(partial_path(store))
    if owner is not None:
        return owner.model
    return EmbeddingStore.open(store).model if is_complete(store) else None


def default_encoder(store: Path) -> "Encoder":
    """The encoder of the store at a path, complete or partial, or the default model."""
    from clipkit.models.loading import load_model, load_model_ref

    model = stored_model(store)
    return load_model() if model is None else load_model_ref(model, f"the store {store}")


class _Walk:
    """One pass over a source that sorts images into written, reusable, to encode and skipped."""

    def __init__(
        self, source: Source, writer: StoreWriter, known: StoredVectors, bar: Any, skip_limit: float
    ) -> None:
        self.source, self.writer, self.known, self.bar = source, writer, known, bar
        self.skip_limit = skip_limit
        self.seen: set[str] = set()
        self.bad: list[tuple[str, str]] = []

    def rows_to_encode(self) -> Iterator[Row]:
        """Yield the rows whose image must be read, each with its ``record``; handle all others.

        ``known`` is the row of the existing store with equal key, size and modification time.
        """
        for row in self.source.rows:
            key = row["key"]
            if key in self.seen:
                self.writer.skip(key, "its key is taken by an earlier image")
                continue
            self.seen.add(key)
            record = row_record(row)
            held = self.writer.done.get(key)
            if held == digest(record):
                self._advance_unmeasured()
                continue
            if held is not None:
                self.writer.forget(key)
            known = self.known.unchanged(record)
            # Bytes in a table have no modification time, so compare their hash.
            if known is not None and record["mtime_ns"]:
                record["content_hash"] = self.known.content_hash(known)
            row = {**row, "record": record, "known": known}
            if record["content_hash"] and known is not None:
                self.store(self.known.vector(known), [row])
            else:
                yield row

    def known_vector(self, row: Row) -> Vectors | None:
        """The stored vector of the row's content, possibly under another key; None if not stored.

        Hashes the content and records the hash. Called by the decoding threads.
        """
        content = row["record"]["content_hash"] = content_hash(row_source(row))
        known = row["known"]
        if known is None or self.known.content_hash(known) not in (None, content):
            known = row["known"] = self.known.same_content(content)
        return None if known is None else self.known.vector(known)

    def store(self, vectors: Vectors, rows: list[Row]) -> None:
        """Pass rows and their vectors, float32 [n, dim], to the writer."""
        self.writer.append(vectors, [row["record"] for row in rows])
        for row in rows:
            if row["known"] is None:
                self.bar.update()
            else:
                self._advance_unmeasured()

    def _advance_unmeasured(self) -> None:
        # Also advance the bar's start, so that images not encoded do not distort images/s and ETA.
        if not self.bar.disable:
            self.bar.initial += 1
            self.bar.update()

    def skip(self, key: str, reason: str) -> None:
        """Record an unreadable image; raises SkipLimitError once the limit must be exceeded."""
        self.writer.skip(key, reason)
        self.bad.append((key, reason))
        self.bar.update()
        self._check(max(self.bar.total or len(self.seen), EARLIEST_STOP), "at least ")

    def finish(self) -> None:
        """Record images skipped by the source, check the limit, and remove deleted images."""
        for item in self.source.skipped:
            self.writer.skip(item.key, item.reason)
            if item.key not in self.seen:  # otherwise the source only skipped one of its captions
                self.bad.append((item.key, item.reason))
                self.seen.add(item.key)
        if not self.seen:
            raise DataError(f"{self.source.spec} holds no images; name a folder or table of images")
        self._check(len(self.seen), "")
        for key in self.writer.done.keys() - self.seen:
            self.writer.forget(key)

    def _check(self, total: int, least: str) -> None:
        bad, all_bad = len(self.bad), len(self.bad) == total
        if not all_bad and bad <= self.skip_limit * total:
            return
        key, reason = self.bad[0]
        share = f"all {total}" if all_bad else f"{least}{bad} of {total}"
        raise SkipLimitError(
            f"{share} images of {self.source.spec} are unreadable (first {key}: {reason}), "
            f"expected at most {self.skip_limit:.0%}; fix them, `clipkit data check` lists them"
        )
