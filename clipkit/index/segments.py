"""Segments: the immutable parts of an index on disk.

An index is a directory of one or more segments, named by its ``manifest.json``::

    index.faiss            the FAISS index of the spec: the base segment
    records.parquet        its rows: key, size, mtime_ns, captions, label, source metadata, and
                           id, a number that an item keeps through every change of the index
    vectors.npy            its exact vectors, if the FAISS index does not store them
    index-000003.faiss     a later segment: items added since, exact (Flat), beside its records
    dead-000004-0.bin      one bit per row: the removed rows of the first segment
    sample_queries.bin     caption vectors used for tuning and calibration (``sample_queries``)

The last two are in NumPy's format. Tools such as ``embedding-reader`` take every ``*.npy`` file of
a directory for vectors of images, so only those have that name.

**Why segments.** Adding ten photos to an index of a million writes a file of ten rows instead of a
copy of the whole index. HNSW cannot remove items, and the trained lists of an IVF fit later
additions less and less. With segments, neither has to change: searches skip removed rows, later
segments are exact, and compacting retrains and rebuilds the base. Adding items merges small later
segments, which keeps their number at about log2 of their rows.

**Why the vectors are stored.** A quantised index cannot return the original vectors, so compacting,
merging or renaming an image would each lose precision. The vectors are float32 in a memory-mapped
file that is read only for hits. Every hit therefore has its exact inner product for any spec, and
scores of different segments are comparable. Flat, HNSW and RFlat already store the vectors; other
specs need 4 × dim bytes more per image on disk, but no memory.

**Why it is safe.** A writer gives the files of a new state new names, flushes them, and then
renames the manifest, which commits the change. Afterwards it deletes files that are no longer used.
A process killed at any moment leaves either the old state or the new one; the next writer deletes
leftover files. A reader keeps its files open; if files disappear while it opens the index, it tries
again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipkit.artifacts import Manifest
from clipkit.errors import ArtifactError
from clipkit.index.faiss_factory import read_index, stored_vectors
from clipkit.index.search import (
    MAX_MASKED,
    FaissSearcher,
    rerank,
    search_float16_index,
    search_masked,
)
from clipkit.store.shards import Vectors, conform, widened

REPAIR = "build the index again"
ID = pa.field("id", pa.int64())
BLOCK = 2**14
"""Rows per block when reading or writing."""
Mask = NDArray[np.bool_]
"""bool [rows], True for the rows that a search may return."""


@dataclass(frozen=True)
class Parts:
    """The files and row counts of a segment, as listed in the manifest.

    Attributes:
        rows: number of rows, including removed ones.
        index: file name of the FAISS index.
        records: file name of the records.
        vectors: file name of the vectors; None if the FAISS index stores them.
        dead: file name of the bitmap of removed rows; None if no row is removed.
        removed: number of removed rows.
        files: size in bytes and SHA-256 of each file by name; empty in indexes of format 1.
    """

    rows: int
    index: str = "index.faiss"
    records: str = "records.parquet"
    vectors: str | None = None
    dead: str | None = None
    removed: int = 0
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all its files."""
        return [
            name for name in (self.index, self.records, self.vectors, self.dead) if name is not None
        ]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for the manifest."""
        return asdict(self)


def parts_of(manifest: Manifest, path: Path) -> list[Parts]:
    """The segments listed in a manifest; for format 1, the only segment.

    Raises:
        ArtifactError: the manifest's list of segments is malformed.
    """
    try:
        named = manifest.detail.get("segments", [{"rows": manifest.count}])
        parts = [Parts(**one) for one in named]
        if any(Path(name).name != name for one in parts for name in one.names):
            raise ValueError("a file outside the index")
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"the manifest of {path} has a malformed list of segments ({error}); {REPAIR}"
        ) from None
    return parts


class Segment:
    """An open segment, which stays readable when a writer deletes its files.

    Attributes:
        parts: its files.
        index: its FAISS index; ids are row numbers.
        vectors: float32 [rows, dim], exact, in memory or memory-mapped; None in an index of format
            1 with a lossy spec.
        live: bool [rows], False for removed rows; None if no row is removed.
        rerank_factor: FAISS returns this many times k candidates, re-ranked by ``vectors``.
    """

    rerank_factor = 1

    def __init__(
        self,
        folder: Path,
        parts: Parts,
        index: Any,
        records: pq.ParquetFile,
        vectors: Vectors | None,
    ) -> None:
        self._folder, self.parts, self.index = folder, parts, index
        self._records, self.vectors = records, vectors
        self._searcher = FaissSearcher(index)
        self.live: NDArray[np.bool_] | None = None

    @classmethod
    def open(cls, folder: Path, parts: Parts, dim: int) -> Self:
        """Open the files of a segment and check that they belong together.

        Raises:
            ArtifactError: a file is missing or damaged, or does not match the others.
        """
        index = read_index(folder / parts.index)
        if index.d != dim or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise mismatch(folder, f"dimension {index.d}, metric {index.metric_type}", dim)
        records = _open_records(folder / parts.records)
        vectors = _open_vectors(folder / parts.vectors) if parts.vectors else stored_vectors(index)
        rows = {"vectors": index.ntotal, "records": records.metadata.num_rows}
        if set(rows.values()) != {parts.rows} or (
            vectors is not None and vectors.shape != (parts.rows, dim)
        ):
            raise mismatch(
                folder, f"{rows['vectors']} vectors, {rows['records']} records", parts.rows
            )
        for name, (size, _) in parts.files.items():
            _check_size(folder / name, size)
        return cls(folder, parts, index, records, vectors)._without_dead()

    def renewed(self, parts: Parts) -> "Segment":
        """The same segment with a different set of removed rows."""
        found = Segment(self._folder, parts, self.index, self._records, self.vectors)
        found.__dict__.update({n: self.__dict__[n] for n in ("keys", "ids") if n in self.__dict__})
        return found._without_dead()

    def _without_dead(self) -> Self:
        if self.parts.dead:
            self.live = ~_open_bits(self._folder / self.parts.dead, self.rows)
        return self

    def __len__(self) -> int:
        return self.parts.rows if self.live is None else int(np.count_nonzero(self.live))

    @property
    def rows(self) -> int:
        """Number of rows, including removed ones."""
        return self.parts.rows

    @cached_property
    def keys(self) -> pa.ChunkedArray:
        """The key of every row, including removed ones."""
        return self.column("key")

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """The id of every row, int64 [rows]."""
        if ID.name not in self._records.schema_arrow.names:  # format 1: the row numbers
            return np.arange(self.rows)
        # The column's to_numpy would import pandas, which takes half a second.
        chunks = [np.from_dlpack(chunk) for chunk in self.column(ID.name).chunks]
        return np.concatenate([np.empty(0, np.int64), *chunks])

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the records, including removed rows, read from disk."""
        with self._reading():
            return self._records.read(columns=[name]).column(0)

    def record(self, row: int) -> dict[str, Any]:
        """The record of one row; only its row group is read."""
        with self._reading():
            for group in range(self._records.num_row_groups):
                count = self._records.metadata.row_group(group).num_rows
                if row < count:
                    table = self._records.read_row_group(group).slice(row, 1)
                    found: dict[str, Any] = table.to_pylist()[0]
                    return found
                row -= count
        raise IndexError(row)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise _unreadable(self._folder / self.parts.records, error) from None

    @property
    def schema(self) -> pa.Schema:
        """Columns of its records: those of ``SCHEMA``, source metadata, and the id."""
        return widened(self._records.schema_arrow, pa.schema([ID]))

    def tables(self, live: NDArray[np.bool_] | None) -> Iterator[pa.Table]:
        """Yield records of the rows in ``live`` (None: all), at most ``BLOCK`` rows at a time."""
        start = 0
        batches = self._records.iter_batches(BLOCK)
        while True:
            with self._reading():
                batch = next(batches, None)
            if batch is None:
                return
            table, stop = pa.Table.from_batches([batch]), start + len(batch)
            if ID.name not in table.column_names:
                table = table.append_column(ID, pa.array(self.ids[start:stop]))
            table = conform(table, self.schema)
            yield table if live is None else table.filter(pa.array(live[start:stop]))
            start = stop

    def blocks(
        self, live: NDArray[np.bool_] | None, path: Path
    ) -> Iterator[tuple[Vectors, pa.Table]]:
        """Yield vectors, float32 [m, dim], together with the blocks of ``tables``.

        Raises:
            ArtifactError: the index at ``path`` has format 1 and a lossy spec.
        """
        if self.vectors is None:
            raise ArtifactError(
                f"{path} was built by an older clipkit, which stored only approximate "
                f"vectors for its spec; {REPAIR}"
            )
        rows = np.arange(self.rows) if live is None else np.flatnonzero(live)
        start = 0
        for table in self.tables(live):
            stop = start + len(table)
            yield self.vectors[rows[start:stop]], table
            start = stop

    def search(
        self, queries: Vectors, k: int, mask: Mask | None = None
    ) -> tuple[Vectors, NDArray[np.int64]]:
        """Scores and row numbers of the best ``k`` rows, [n, at most k]; -1 fills missing hits.

        Args:
            queries: float32 [n, dim].
            k: number of hits, at least 1.
            mask: bool [rows], the rows to search, without removed rows; None: all live rows.
        """
        small = mask is not None and np.count_nonzero(mask) <= MAX_MASKED
        if mask is not None and small and self.vectors is not None:
            return search_masked(self.vectors, mask, queries, k)
        live = self.live if mask is None else mask
        exact = search_float16_index(self.index, self.vectors, queries, k) if live is None else None
        if exact is not None:
            return exact
        wide = min(k * self.rerank_factor, self.rows)
        scores, rows = self._searcher.search(queries, wide, live)
        if self.parts.vectors is None or self.vectors is None:
            return scores, rows
        return rerank(rows, self.vectors, queries, min(k, self.rows))


def split_mask(segments: Sequence[Segment], mask: Mask | None) -> list[Mask | None]:
    """Split a mask into one mask per segment, without removed rows; None means all live rows.

    Args:
        segments: all segments of an index.
        mask: bool [n], in the order of the index's records.

    Raises:
        ArtifactError: the mask does not have one value per record.
    """
    if mask is None:
        return [None] * len(segments)
    total = sum(map(len, segments))
    if mask.shape != (total,):
        raise ArtifactError(
            f"the mask has shape {list(mask.shape)}, expected one value for each of the {total} "
            "records; recompute it for the current index"
        )
    masks: list[Mask | None] = []
    start = 0
    for segment in segments:
        own = mask[start : start + len(segment)]
        start += len(own)
        if segment.live is not None:
            rows = np.zeros(segment.rows, bool)
            rows[segment.live] = own
            own = rows
        masks.append(own)
    return masks


def search_segments(
    segments: Sequence[Segment], queries: Vectors, k: int, mask: Mask | None = None
) -> tuple[Vectors, NDArray[np.int64]]:
    """Scores and rows of the best ``k`` hits of each segment, concatenated; -1 fills missing hits.

    Args:
        segments: all segments of an index; rows are counted over all of them, including removed
            rows.
        queries: float32 [m, dim].
        k: number of hits, at least 1.
        mask: as for ``split_mask``, which raises its errors.
    """
    scores, places, start = [], [], 0
    for segment, own in zip(segments, split_mask(segments, mask), strict=True):
        if segment.rows:
            found, rows = segment.search(queries, k, own)
            scores.append(found)
            places.append(np.where(rows < 0, -1, rows + start))
        start += segment.rows
    return np.concatenate(scores, axis=1), np.concatenate(places, axis=1)


def mismatch(path: Path, found: str, expected: object) -> ArtifactError:
    """Build the error for files that do not match the manifest."""
    return ArtifactError(f"{path} holds {found}, its manifest says {expected}; {REPAIR}")


def _check_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from None
    if size != expected:
        raise ArtifactError(
            f"cannot read {file} (it has {size} bytes, its manifest says {expected}); {REPAIR}"
        )


def _open_records(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None


def _open_vectors(file: Path) -> NDArray[Any]:
    """Vectors, memory-mapped."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(file, error) from None


def _open_bits(file: Path, rows: int) -> NDArray[np.bool_]:
    """Read a bitmap as bool [rows]."""
    try:
        packed = np.load(file, allow_pickle=False)
        return np.unpackbits(packed, count=rows, bitorder="little").astype(bool)
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ArtifactError:
    reason = " ".join(str(error).split()).rstrip(".")
    return ArtifactError(f"cannot read {file} ({reason}); {REPAIR}")
