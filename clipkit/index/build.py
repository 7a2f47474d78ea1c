"""Write a segment: train FAISS on a sample, then add vectors and records block by block."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.errors import ArtifactError, SpecError
from clipkit.index.exact import take_rows
from clipkit.index.faiss_factory import (
    ROWS_PER_CENTROID,
    TRAINING_ROWS,
    explain,
    new_index,
    short,
    stored_vectors,
    train,
    training_rows_needed,
)
from clipkit.index.faiss_gpu import clustering_on_gpu
from clipkit.index.segments import ID, Parts
from clipkit.store.shards import Vectors, conform, widened


class Rows(Protocol):
    """The input of a segment: a store, or rows of an index.

    ``shards`` yields vectors, float32 [m, dim], and a table of m records; the same at each call.
    """

    @property
    def dim(self) -> int: ...  # noqa: D102

    def __len__(self) -> int: ...

    def shards(self) -> Iterator[tuple[Vectors, pa.Table]]: ...  # noqa: D102


@dataclass(frozen=True)
class Built:
    """A written segment.

    Attributes:
        parts: its files.
        index: its FAISS index.
        trained_on: number of training vectors.
        next_id: id of the next new row.
    """

    parts: Parts
    index: Any
    trained_on: int
    next_id: int


def write_segment(
    folder: Path, rows: Rows, spec: str, what: Path, *, generation: int = 0, next_id: int = 0
) -> Built:
    """Write the files of a segment.

    Args:
        folder: directory of the files.
        rows: vectors and records; records with an ``id`` keep it.
        spec: FAISS factory string.
        what: the index named in errors.
        generation: number in the file names; 0 for none.
        next_id: the first id for rows without one.

    Raises:
        SpecError: the spec is malformed or invalid for these vectors.
        ArtifactError: the rows are damaged, or the disk is full.
    """
    index = new_index(spec, rows.dim, len(rows))
    suffix = f"-{generation:06d}" if generation else ""
    names = [f"index{suffix}.faiss", f"records{suffix}.parquet"]
    if stored_vectors(index) is None:
        names.append(f"vectors{suffix}.npy")
    try:
        trained_on = _train(index, rows)
        next_id = _pour(rows, index, [folder / name for name in names[1:]], next_id)
    except (RuntimeError, MemoryError) as error:
        raise SpecError(explain(spec, rows.dim, error)) from None
    except OSError as error:
        raise cannot_write(what, error) from None
    try:
        faiss.write_index(index, str(folder / names[0]))
        files = {name: sealed(folder / name) for name in names}
    except (RuntimeError, OSError) as error:
        raise cannot_write(what, error) from None
    plain = names[2] if len(names) > 2 else None
    parts = Parts(len(rows), names[0], names[1], plain, files=files)
    return Built(parts, index, trained_on, next_id)


def sealed(file: Path) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a file."""
    with file.open("rb") as stream:
        return file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()


def cannot_write(path: Path, error: Exception) -> ArtifactError:
    """Build the error for an index that cannot be written."""
    return ArtifactError(
        f"{path} cannot be written ({short(error)}); make room on that disk and run the same "
        "command again"
    )


def _train(index: Any, rows: Rows) -> int:
    """Train on a bounded sample spread over all rows; return the sample size."""
    if index.is_trained:
        return 0
    wanted = max(TRAINING_ROWS, ROWS_PER_CENTROID * training_rows_needed(index))
    count = min(wanted, len(rows))
    chosen = np.sort(np.random.default_rng(0).choice(len(rows), count, replace=False))
    sample = take_rows((vectors for vectors, _ in rows.shards()), chosen)
    with clustering_on_gpu(index):
        train(index, sample)
    return count


def _pour(rows: Rows, index: Any, files: list[Path], next_id: int) -> int:
    """Add all rows to the index, and write records and vectors to files; return the next id."""
    with_ids = isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2)
    schema = widened(*(table.schema for _, table in rows.shards()), pa.schema([ID]))
    with ExitStack() as stack:
        records = stack.enter_context(pq.ParquetWriter(files[0], schema))
        # Not a memory map: if the disk is full, writing to one kills the process.
        plain = stack.enter_context(files[1].open("wb")) if len(files) > 1 else None
        if plain is not None:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), rows.dim)}
            np.lib.format.write_array_header_1_0(plain, header)
        for vectors, table in rows.shards():
            if with_ids:
                start = index.ntotal
                index.add_with_ids(vectors, np.arange(start, start + len(vectors)))
            else:
                index.add(vectors)
            if plain is not None:
                plain.write(np.ascontiguousarray(vectors, "<f4").data)
            whole, next_id = _numbered(conform(table, schema), next_id)
            records.write_table(whole)
    return next_id


def _numbered(table: pa.Table, next_id: int) -> tuple[pa.Table, int]:
    """Assign ids to rows that have none; return the table and the next id."""
    ids = table[ID.name]
    missing = np.asarray(ids.is_null())
    numbers = ids.fill_null(0).to_numpy().copy()
    numbers[missing] = np.arange(next_id, next_id + missing.sum())
    at = table.column_names.index(ID.name)
    return table.set_column(at, ID, pa.array(numbers)), next_id + int(missing.sum())
