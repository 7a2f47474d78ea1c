"""VectorIndex: a FAISS index beside its records, searched by inner product.

An index is a directory of ``index.faiss``, ``records.parquet`` and ``manifest.json``, which holds
the FAISS factory string and the search-time knobs. Ids are row numbers of the records.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipkit.errors import ArtifactError, SpecError
from clipkit.manifest import ArtifactWriter, Manifest, read_manifest
from clipkit.store.embeddings import EmbeddingStore
from clipkit.store.shards import SCHEMA, Vectors, read_records
from clipkit.store.spec import (
    ROWS_PER_CENTROID,
    TRAINING_ROWS,
    default_knobs,
    explain,
    new_index,
    set_knobs,
    train,
    training_rows_needed,
)

INDEX, RECORDS = "index.faiss", "records.parquet"
_reading = threading.Lock()


@dataclass(frozen=True)
class Hit:
    """An item found: its key, and its inner product with the query, higher being better."""

    key: str
    score: float


class VectorIndex:
    """A finished index, loaded for searching.

    Attributes:
        path: the directory.
        manifest: what made it, its spec and its search-time knobs.
        model: the model whose vectors it holds; queries must come from the same.
        dim: width of its vectors.
    """

    def __init__(self, path: Path, manifest: Manifest, index: Any) -> None:
        self.path, self.manifest, self._index = path, manifest, index
        self.model = manifest.require_model()
        self.dim = self.model.dim

    @classmethod
    def build(
        cls, store: EmbeddingStore, path: str | Path, spec: str = "Flat", *, replace: bool = False
    ) -> Self:
        """Build an index of a store's vectors, shard by shard.

        Args:
            store: the vectors.
            path: where the index shall stand.
            spec: FAISS factory string.
            replace: allow a finished index to stand there; it stays until the new one is finished.

        Raises:
            SpecError: the spec is malformed or impossible for these vectors.
            ArtifactError: ``path`` is taken, the store is damaged, or the disk is full.
        """
        index = new_index(spec, store.dim, len(store))
        with ArtifactWriter(Path(path), "index", replace=replace) as artifact:
            try:
                trained_on = _train(index, store)
                _add(index, store)
            except (RuntimeError, MemoryError) as error:
                raise SpecError(explain(spec, store.dim, error)) from None
            try:
                faiss.write_index(index, str(artifact.temp / INDEX))
                _write_records(store, artifact.temp / RECORDS)
                detail = {"spec": spec, "search": default_knobs(index), "trained_on": trained_on}
                source = {**store.manifest.source, "store": str(store.path)}
                artifact.finish(Manifest("index", store.model, len(store), source, detail))
            except (RuntimeError, OSError) as error:
                raise ArtifactError(
                    f"{path} cannot be written ({_short(error)}); make room on that disk and "
                    "build the index again"
                ) from None
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Load a finished index and check that its files belong together.

        Raises:
            ArtifactError: no index, half-written, or its files are damaged, foreign or do not fit.
        """
        path = Path(path)
        manifest = read_manifest(path, "index")
        found = cls(path, manifest, _read_index(path / INDEX))
        index = found._index
        if index.d != found.dim or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise _unfit(path, f"dimension {index.d}, metric {index.metric_type}", f"{found.dim}")
        rows = {"vectors": index.ntotal, "records": _count_records(path / RECORDS)}
        if set(rows.values()) != {manifest.count}:
            raise _unfit(path, f"{rows['vectors']} vectors, {rows['records']} records", len(found))
        set_knobs(index, manifest.detail.get("search", {}))
        return found

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def spec(self) -> str:
        """The FAISS factory string it was built with."""
        return str(self.manifest.detail.get("spec"))

    def records(self) -> pa.Table:
        """All records, row n being id n: key, size in bytes, mtime_ns, captions, label."""
        return read_records(self.path / RECORDS)

    @cached_property
    def keys(self) -> list[str]:
        """The key of every row, in row order."""
        keys: list[str] = self.records()["key"].to_pylist()
        return keys

    def search(self, queries: Vectors, k: int) -> list[list[Hit]]:
        """The best ``k`` items of each query, best first; fewer where the index holds fewer.

        Args:
            queries: float32 [n, dim], finite.
            k: how many, at least 1.

        Raises:
            ArtifactError: ``queries`` have another shape or are not finite, or ``k`` is below 1.
        """
        queries = self._checked(queries)
        if k < 1:
            raise ArtifactError(f"k is {k}, expected at least 1; ask for one hit or more")
        if not len(self) or not len(queries):
            return [[] for _ in queries]
        scores, ids = self._index.search(queries, min(k, len(self)))
        return [self._hits(*row) for row in zip(scores, ids, strict=True)]

    def _checked(self, queries: NDArray[Any]) -> Vectors:
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ArtifactError(
                f"the queries have shape {list(queries.shape)}, expected [n, {self.dim}]; "
                f"encode them with {self.model}, which made this index"
            )
        queries = np.ascontiguousarray(queries, np.float32)
        if not np.isfinite(queries).all():
            raise ArtifactError(
                "the queries hold NaN or infinite numbers, expected finite ones; encode them again"
            )
        return queries

    def _hits(self, scores: Vectors, ids: NDArray[np.int64]) -> list[Hit]:
        # Equal scores in row order, so that answers do not depend on how FAISS walked.
        order = np.lexsort((ids, -scores))
        return [Hit(self.keys[ids[n]], float(scores[n])) for n in order if ids[n] >= 0]


def _train(index: Any, store: EmbeddingStore) -> int:
    """Train on a sample that is spread over the store, and bounded; returns its size."""
    if index.is_trained:
        return 0
    wanted = max(TRAINING_ROWS, ROWS_PER_CENTROID * training_rows_needed(index))
    count = min(wanted, len(store))
    chosen = np.sort(np.random.default_rng(0).choice(len(store), count, replace=False))
    sample, start, filled = np.empty((count, store.dim), np.float32), 0, 0
    for vectors, _ in store.shards():
        rows = chosen[(chosen >= start) & (chosen < start + len(vectors))] - start
        sample[filled : filled + len(rows)] = vectors[rows]
        start, filled = start + len(vectors), filled + len(rows)
    train(index, sample)
    return count


def _add(index: Any, store: EmbeddingStore) -> None:
    with_ids = isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2)
    for vectors, _ in store.shards():
        if with_ids:
            start = index.ntotal
            index.add_with_ids(vectors, np.arange(start, start + len(vectors)))
        else:
            index.add(vectors)


def _write_records(store: EmbeddingStore, file: Path) -> None:
    with pq.ParquetWriter(file, SCHEMA) as writer:
        for _, table in store.shards():
            writer.write_table(table)


def _read_index(file: Path) -> Any:
    try:
        with _allocations_bounded(file.stat().st_size):
            return faiss.read_index(str(file))
    except (RuntimeError, OSError, MemoryError) as error:
        raise ArtifactError(
            f"{file} is no FAISS index that can be read ({_short(error)}); build the index again"
        ) from None


@contextmanager
def _allocations_bounded(size: int) -> Iterator[None]:
    """Let FAISS allocate no vector larger than the file it reads, whatever its header claims."""
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):  # an older FAISS
        yield
        return
    with _reading:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(max(size, 2**26))
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


def _count_records(file: Path) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{file} cannot be read ({_short(error)}); build the index again"
        ) from None


def _unfit(path: Path, found: str, expected: object) -> ArtifactError:
    return ArtifactError(
        f"{path} holds {found}, its manifest says {expected}; build the index again"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).rsplit("failed: ", 1)[-1].split()).rstrip(".")
