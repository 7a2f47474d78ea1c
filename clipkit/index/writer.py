"""IndexWriter: add and remove items of an index in one atomic commit.

The writer collects removals and additions. ``commit`` writes new files, then the manifest that
names them; the module ``segments`` explains why this is safe. Only one process writes at a time;
readers need no lock.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipkit.artifacts import (
    MANIFEST,
    ArtifactWriter,
    Manifest,
    read_manifest,
    sync_tree,
    write_json,
)
from clipkit.errors import ArtifactError
from clipkit.index.build import cannot_write, sealed, write_segment
from clipkit.index.segments import Parts, Segment, parts_of
from clipkit.index.vector_index import VectorIndex
from clipkit.store.shards import Vectors, check_vectors

Live = NDArray[np.bool_] | None
"""bool [rows], False for removed rows; None if no row is removed."""
_OURS = re.compile(
    r"(index|records|vectors|dead)(-\d+)*\.(faiss|parquet|npy|bin)"
    r"|\.(manifest\.json|sample_queries\.bin)\.tmp|questions\.npy"
)
GROWTH = 2
"""Later segments with at most this many times the added rows are merged with them."""


class IndexWriter:
    """Changes a complete index. Use it in a ``with`` statement and call ``commit``.

    Args:
        index: the index, or its directory.

    Attributes:
        index: the index as of the last commit, or as it was opened.

    Raises:
        ArtifactError: the index does not exist or is damaged, or another process is writing it.
    """

    def __init__(self, index: str | Path | VectorIndex) -> None:
        path = index.path if isinstance(index, VectorIndex) else index
        self.path = Path(os.path.abspath(path))
        read_manifest(self.path, "index")
        # ``build`` takes the same lock; its temporary directory stays empty here.
        self._artifact = ArtifactWriter(self.path, "index", replace=True)
        try:
            self._begin(VectorIndex.open(self.path))
        except BaseException:
            self._artifact.__exit__(None, None, None)
            raise

    def _begin(self, index: VectorIndex) -> None:
        self.index = index
        self._live = [segment.live for segment in index.segments]
        self._added: list[tuple[Vectors, pa.Table]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._artifact.__exit__(kind, error, trace)

    def find(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """The row of each key, int64 [n], counted over all segments; -1 for unknown keys.

        Items appended since the last commit are not found.
        """
        found, wanted, start = np.full(len(keys), -1), pa.array(keys, pa.string()), 0
        for segment, live in zip(self.index.segments, self._live, strict=True):
            at = pc.index_in(segment.keys, value_set=wanted)
            rows = np.flatnonzero(np.asarray(at.is_valid()) & (True if live is None else live))
            found[np.asarray(at.take(pa.array(rows)), np.int64)] = start + rows
            start += segment.rows
        return found

    def remove(self, keys: str | Iterable[str]) -> None:
        """Remove one item or several by key.

        Raises:
            ArtifactError: a key is unknown.
        """
        keys = [keys] if isinstance(keys, str) else list(keys)
        rows = self.find(keys)
        if (rows < 0).any():
            raise self._unknown(keys[int(np.argmin(rows))])
        self.remove_rows(rows)

    def remove_rows(self, rows: NDArray[np.int64]) -> None:
        """Remove rows that ``find`` returned."""
        start = 0
        for number, segment in enumerate(self.index.segments):
            own = rows[(rows >= start) & (rows < start + segment.rows)] - start
            if len(own):
                old = self._live[number]
                live = np.ones(segment.rows, bool) if old is None else old.copy()
                live[own] = False
                self._live[number] = live
            start += segment.rows

    def append(self, vectors: Vectors, records: pa.Table) -> None:
        """Add items: unit vectors, float32 [m, dim], and a table of m records.

        Columns that are not in ``SCHEMA`` become metadata. Rows with an ``id`` keep it, so that a
        replaced item keeps its id; other rows get new ids.

        Raises:
            ArtifactError: the vectors have the wrong shape or type, or are not finite or of unit
                length.
        """
        vectors = np.asarray(vectors)
        check_vectors(vectors, records.select(["key"]).to_pylist(), self.index.dim)
        if len(records):
            self._added.append((vectors, records))

    def commit(self, *, compact: bool = False, source: dict[str, Any] | None = None) -> VectorIndex:
        """Apply all changes atomically and return the new state of the index.

        Args:
            compact: retrain and rebuild the base segment from all rows that are not removed.
            source: a new ``source`` for the manifest.

        Raises:
            ArtifactError: a key would occur twice, or the disk is full. The index is unchanged.
            SpecError: too few rows are left to train on, when compacting.
        """
        given, changed = self.index.manifest.source, self._added or not self._unchanged()
        if not (compact or changed or source not in (None, given)):
            return self.index
        self._refuse_duplicate_keys()
        detail = dict(self.index.manifest.detail)
        detail["generation"] = detail.get("generation", 0) + 1
        self._sweep()
        try:
            parts = self._write(detail, compact)
            count = sum(one.rows - one.removed for one in parts)
            source = given if source is None else source
            detail["segments"] = [one.to_dict() for one in parts]
            manifest = Manifest("index", self.index.model, count, source, detail)
            sync_tree(self.path)
            write_json(self.path / MANIFEST, manifest.to_dict())
            sync_tree(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        finally:
            self._sweep()
        self._begin(self.index.reopen())
        return self.index

    def _unchanged(self) -> bool:
        segments = zip(self.index.segments, self._live, strict=True)
        return all(live is segment.live for segment, live in segments)

    def _write(self, detail: dict[str, Any], compact: bool) -> list[Parts]:
        """Write the files of the next state and update ``detail`` for its manifest."""
        segments = list(zip(self.index.segments, self._live, strict=True))
        first = 0 if compact else self._first_joined()
        parts = [
            self._with_dead(segment, live, f"dead-{detail['generation']:06d}-{number}.bin")
            for number, (segment, live) in enumerate(segments[:first])
        ]
        rows = _Joined(self.index.dim, self.path, segments[first:], self._added)
        if compact or len(rows):
            next_id = detail.get("next_id", self.index.manifest.count)
            built = write_segment(
                self.path,
                rows,
                self.index.spec if compact else "Flat",
                self.path,
                generation=detail["generation"],
                next_id=next_id,
            )
            detail["next_id"] = built.next_id
            if compact:
                detail["trained_on"] = built.trained_on
            parts.append(built.parts)
        return parts

    def _first_joined(self) -> int:
        """The first segment to merge with the added rows; never the base."""
        rows, first = sum(len(table) for _, table in self._added), len(self._live)
        while first > 1:
            size = _count(self.index.segments[first - 1], self._live[first - 1])
            if size > GROWTH * rows:
                break
            rows, first = rows + size, first - 1
        return first

    def _with_dead(self, segment: Segment, live: Live, name: str) -> Parts:
        """The segment's parts with the current set of removed rows."""
        if live is segment.live:
            return segment.parts
        files = {n: f for n, f in segment.parts.files.items() if n != segment.parts.dead}
        with (self.path / name).open("wb") as stream:
            np.save(stream, np.packbits(~np.asarray(live), bitorder="little"))
        removed = segment.rows - _count(segment, live)
        return replace(
            segment.parts,
            dead=name,
            removed=removed,
            files={**files, name: sealed(self.path / name)},
        )

    def _refuse_duplicate_keys(self) -> None:
        keys = [key for _, table in self._added for key in table["key"].to_pylist()]
        existing = self.find(keys) >= 0
        duplicate = keys[int(np.argmax(existing))] if existing.any() else None
        if duplicate is None and len(set(keys)) < len(keys):
            duplicate = Counter(keys).most_common(1)[0][0]
        if duplicate is not None:
            raise ArtifactError(
                f"the key {duplicate!r} would occur twice in {self.path}; use unique keys, or "
                "remove the old item first"
            )

    def _unknown(self, key: str) -> ArtifactError:
        close = self.index.closest_key(key)
        hint = f"did you mean {close!r}" if close else "`clipkit info` describes the index"
        return ArtifactError(f"{self.path} has no item {key!r}, nothing was removed; {hint}")

    def _sweep(self) -> None:
        """Delete files of earlier states, of killed writers and of older versions."""
        with suppress(ArtifactError, OSError):
            parts = parts_of(read_manifest(self.path, "index"), self.path)
            named = {MANIFEST, *(name for one in parts for name in one.names)}
            for file in self.path.iterdir():
                if file.name not in named and _OURS.fullmatch(file.name):
                    file.unlink()


class _Joined:
    """The live rows of some segments, followed by the added rows."""

    def __init__(
        self,
        dim: int,
        path: Path,
        segments: list[tuple[Segment, Live]],
        added: list[tuple[Vectors, pa.Table]],
    ) -> None:
        self.dim, self._path, self._segments, self._added = dim, path, segments, added

    def __len__(self) -> int:
        existing = sum(_count(segment, live) for segment, live in self._segments)
        return existing + sum(len(table) for _, table in self._added)

    def shards(self) -> Iterator[tuple[Vectors, pa.Table]]:
        """Yield vectors and records in blocks of bounded size."""
        for segment, live in self._segments:
            yield from segment.blocks(live, self._path)
        yield from self._added


def _count(segment: Segment, live: Live) -> int:
    return segment.rows if live is None else int(np.count_nonzero(live))
