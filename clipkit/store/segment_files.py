"""The files of a segment, each opened with an error that says which one is damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipkit.errors import ArtifactError

REPAIR = "build the index again"


def unfit(path: Path, found: str, expected: object) -> ArtifactError:
    """The error for files that do not belong to their manifest."""
    return ArtifactError(f"{path} holds {found}, its manifest says {expected}; {REPAIR}")


def check_size(file: Path, expected: int) -> None:
    """Raises ArtifactError where a file is missing or has another size."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise unreadable(file, error) from None
    if size != expected:
        raise ArtifactError(
            f"{file} cannot be read (it has {size} bytes, its manifest says {expected}); {REPAIR}"
        )


def open_records(file: Path) -> pq.ParquetFile:
    """Records, opened; raises ArtifactError."""
    try:
        return pq.ParquetFile(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(file, error) from None


def open_vectors(file: Path) -> NDArray[Any]:
    """Vectors, memory-mapped; raises ArtifactError."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(file, error) from None


def open_bits(file: Path, rows: int) -> NDArray[np.bool_]:
    """One bit a row as bool [rows]; raises ArtifactError."""
    try:
        packed = np.load(file, allow_pickle=False)
        return np.unpackbits(packed, count=rows, bitorder="little").astype(bool)
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: Exception) -> ArtifactError:
    """The error for a file that cannot be read."""
    reason = " ".join(str(error).split()).rstrip(".")
    return ArtifactError(f"{file} cannot be read ({reason}); {REPAIR}")
