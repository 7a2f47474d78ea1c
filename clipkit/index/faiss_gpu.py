"""A card for FAISS, used where there is one; the extra ``gpu`` brings a FAISS that can use it.

What a card cannot do (graphs such as HNSW, selectors, an index larger than its memory) the CPU
does, as without one. Indexes on disk are the same either way.
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
ENOUGH = 64
"""Queries after which an index is copied to the card; for fewer the copy would cost the most."""


@cache
def cards() -> int:
    """How many cards FAISS can use; says so once where the package for them is covered up."""
    if hasattr(faiss, "StandardGpuResources"):
        return int(faiss.get_num_gpus())
    try:
        found = version("faiss-gpu")
    except PackageNotFoundError:
        return 0
    # Both packages are the module faiss, and pip lets the one that comes last write over the other.
    print_status(
        f"faiss-gpu {found} is installed, but the files of faiss-cpu lie over it, so that no card "
        "is used; mend it with: pip install --force-reinstall --no-deps faiss-gpu"
    )
    return 0


def to_card(index: Any) -> Any | None:
    """A copy of a FAISS index on the first card; None where there is none or it cannot hold it."""
    if not cards():
        return None
    try:
        return faiss.index_cpu_to_gpu(_resources(), 0, index)
    except (RuntimeError, MemoryError):  # not every class has its like on a card
        return None


@contextmanager
def clustering_on_card(index: Any) -> Iterator[None]:
    """Let an IVF find its cells on the card, which is most of its training."""
    ivf: Any = faiss.try_extract_index_ivf(index) if cards() else None
    # What FAISS would search with itself: cells are by inner product, a graph's by L2 distance.
    wanted = {"\0": faiss.IndexFlatIP, "\2": faiss.IndexFlatL2}
    kind = wanted.get(ivf.quantizer_trains_alone) if ivf is not None else None
    helper = None if kind is None else to_card(kind(ivf.d))
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
