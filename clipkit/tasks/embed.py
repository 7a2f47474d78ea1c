"""Encode images and store their vectors: ``clipkit embed IMAGES --out STORE``."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from clipkit.data.sources import Row, Source, open_source
from clipkit.data.workers import worker_count
from clipkit.errors import DataError, SkipLimitError
from clipkit.manifest import ModelRef, is_complete
from clipkit.model.encode_pairs import encoded_batches
from clipkit.store.embeddings import EmbeddingStore, StoreWriter
from clipkit.store.shards import Record, Vectors, digest

if TYPE_CHECKING:
    from clipkit.model.encoder import Encoder

EARLIEST_STOP = 1000
"""Fewer images are judged at the end, when it is known whether all of them are bad."""


def embed(
    images: str | Path | Source,
    out: str | Path,
    encoder: "Encoder",
    *,
    batch_size: int = 64,
    workers: int | str = "auto",
    skip_limit: float = 0.5,
) -> EmbeddingStore:
    """Encode every image of a source into a store; what is stored already is not encoded again.

    An interrupted run goes on where it stopped. A finished store of the same model is brought up
    to date: images of the same key, size and modification time keep their vectors, new and changed
    ones are encoded, vanished ones go. Bytes inside a table or tar have no modification time, so
    that there key and size decide.

    Args:
        images: whatever ``open_source`` opens, or a source already open.
        out: where the store shall stand.
        encoder: the model.
        batch_size: images encoded at once.
        workers: decoding threads; ``"auto"`` is one per core.
        skip_limit: the largest share of images that may be unreadable. Half is generous on
            purpose: a bad picture in a folder of photos harms no other, and all are listed.

    Raises:
        DataError: the source cannot be opened, or holds no image.
        SkipLimitError: more than ``skip_limit`` of the images are bad, or all of them.
        ModelMismatchError: another model made the store at ``out``, finished or half-written.
        ArtifactError: ``out`` is taken by something else, or the disk is full.
    """
    source = images if isinstance(images, Source) else open_source(images)
    total = None if source.streaming else len(source.rows)
    with (
        EmbeddingStore.create(out, encoder.model, replace=True) as writer,
        tqdm(total=total, unit="img", desc="embedding", disable=None) as bar,
    ):
        walk = _Walk(source, writer, _Known(writer.path, encoder.model), bar, skip_limit)
        try:
            for vectors, rows in encoded_batches(
                encoder,
                walk.rows_to_encode(),
                batch_size=batch_size,
                workers=worker_count(workers),
                on_skip=walk.skip,
            ):
                writer.append(vectors, [row["record"] for row in rows])
                bar.update(len(rows))
        except KeyboardInterrupt:
            bar.close()
            print(
                f"stopped: {len(writer.done)} encoded images are kept for {writer.path}; "
                "run the same command again to go on",
                file=sys.stderr,
            )
            raise
        walk.finish()
        origin = {"root": str(source.root) if source.root else None, "kind": source.kind}
        return writer.finish({"spec": source.spec, **origin, "fingerprint": source.fingerprint})


class _Known:
    """The vectors of a finished store, found by key, size and modification time."""

    def __init__(self, path: Path, model: ModelRef) -> None:
        self._rows: dict[str, tuple[int, int, Vectors, int]] = {}
        if not is_complete(path):
            return
        store = EmbeddingStore.open(path)
        store.model.require(
            model, what=f"the store {path}", repair="name another place with --out, or remove it"
        )
        for vectors, table in store.shards():
            columns = (table[name].to_pylist() for name in ("key", "size", "mtime_ns"))
            for row, (key, size, mtime_ns) in enumerate(zip(*columns, strict=True)):
                self._rows[key] = (size, mtime_ns, vectors, row)

    def vector(self, record: Record) -> Vectors | None:
        """float32 [1, dim] of an image that has not changed; None where there is none."""
        size, mtime_ns, vectors, row = self._rows.get(record["key"], (None, None, None, 0))
        if vectors is None or (size, mtime_ns) != (record["size"], record["mtime_ns"]):
            return None
        return vectors[row : row + 1]


class _Walk:
    """One pass over a source, sorting its rows into held, copied, to encode, and skipped."""

    def __init__(
        self, source: Source, writer: StoreWriter, known: _Known, bar: Any, skip_limit: float
    ) -> None:
        self.source, self.writer, self.known, self.bar = source, writer, known, bar
        self.skip_limit = skip_limit
        self.seen: set[str] = set()
        self.bad: list[tuple[str, str]] = []

    def rows_to_encode(self) -> Iterator[Row]:
        """The rows with no vector yet, each with its ``record``; the others are dealt with."""
        for row in self.source.rows:
            key = row["key"]
            if key in self.seen:
                self.writer.skip(key, "its key is taken by an earlier image")
                continue
            self.seen.add(key)
            record = _record(row)
            held = self.writer.done.get(key)
            if held == digest(record):
                self._advance_unmeasured()
                continue
            if held is not None:
                self.writer.forget(key)
            vector = self.known.vector(record)
            if vector is None:
                yield {**row, "record": record}
            else:
                self.writer.append(vector, [record])
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
            f"share of {self.skip_limit:.0%}; mend them, `clipkit data check` lists them"
        )


def _record(row: Row) -> Record:
    data, path = row["image"]["bytes"], row["image"]["path"]
    size, mtime_ns = len(data or b""), 0
    if data is None and path is not None:
        try:
            status = os.stat(path)
        except OSError:
            pass  # reading it will fail as well, and say why
        else:
            size, mtime_ns = status.st_size, status.st_mtime_ns
    kept = {name: row[name] for name in ("key", "captions", "label")}
    return {**kept, "size": size, "mtime_ns": mtime_ns}
