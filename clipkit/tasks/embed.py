"""Encode images and store their vectors: ``clipkit embed IMAGES --out STORE``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clipkit.artifacts import is_complete, partial_path
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
"""Of a new store.

With the 1,000 photos of Flickr8k's dev set, of 224 pixels, "fast" moves recall@1, 5 and 10 either
way by at most 0.1 points. Enlarged to 2 megapixels, captions finding photos move by -0.22, +0.02
and +0.28, photos finding captions by -0.10, +0.50 and +0.10: one of six by more than 0.3.
"""

EARLIEST_STOP = 1000
"""Fewer images are checked at the end, when it is known whether all of them are bad."""


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
    """Encode every image of a source into a store; what is stored already is not encoded again.

    Images are decoded by threads, encoded, and written by another thread, all at the same time.

    An interrupted run goes on where it stopped. A finished store of the same model is brought up
    to date: images of the same key, size and modification time keep their vectors, and so do those
    of the same content under another name; new and changed ones are encoded, vanished ones go.

    Args:
        images: whatever ``open_source`` opens, or a source already open, whose metadata are stored
            if it was opened with them.
        out: directory of the store.
        encoder: the model; None loads that of the store at ``out``, or the default model.
        decode: "exact" reads images as open_clip does, "fast" at a reduced size; None: the
            decoder of the store at ``out``, or "exact" for a new store.
        batch_size: images encoded at once; ``"auto"`` suits the device.
        workers: decoding threads; ``"auto"`` is one per core.
        skip_limit: the largest share of images that may be unreadable. Half is generous on
            purpose: a bad image harms no other, and all are listed.

    Raises:
        DataError: the source cannot be opened, or holds no image.
        SkipLimitError: more than ``skip_limit`` of the images are bad, or all of them.
        ModelMismatchError: another model made the store at ``out``, finished or half-written.
        ModelError: the device's memory does not suffice for one image.
        ArtifactError: ``out`` is taken by something else, it uses another decoder,
            or the disk is full.
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


def default_encoder(store: Path) -> "Encoder":
    """The encoder of the store at a path, finished or half-written, or the default model."""
    from clipkit.models.loading import load_model, load_model_ref

    owner = Owner.read(partial_path(store))
    if owner is not None:
        return load_model_ref(owner.model, f"the store {store}")
    if is_complete(store):
        return load_model_ref(EmbeddingStore.open(store).model, f"the store {store}")
    return load_model()


class _Walk:
    """One pass over a source, whose images are already written, reusable, to encode, or skipped."""

    def __init__(
        self, source: Source, writer: StoreWriter, known: StoredVectors, bar: Any, skip_limit: float
    ) -> None:
        self.source, self.writer, self.known, self.bar = source, writer, known, bar
        self.skip_limit = skip_limit
        self.seen: set[str] = set()
        self.bad: list[tuple[str, str]] = []

    def rows_to_encode(self) -> Iterator[Row]:
        """The rows whose image must be read, each with its ``record``; others are dealt with.

        ``known`` is the row of the store that stands already, where key, size and time are equal.
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
            # Bytes in a table have no time: whether they are the same, their hash must say.
            if known is not None and record["mtime_ns"]:
                record["content_hash"] = self.known.content_hash(known)
            row = {**row, "record": record, "known": known}
            if record["content_hash"] and known is not None:
                self.store(self.known.vector(known), [row])
            else:
                yield row

    def known_vector(self, row: Row) -> Vectors | None:
        """The vector of a row that the store already has, maybe under another key.

        Its content is hashed for that, and for the next time; called by the decoding threads.
        """
        content = row["record"]["content_hash"] = content_hash(row_source(row))
        known = row["known"]
        if known is None or self.known.content_hash(known) not in (None, content):
            known = row["known"] = self.known.same_content(content)
        return None if known is None else self.known.vector(known)

    def store(self, vectors: Vectors, rows: list[Row]) -> None:
        """Hand rows with their vectors, float32 [n, dim], to the writer."""
        self.writer.append(vectors, [row["record"] for row in rows])
        for row in rows:
            if row["known"] is None:
                self.bar.update()
            else:
                self._advance_unmeasured()

    def _advance_unmeasured(self) -> None:
        # Moved past its start too, an image that is not encoded leaves images/s and ETA true.
        if not self.bar.disable:
            self.bar.initial += 1
            self.bar.update()

    def skip(self, key: str, reason: str) -> None:
        """Note an unreadable image; raises SkipLimitError once the limit is surely passed."""
        self.writer.skip(key, reason)
        self.bad.append((key, reason))
        self.bar.update()
        self._check(max(self.bar.total or len(self.seen), EARLIEST_STOP), "at least ")

    def finish(self) -> None:
        """Note what the source itself left out, judge the whole, and drop vanished images."""
        for item in self.source.skipped:
            self.writer.skip(item.key, item.reason)
            if item.key not in self.seen:  # else only a caption of it was left out
                self.bad.append((item.key, item.reason))
                self.seen.add(item.key)
        if not self.seen:
            raise DataError(f"{self.source.spec} holds no image; name a folder or table of images")
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
            f"{share} images of {self.source.spec} are bad (first {key}: {reason}), allowed is a "
            f"share of {self.skip_limit:.0%}; fix them, `clipkit data check` lists them"
        )
