"""Merge indexes into one, with unique keys and each image once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipkit.arguments import require_items
from clipkit.errors import ArtifactError
from clipkit.index.roots import (
    Root,
    Scope,
    extended,
    find_scope,
    new_root,
    owner,
    roots_of,
    with_roots,
)
from clipkit.index.segments import ID
from clipkit.index.vector_index import VectorIndex, write_index
from clipkit.store.shards import Vectors

KEPT = ("decode",)
"""Manifest fields that the merged index takes from the first index."""


def merge_indexes(
    paths: Sequence[str | Path], out: str | Path, spec: str | None = None
) -> VectorIndex:
    """Build a new index from all rows of several indexes, which stay unchanged.

    Images of the first index keep their keys and ids. If two indexes contain the same folder, the
    more recently modified version of each image is used. Images of other folders get the folder's
    name as a key prefix.

    Args:
        paths: at least two indexes built with the same model.
        out: directory of the new index.
        spec: FAISS factory string; None uses that of the first index.

    Raises:
        ModelMismatchError: the indexes were built with different models.
        ArtifactError: there are fewer than two indexes, one is damaged, or ``out`` is taken.
        SpecError: the spec is invalid for these vectors.
    """
    paths = require_items("paths", paths, "['index-1', 'index-2']")
    indexes = [VectorIndex.open(path) for path in paths]
    if len(indexes) < 2:
        raise ArtifactError(f"got {len(indexes)} indexes, expected at least two; name another")
    first = indexes[0]
    for other in indexes[1:]:
        first.model.require(
            other.model,
            what=f"the index {first.path}",
            repair=f"rebuild {other.path} with that model",
        )
        decodes = [one.decode for one in (first, other)]
        if decodes[0] != decodes[1]:
            raise ArtifactError(
                f"the images of {first.path} were read with --decode {decodes[0]}, those of "
                f"{other.path} with --decode {decodes[1]}; build one of them again"
            )
    rows = _Merged(indexes)
    source = with_roots(first.manifest.source, rows.roots)
    said = first.manifest.detail
    more = {name: said[name] for name in KEPT if name in said}
    next_id = said.get("next_id", len(first))
    write_index(rows, first.model, out, spec or first.spec, source, more, next_id=next_id)
    return VectorIndex.open(out)


@dataclass
class _Part:
    """One input index: the new keys of its rows, and which rows to use."""

    index: VectorIndex
    keys: list[str]
    times: list[int]
    ids: NDArray[np.int64]
    taken: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.taken = np.ones(len(self.keys), bool)


class _Merged:
    """The rows of the merged index."""

    def __init__(self, indexes: list[VectorIndex]) -> None:
        self.dim = indexes[0].dim
        self.roots = roots_of(indexes[0].manifest)
        self._parts: list[_Part] = []
        self._place: dict[str, tuple[_Part, int]] = {}
        for index in indexes:
            self._admit(index)

    def _admit(self, index: VectorIndex) -> None:
        records = index.records().select(["key", "mtime_ns", ID.name])
        own = roots_of(index.manifest)
        scopes = {root.prefix: self._scope(root) for root in own} if self._parts else {}
        keys = records["key"].to_pylist()
        if scopes:
            keys = [self._rekeyed(key, owner(own, key), scopes) for key in keys]
        ids = records[ID.name].to_numpy() if not self._parts else np.full(len(keys), -1)
        part = _Part(index, keys, records["mtime_ns"].to_pylist(), ids.copy())
        for row, key in enumerate(keys):
            old = self._place.setdefault(key, (part, row))
            if old != (part, row):
                self._choose(key, old, (part, row))
        self._parts.append(part)

    def _choose(self, key: str, old: tuple[_Part, int], new: tuple[_Part, int]) -> None:
        """Use the more recently modified of two rows of an image, with the id of the first."""
        (first, at), (part, row) = old, new
        if (part.times[row] or 0) > (first.times[at] or 0):
            part.ids[row], first.taken[at] = first.ids[at], False
            self._place[key] = new
        else:
            part.taken[row] = False

    def _scope(self, root: Root) -> Scope:
        """Locate a root of a later index within the merged index."""
        scope = find_scope(self.roots, root)
        if scope is None:
            scope = Scope(new_root(self.roots, self._place, root, None))
            self.roots.append(scope.root)
        else:
            scope, self.roots = extended(self.roots, scope, root)
        return scope

    def _rekeyed(self, key: str, root: Root, scopes: dict[str, Scope]) -> str:
        return scopes[root.prefix].key(root.relative(key))

    def __len__(self) -> int:
        return sum(int(part.taken.sum()) for part in self._parts)

    def shards(self) -> Iterator[tuple[Vectors, pa.Table]]:
        """Yield vectors and records in blocks of bounded size."""
        for part in self._parts:
            start = 0
            for vectors, table in part.index.shards():
                stop = start + len(table)
                taken = part.taken[start:stop]
                ids = part.ids[start:stop]
                whole = table.drop_columns(["key", ID.name])
                whole = whole.append_column("key", pa.array(part.keys[start:stop], pa.string()))
                whole = whole.append_column(ID, pa.array(ids, mask=ids < 0))
                yield vectors[taken], whole.filter(pa.array(taken))
                start = stop
