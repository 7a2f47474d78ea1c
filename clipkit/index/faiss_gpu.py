"""FAISS on a GPU, if one is available and the extra ``gpu`` is installed.

FAISS falls back to the CPU for features that its GPU indexes lack: graphs such as HNSW, selectors,
and indexes larger than GPU memory. Index files are identical on both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import faiss as typed_faiss

from clipkit.progress import print_status

# The type stubs describe the CPU package.
faiss: Any = typed_faiss
MIN_QUERIES = 64
"""Minimum number of queries to copy an index to the GPU; with fewer, the copy takes longest."""


@cache
def gpu_count() -> int:
    """Number of GPUs that FAISS can use; warns once if faiss-cpu has overwritten faiss-gpu."""
    if hasattr(faiss, "StandardGpuResources"):
        return int(faiss.get_num_gpus())
    try:
        found = version("faiss-gpu")
    except PackageNotFoundError:
        return 0
    # Both packages install the module faiss; pip lets the later one overwrite the earlier.
    print_status(
        f"faiss-gpu {found} is installed, but faiss-cpu overwrote its files and FAISS uses no "
        "GPU; run: pip install --force-reinstall --no-deps faiss-gpu"
    )
    return 0


def to_gpu(index: Any) -> Any | None:
    """Copy a FAISS index to the first GPU; None if there is no GPU or the index does not fit."""
    if not gpu_count():
        return None
    try:
        return faiss.index_cpu_to_gpu(_resources(), 0, index)
    except (RuntimeError, MemoryError):  # some index types have no GPU version
        return None


@contextmanager
def clustering_on_gpu(index: Any) -> Iterator[None]:
    """Train the centroids of an IVF index, most of its training time, on the GPU."""
    ivf: Any = faiss.try_extract_index_ivf(index) if gpu_count() else None
    # Same metrics as FAISS on the CPU: inner product for lists, L2 distance for a graph.
    wanted = {"\0": faiss.IndexFlatIP, "\2": faiss.IndexFlatL2}
    kind = wanted.get(ivf.quantizer_trains_alone) if ivf is not None else None
    helper = None if kind is None else to_gpu(kind(ivf.d))
    if helper is None:
        yield
        return
    ivf.clustering_index = helper
    try:
        yield
    finally:
        ivf.clustering_index = None


@cache
def _resources() -> Any:
    return faiss.StandardGpuResources()
