"""FAISS index files: read without trusting them, and the exact vectors that some of them hold."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from clipkit.errors import ArtifactError

_reading = threading.Lock()


def read_index(file: Path) -> Any:
    """Open a FAISS index to search it, mapped into memory where this FAISS can.

    Raises:
        ArtifactError: it is missing, truncated, or no FAISS index.
    """
    try:
        with _allocations_bounded(file.stat().st_size):
            # 100,000 vectors of 512 are there after 15 ms, and after 170 ms if they are read.
            return faiss.read_index(str(file), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
    except (RuntimeError, OSError, MemoryError) as error:
        raise ArtifactError(
            f"{file} is no FAISS index that can be read ({short(error)}); build the index again"
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


def held_vectors(index: Any) -> NDArray[np.float32] | None:
    """The vectors an index was given, as it holds them, float32 [n, dim]; None if it does not.

    A view: it is valid as long as ``index`` is.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexFlat):
        if not index.ntotal:
            return np.empty((0, index.d), np.float32)
        flat = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
        view: NDArray[np.float32] = flat.reshape(index.ntotal, index.d)
        return view
    for kind, name in (
        ((faiss.IndexIDMap, faiss.IndexIDMap2), "index"),
        (faiss.IndexHNSW, "storage"),
        (faiss.IndexRefine, "refine_index"),
    ):
        if isinstance(index, kind):
            return held_vectors(getattr(index, name))
    return None


def short(error: Exception) -> str:
    """What went wrong, without FAISS's source locations."""
    return " ".join(str(error).rsplit("failed: ", 1)[-1].split()).rstrip(".")
