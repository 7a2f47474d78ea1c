"""VectorIndex: FAISS indexes beside their records, searched by inner product.

An index is a directory of segments (see ``segments``) and of ``manifest.json``, which names their
files and holds the FAISS factory string and the search-time knobs. ``IndexWriter`` changes one.

Hit: what a search finds.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipkit.artifacts import MANIFEST, ArtifactWriter, Manifest, ModelRef, read_manifest
from clipkit.errors import ArtifactError
from clipkit.index.build import Built, Rows, cannot_write, write_segment
from clipkit.index.calibration import Calibration
from clipkit.index.faiss_factory import default_knobs, set_knobs
from clipkit.index.search import Chosen, search_segments, split_knobs
from clipkit.index.segments import ID, Segment, parts_of, unfit
from clipkit.store.embedding_store import EXACT, EmbeddingStore
from clipkit.store.shards import Vectors, together


@dataclass(frozen=True)
class Hit:
    """An item found: its key, and its inner product with the query, higher being better.

    ``id`` is the number that the item keeps in its index, whatever becomes of its key;
    ``probability`` tells how likely it is what a caption asked for, where that is known.
    """

    key: str
    score: float
    id: int = field(default=-1, compare=False)
    probability: float | None = field(default=None, compare=False)


ATTEMPTS = 100
"""How often an index that changes while it is opened is opened anew."""


class VectorIndex:
    """A finished index, loaded for searching; it stays as it was when a writer changes the files.

    Attributes:
        path: the directory.
        manifest: what made it, its spec and its search-time knobs.
        segments: its parts; the first is of its spec, the others are exact.
        model: the model whose vectors it holds; queries must come from the same.
        dim: width of its vectors.
    """

    def __init__(self, path: Path, manifest: Manifest, segments: list[Segment]) -> None:
        self.path, self.manifest, self.segments = path, manifest, segments
        self.model = manifest.require_model()
        self.dim = self.model.dim
        self._starts = np.cumsum([0, *(segment.rows for segment in segments)])

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
        source = {**store.manifest.source, "store": str(store.path)}
        write_index(
            store, store.model, path, spec, source, {"decode": store.decode}, replace=replace
        )
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Load a finished index and check that its files belong together.

        A writer may replace the files meanwhile: then it begins again with the new ones.

        Raises:
            ArtifactError: no index, half-written, or its files are damaged, foreign or do not fit.
        """
        path = Path(path)
        for _ in range(ATTEMPTS):
            before = _stamp(path)
            try:
                with _one_directory(path):
                    manifest = read_manifest(path, "index")
                    return cls(path, manifest, _open_segments(path, manifest))
            except _ReplacedError:
                continue
            except ArtifactError:
                if _stamp(path) == before:
                    raise
        raise ArtifactError(f"{path} changed {ATTEMPTS} times while it was opened; try again")

    def renewed(self) -> "VectorIndex":
        """The index as it stands on disk now; what has not changed is not read again."""
        manifest = read_manifest(self.path, "index")
        held = {segment.parts.index: segment for segment in self.segments}
        return VectorIndex(self.path, manifest, _open_segments(self.path, manifest, held))

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def spec(self) -> str:
        """The FAISS factory string it was built with."""
        return str(self.manifest.detail.get("spec"))

    @property
    def decode(self) -> str:
        """How its pictures were read, "exact" or "fast"; one that is searched for is read so."""
        return str(self.manifest.detail.get("decode", EXACT))

    @cached_property
    def calibration(self) -> Calibration | None:
        """How its scores become probabilities; None where that was not found out."""
        raw = self.manifest.detail.get("calibration")
        return None if raw is None else Calibration.from_dict(raw, self.dim)

    def shards(self) -> Iterator[tuple[Vectors, pa.Table]]:
        """Vectors, float32 [m, dim], and records of its rows, a bounded number at a time.

        Raises:
            ArtifactError: it was built by a clipkit that kept no vectors, with a lossy spec.
        """
        for segment in self.segments:
            yield from segment.blocks(segment.live, self.path)

    def records(self) -> pa.Table:
        """All records: key, size in bytes, mtime_ns, captions, label, what else there is, and id.

        They stand in the order in which they were added.
        """
        return together((t for s in self.segments for t in s.tables(s.live)), pa.schema([ID]))

    @cached_property
    def keys(self) -> list[str]:
        """The key of every row, in the order of the records."""
        keys: list[str] = []
        for segment in self.segments:
            live = segment.live
            keys += (
                segment.keys if live is None else segment.keys.filter(pa.array(live))
            ).to_pylist()
        return keys

    def search(self, queries: Vectors, k: int, chosen: Chosen | None = None) -> list[list[Hit]]:
        """The best ``k`` items of each query, best first; fewer where the index holds fewer.

        Args:
            queries: float32 [n, dim], finite.
            k: how many, at least 1.
            chosen: the rows to find, bool [len(self)] in the order of the records; None: all.

        Raises:
            ArtifactError: ``queries`` or ``chosen`` have another shape, or are not finite, or ``k``
                is below 1.
        """
        queries = self._checked(queries)
        if k < 1:
            raise ArtifactError(f"k is {k}, expected at least 1; ask for one hit or more")
        if not len(self) or not len(queries):
            return [[] for _ in queries]
        k = min(k, len(self))
        found = search_segments(self.segments, queries, k, chosen)
        return [self._hits(*pair, k) for pair in zip(*found, strict=True)]

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

    def _hits(self, scores: Vectors, rows: NDArray[np.int64], k: int) -> list[Hit]:
        # Equal scores in row order, so that answers do not depend on how FAISS walked.
        order = np.lexsort((rows, -scores))
        best = [n for n in order if rows[n] >= 0][:k]
        return [self._hit(float(scores[n]), int(rows[n])) for n in best]

    def _hit(self, score: float, place: int) -> Hit:
        segment, row = self.locate(place)
        return Hit(segment.keys[row].as_py(), score, int(segment.ids[row]))

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where each of the records stands, int64 [n], counted over all segments."""
        live = (s.live if s.live is not None else np.ones(s.rows, bool) for s in self.segments)
        return np.flatnonzero(np.concatenate([*live]))

    def locate(self, place: int) -> tuple[Segment, int]:
        """The segment of a place, and the row in it."""
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.segments[number], place - int(self._starts[number])


def write_index(
    rows: Rows,
    model: ModelRef,
    path: str | Path,
    spec: str,
    source: dict[str, Any],
    more: dict[str, Any],
    *,
    next_id: int = 0,
    replace: bool = False,
) -> None:
    """Write a new index of one segment; errors as of ``VectorIndex.build``.

    Args:
        rows: vectors and records.
        model: what encoded them.
        path: where the index shall stand.
        spec: FAISS factory string.
        source: where the rows came from, for the manifest.
        more: what else its ``detail`` shall say.
        next_id: the first id for rows that have none.
        replace: allow a finished index to stand there.
    """
    path = Path(path)
    with ArtifactWriter(path, "index", replace=replace) as artifact:
        built = write_segment(artifact.temp, rows, spec, path, next_id=next_id)
        try:
            detail = {**describe(spec, built), **more}
            artifact.finish(Manifest("index", model, len(rows), source, detail))
        except OSError as error:
            raise cannot_write(path, error) from None


def describe(spec: str, built: Built) -> dict[str, Any]:
    """What the manifest says of an index of one segment."""
    return {
        "spec": spec,
        "search": default_knobs(built.index),
        "trained_on": built.trained_on,
        "generation": 0,
        "next_id": built.next_id,
        "segments": [built.parts.to_dict()],
    }


def _open_segments(
    path: Path, manifest: Manifest, held: dict[str, Segment] | None = None
) -> list[Segment]:
    dim, held = manifest.require_model().dim, held or {}
    segments = [
        held[parts.index].renewed(parts) if parts.index in held else Segment.open(path, parts, dim)
        for parts in parts_of(manifest, path)
    ]
    if not segments or sum(map(len, segments)) != manifest.count:
        raise unfit(path, f"{sum(map(len, segments))} vectors", manifest.count)
    segments[0].refine, knobs = split_knobs(manifest.detail.get("search", {}))
    set_knobs(segments[0].index, knobs)
    return segments


class _ReplacedError(Exception):
    """Another directory was moved to the place of the one being read."""


@contextmanager
def _one_directory(path: Path) -> Iterator[None]:
    """Make sure that all files opened by their path came from one and the same directory."""
    try:
        held = os.open(path, os.O_RDONLY)  # while it is held, its number is given to no other
    except OSError:
        yield  # there is nothing, as reading it will say
        return
    try:
        yield
        if not os.path.exists(path) or not os.path.samestat(os.fstat(held), os.stat(path)):
            raise _ReplacedError
    finally:
        os.close(held)


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes with each state of an index."""
    try:
        status = os.stat(path / MANIFEST)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
