"""FAISS on a GPU, if there is one and the extra ``gpu`` is installed.

The CPU does what a GPU cannot: graphs such as HNSW, selectors, an index larger than its memory.
Indexes on disk are the same either way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import faiss as typed_faiss

from clipkit.progress import print_status

# Its stubs are those of the CPU package.
faiss: Any = typed_faiss
MIN_QUERIES = 64
"""Queries after which an index is copied to the GPU; for fewer the copy takes most of the time."""


@cache
def gpu_count() -> int:
    """How many GPUs FAISS can use; warns once if faiss-cpu hides the package for GPUs."""
    if hasattr(faiss, "StandardGpuResources"):
        return int(faiss.get_num_gpus())
    try:
        found = version("faiss-gpu")
    except PackageNotFoundError:
        return 0
    # Both packages install the module faiss, and pip lets the later one overwrite the other.
    print_status(
        f"faiss-gpu {found} is installed, but faiss-cpu overwrote its files, so that no GPU is "
        "used; run: pip install --force-reinstall --no-deps faiss-gpu"
    )
    return 0


def to_gpu(index: Any) -> Any | None:
    """A copy of a FAISS index on the first GPU; None if there is no GPU or it cannot hold it."""
    if not gpu_count():
        return None
    try:
        return faiss.index_cpu_to_gpu(_resources(), 0, index)
    except (RuntimeError, MemoryError):  # some classes do not exist on GPUs
        return None


@contextmanager
def clustering_on_gpu(index: Any) -> Iterator[None]:
    """Let an IVF find its centroids on the GPU, which is most of its training."""
    ivf: Any = faiss.try_extract_index_ivf(index) if gpu_count() else None
    # What FAISS would use itself: lists by inner product, a graph's by L2 distance.
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
