"""FAISS indexes: built from a factory string, given search parameters, and read from files.

A spec such as ``"IVF256,SQ8"`` is FAISS's own language (its wiki, "The index factory"); clipkit
always uses inner products. Impossible specs are refused before any work, and files are read without
trusting their headers.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from clipkit.errors import ArtifactError, SpecError

EXAMPLES = "Flat, SQ8, HNSW32, IVF256,Flat or IVF256,PQ64x4fs,RFlat"
MOST_LISTS, MOST_ELSE = 2**26, 2**16
CENTRING = (faiss.PCAMatrix, faiss.ITQTransform, faiss.CenteringTransform)
TRAINING_ROWS = 2**16
"""Rows that a large store trains on at least; more lists need more."""
ROWS_PER_CENTROID = 64


def new_index(spec: str, dim: int, count: int | None) -> Any:
    """An empty, untrained FAISS index, checked to be possible for this number of vectors.

    Args:
        spec: FAISS factory string.
        dim: width of the vectors.
        count: how many vectors there will be; None if it is not known yet.

    Raises:
        SpecError: malformed, not for inner products, not for this dimension, or too few vectors to
            train on.
    """
    _refuse_numbers(spec, dim)
    try:
        index = faiss.index_factory(dim, spec, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError) as error:
        raise SpecError(explain(spec, dim, error)) from None
    needed = training_rows_needed(index)
    if count is not None and count < needed:
        raise SpecError(
            f"the index spec {spec!r} needs at least {needed} vectors to train on, but there are "
            f"{count}; use a smaller spec, or Flat, which needs none"
        )
    for part in parts(index):
        # FAISS builds some indexes (HNSW over PQ) for L2 whatever metric was asked for.
        if part.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise SpecError(
                f"FAISS builds the index spec {spec!r} for L2 distance only, expected one for "
                f"inner products; use for example {EXAMPLES}"
            )
        # Centred vectors have other inner products: such an index found none of the ten best images
        # for captions on real CLIP vectors.
        if any(isinstance(transform, CENTRING) for transform in _transforms(part)):
            raise SpecError(
                f"the index spec {spec!r} centres the vectors, which preserves only L2 distances, "
                "expected one for inner products; use OPQ or RR in place of PCA or ITQ"
            )
    return index


def _refuse_numbers(spec: str, dim: int) -> None:
    """Refuse numbers that FAISS accepts and then crashes on or fills the memory with."""
    for word, digits in re.findall(r"([A-Za-z]*)(\d+)", spec):
        number, most = int(digits), MOST_LISTS if word == "IVF" else MOST_ELSE
        least = {"IVF": 1, "HNSW": 2}.get(word, 0)
        if not least <= number <= most:
            raise SpecError(
                f"the index spec {spec!r} for vectors of dimension {dim} asks for {word}{digits}, "
                f"expected a number from {least} to {most}; use for example {EXAMPLES}"
            )


def explain(spec: str, dim: int, error: Exception) -> str:
    """One sentence about a spec that FAISS refuses, without its source locations."""
    said = str(error).rsplit("failed: ", 1)[-1] if "failed: " in str(error) else str(error)
    said = re.sub(r"^.*Error: ", "", said.rsplit(".cpp:", 1)[-1].split(": ", 1)[-1], flags=re.S)
    reason = " ".join(said.split()).rstrip(".")
    return (
        f"FAISS cannot build the index spec {spec!r} for vectors of dimension {dim} ({reason}); "
        f"use for example {EXAMPLES}"
    )


def parts(index: Any) -> Iterator[Any]:
    """The index and the indexes inside it, as their own classes."""
    index = faiss.downcast_index(index)
    yield index
    for name in ("index", "base_index", "refine_index", "quantizer", "storage"):
        inner = getattr(index, name, None)
        if inner is not None:
            yield from parts(inner)


def _transforms(part: Any) -> list[Any]:
    if not isinstance(part, faiss.IndexPreTransform):
        return []
    chain: Any = part.chain
    return [faiss.downcast_VectorTransform(chain.at(n)) for n in range(chain.size())]


def training_rows_needed(index: Any) -> int:
    """The fewest vectors that FAISS can train this index on: one for each centroid."""
    needed = 0
    for part in parts(index):
        if not part.is_trained:
            needed = max(needed, 1, getattr(part, "nlist", 0))
            quantizer = getattr(part, "pq", None)
            needed = max(needed, quantizer.ksub if quantizer is not None else 0)
        if any(isinstance(transform, faiss.OPQMatrix) for transform in _transforms(part)):
            needed = max(needed, 256)  # OPQ learns its rotation with an 8-bit PQ, whatever follows
    return needed


def train(index: Any, rows: NDArray[np.float32]) -> None:
    """Train on float32 [n, dim], without FAISS's advice on standard error.

    FAISS advises 39 rows a centroid, once for each of its many clusterings; the index's manifest
    records the number used instead.

    Raises:
        RuntimeError: FAISS cannot train on these rows.
    """
    borrowed: list[Any] = []
    for part in parts(index):
        for name in ("cp", "pq.cp", "rq.cp"):
            with suppress(AttributeError):
                attrgetter(name)(part).min_points_per_centroid = 1
        for transform in _transforms(part):
            if isinstance(transform, faiss.OPQMatrix) and transform.pq is None:
                quantizer: Any = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
                quantizer.cp.min_points_per_centroid = 1
                transform.pq = quantizer
                borrowed.append((transform, quantizer))
    try:
        index.train(rows)
    finally:
        for transform, _ in borrowed:
            transform.pq = None


def default_search_parameters(index: Any) -> dict[str, int]:
    """Search parameters that favour recall, for an index that is not tuned.

    A caption is far from the centroids and graph paths of images, so that FAISS's own defaults find
    little for it. Of the ten best of 2,428 real CLIP image vectors for 1,203 real caption vectors,
    ``nprobe`` finds 12 % at 1 and 92 % at a quarter of 256 lists, ``efSearch`` 52 % at 16 and
    96 % at 256, ``k_factor_rf`` 25 % at 1 and 91 % at 32.
    """
    space = faiss.ParameterSpace()
    core = searched(index)
    space.initialize(core)
    ranges = space.parameter_ranges
    names = {ranges.at(n).name for n in range(ranges.size())}
    nlist = max((part.nlist for part in parts(index) if hasattr(part, "nlist")), default=1)
    nprobe = min(nlist, max(32, nlist // 4))
    wanted = {
        "nprobe": nprobe,
        "efSearch": 256,
        "quantizer_efSearch": 2 * nprobe,
        "k_factor_rf": 32,
    }
    return {name: value for name, value in wanted.items() if name in names}


def set_search_parameters(index: Any, parameters: dict[str, int]) -> None:
    """Apply search parameters.

    Raises:
        SpecError: this index has no such parameter.
    """
    for name, value in parameters.items():
        try:
            faiss.ParameterSpace().set_index_parameter(searched(index), name, value)
        except (RuntimeError, TypeError) as error:
            raise SpecError(
                f"the search parameter {name}={value!r} does not fit this index ({error}); "
                "build the index again"
            ) from None


def searched(index: Any) -> Any:
    """The index inside an ``IDMap``, which hides it from FAISS's ``ParameterSpace``."""
    is_map = isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2)
    return faiss.downcast_index(index.index) if is_map else index


_reading = threading.Lock()


def read_index(file: Path) -> Any:
    """Open a FAISS index, memory-mapped if this FAISS supports it.

    Raises:
        ArtifactError: missing, truncated, or not a FAISS index.
    """
    try:
        with _allocations_bounded(file.stat().st_size):
            # 100,000 vectors of 512 are mapped in 15 ms and read in 170 ms.
            return faiss.read_index(str(file), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
    except (RuntimeError, OSError, MemoryError) as error:
        raise ArtifactError(
            f"cannot read {file} as a FAISS index ({short(error)}); build the index again"
        ) from None


@contextmanager
def _allocations_bounded(size: int) -> Iterator[None]:
    """Keep FAISS from allocating more than the size of the file, whatever its header claims."""
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


def stored_vectors(index: Any) -> NDArray[np.float32] | None:
    """The exact vectors that an index stores, float32 [n, dim]; None if it does not.

    A view, valid as long as ``index`` is.
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
            return stored_vectors(getattr(index, name))
    return None


def short(error: Exception) -> str:
    """An error's message without FAISS's source locations."""
    return " ".join(str(error).rsplit("failed: ", 1)[-1].split()).rstrip(".")
