"""EmbeddingStore: the vectors of images on disk, beside their records.

A store is a directory of shards, ``vectors-00000.npy`` beside ``records-00000.parquet`` in the same
row order, with ``skipped.jsonl`` (skipped items and the reasons) and ``manifest.json``. An
interrupted writer continues after the last complete shard; ``partial.json`` in a half-written store
names the model and the image decoder that it belongs to.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipkit.artifacts import (
    ArtifactWriter,
    Manifest,
    ModelRef,
    is_complete,
    partial_path,
    read_manifest,
    write_json,
)
from clipkit.errors import ArtifactError, DataError, ModelMismatchError
from clipkit.shapes import Float32, Shaped
from clipkit.store.shards import (
    Record,
    ShardWriter,
    Vectors,
    as_table,
    check_vectors,
    digest,
    read_shard,
    remove_shard,
    shard_names,
    shard_numbers,
    together,
    write_shard,
)

OWNER = "partial.json"
EXACT = "exact"
"""The decoder of stores that name none."""


@dataclass(frozen=True)
class Owner:
    """What all vectors of a store have in common.

    Attributes:
        model: the model that encodes them.
        decode: how their images are read, "exact" or "fast".
    """

    model: ModelRef
    decode: str

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The owner of the half-written store in ``folder``; None if it names none."""
        try:
            found = json.loads((folder / OWNER).read_text(encoding="utf-8"))
            return cls(ModelRef(**found["model"]), found.get("decode", EXACT))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Name this owner in the half-written store in ``folder``."""
        write_json(folder / OWNER, asdict(self))

    def require(self, other: Self, folder: Path) -> None:
        """Refuse to continue the store in ``folder``, of this owner, as another one.

        Raises:
            ModelMismatchError: another model started it.
            ArtifactError: its images were read with another decoder.
        """
        if self.model.fingerprint != other.model.fingerprint:
            raise ModelMismatchError(
                f"{folder} is a half-written store of {self.model}, but the model at hand is "
                f"{other.model}; continue with that model or remove the directory"
            )
        require_decode(f"{folder} is a half-written store", self.decode, other.decode)


def require_decode(what: str, found: str, asked: str) -> None:
    """Refuse to mix images of two decoders; raises ArtifactError."""
    if found != asked:
        raise ArtifactError(
            f"{what} made with --decode {found}, asked for is {asked}; leave --decode out, or name "
            "another place with --out"
        )


def decode_of(path: Path) -> str | None:
    """How images of the store at ``path`` were read, half-written or finished; None: no store."""
    owner = Owner.read(partial_path(path))
    if owner is not None:
        return owner.decode
    if is_complete(path):
        return str(read_manifest(path, "store").detail.get("decode", EXACT))
    return None


_SKIPPED = "skipped.jsonl"


class EmbeddingStore:
    """A finished store: vectors are memory-mapped, records are read on demand.

    Attributes:
        path: the directory.
        manifest: its model and its source.
        model: the model that encoded it.
        dim: width of its vectors.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.model = manifest.require_model()
        self.dim = self.model.dim

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a finished store; only its manifest and its file names are read.

        Raises:
            ArtifactError: not a store, half-written, or shards are missing.
        """
        path = Path(path)
        store = cls(path, read_manifest(path, "store"))
        found, expected = len(shard_numbers(path)), store.manifest.detail.get("shards")
        if found != expected:
            raise ArtifactError(
                f"{path} holds {found} shards of vectors, its manifest says {expected}; "
                "remove the store and embed again"
            )
        return store

    @staticmethod
    def create(
        path: str | Path,
        model: ModelRef,
        *,
        decode: str = EXACT,
        shard_size: int = 4096,
        replace: bool = False,
    ) -> "StoreWriter":
        """Start a store, or continue the half-written one at ``path``.

        Args:
            path: directory of the store.
            model: the model that encodes it.
            decode: how its images are read, "exact" or "fast".
            shard_size: rows of a shard; a crash can lose the open one and the one being written.
            replace: allow a finished store there; it is replaced once the new one is complete.

        Raises:
            ArtifactError: ``path`` is taken, another process writes there, or the half-written
                store uses another decoder.
            ModelMismatchError: another model started the half-written store.
        """
        return StoreWriter(Path(path), model, decode, shard_size, replace)

    @classmethod
    def from_vectors(
        cls,
        vectors: Shaped[NDArray[Any], "n dim"],
        keys: Sequence[str],
        path: str | Path,
        *,
        metadata: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | None = None,
        model: ModelRef | None = None,
    ) -> "EmbeddingStore":
        """Write a store of vectors that were computed elsewhere.

        Args:
            vectors: numbers [n, dim]; rows are scaled to unit length.
            keys: n different names.
            path: directory of the store.
            metadata: further columns: a mapping or data frame of columns, or one mapping a row.
                ``captions`` and ``label`` are known names.
            model: the model that encoded the vectors; None marks their origin as external.

        Raises:
            DataError: shapes that do not fit, repeated keys, or vectors without a direction.
            ArtifactError: ``path`` is taken, or the disk is full.
        """
        rows = ExternalVectors.of(vectors, keys, metadata, model)
        with cls.create(path, rows.model) as writer:
            for part, table in rows.shards():
                writer.append(part, table.to_pylist())
            return writer.finish(rows.source)

    @property
    def decode(self) -> str:
        """How its images were read: "exact" or "fast"."""
        return str(self.manifest.detail.get("decode", EXACT))

    def __repr__(self) -> str:
        return f"EmbeddingStore({str(self.path)!r}, {len(self):,} vectors of {self.model})"

    def __len__(self) -> int:
        return self.manifest.count

    def shards(self) -> Iterator[tuple[Vectors, pa.Table]]:
        """Each shard's vectors, memory-mapped float32 [m, dim], and its records, a table of m rows.

        Raises:
            ArtifactError: a shard is damaged, or the rows are not as many as the manifest says.
        """
        rows = 0
        for number in shard_numbers(self.path):
            vectors, table = read_shard(self.path, number, self.dim)
            rows += len(vectors)
            yield vectors, table
        if rows != len(self):
            raise ArtifactError(
                f"{self.path} holds {rows} rows, its manifest says {len(self)}; "
                "remove the store and embed again"
            )

    def vectors(self) -> Float32[NDArray[np.float32], "n {self.dim}"]:
        """All vectors in memory, float32 [n, dim]."""
        empty = np.empty((0, self.dim), np.float32)
        return np.concatenate([empty, *(vectors for vectors, _ in self.shards())])

    def records(self) -> pa.Table:
        """All records: key, size in bytes, mtime_ns, captions, label, content_hash, metadata."""
        return together(table for _, table in self.shards())

    @property
    def keys(self) -> list[str]:
        """The key of every row, in row order."""
        keys: list[str] = self.records()["key"].to_pylist()
        return keys

    def skipped(self) -> Iterator[tuple[str, str]]:
        """Key and reason of every skipped item."""
        with (self.path / _SKIPPED).open(encoding="utf-8") as lines:
            for line in lines:
                item = json.loads(line)
                yield item["key"], item["reason"]


class StoreWriter:
    """Writes a store shard by shard; use it in a ``with`` statement.

    After an exception the complete shards stay, and the next writer of the same model continues.

    Attributes:
        done: the keys already written, each with the ``digest`` of its record.
    """

    def __init__(
        self, path: Path, model: ModelRef, decode: str, shard_size: int, replace: bool
    ) -> None:
        self.owner, self.shard_size = Owner(model, decode), shard_size
        self.done: dict[str, int] = {}
        self._stale: set[int] = set()
        self._skips = 0
        self._finished = False
        self._artifact = ArtifactWriter(path, "store", replace=replace, resume=True)
        self.path, self.temp = self._artifact.path, self._artifact.temp
        try:
            self._resume()
            self._skipped = (self.temp / _SKIPPED).open("w", encoding="utf-8")
        except (ArtifactError, OSError) as error:
            self._artifact.__exit__(None, None, None)
            if isinstance(error, OSError):
                raise _cannot_write(path, error) from None
            raise

    def _resume(self) -> None:
        """Keep the intact shards of an interrupted writer of this model; delete the rest."""
        owner = Owner.read(self.temp)
        if owner:
            owner.require(self.owner, self.temp)
        sound: list[int] = []
        for number in shard_numbers(self.temp) if owner else []:
            try:
                _, table = read_shard(self.temp, number, self.owner.model.dim)
            except ArtifactError:
                break
            for record in table.to_pylist():
                # A key comes twice if the interrupted writer replaced an outdated row.
                if record["key"] in self.done:
                    self.forget(record["key"])
                self.done[record["key"]] = digest(record)
            sound.append(number)
        _clear(self.temp, keep={OWNER, *(name for n in sound for name in shard_names(n))})
        self.owner.write(self.temp)
        self._shards = ShardWriter(self.temp, sound[-1] + 1 if sound else 0)

    def __enter__(self) -> Self:
        return self

    def append(self, vectors: Vectors, records: list[Record]) -> None:
        """Add rows: float32 [m, dim] of unit length, and m records.

        Raises:
            ArtifactError: wrong shape or type, not finite, not of unit length, a key that is
                already stored, or a shard cannot be written.
        """
        vectors = np.asarray(vectors)
        check_vectors(vectors, records, self.owner.model.dim)
        for record in records:
            if record["key"] in self.done:
                raise ArtifactError(
                    f"the key {record['key']!r} is already in {self.path}; give each item one key"
                )
            self.done[record["key"]] = digest(record)
        try:
            self._shards.append(vectors, records, self.shard_size)
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def skip(self, key: str, reason: str) -> None:
        """Record a skipped item and the reason."""
        # ASCII escapes also carry file names that are not UTF-8.
        self._skipped.write(json.dumps({"key": key, "reason": reason}) + "\n")
        self._skips += 1

    def forget(self, key: str) -> None:
        """Drop a row of an earlier run, because its item has changed or is gone."""
        self._stale.add(self.done.pop(key))

    def _drop_stale(self) -> None:
        for number in shard_numbers(self.temp) if self._stale else []:
            vectors, table = read_shard(self.temp, number, self.owner.model.dim)
            keep = [digest(record) not in self._stale for record in table.to_pylist()]
            if not any(keep):
                remove_shard(self.temp, number)
            elif not all(keep):
                write_shard(self.temp, number, np.array(vectors[keep]), table.filter(keep))

    def finish(self, source: dict[str, Any]) -> EmbeddingStore:
        """Write what is buffered, move the store into place and open it.

        Args:
            source: where the content came from, for the manifest.
        """
        try:
            self._shards.flush()
            self._drop_stale()
            shards = len(shard_numbers(self.temp))
            detail = {"shards": shards, "skipped": self._skips, "decode": self.owner.decode}
            self._skipped.close()
            self._artifact.finish(
                Manifest("store", self.owner.model, len(self.done), source=source, detail=detail)
            )
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        # Only now: until the move is done, a resuming writer needs it.
        (self.path / OWNER).unlink(missing_ok=True)
        self._finished = True
        return EmbeddingStore.open(self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            # An orderly end, also Ctrl-C, writes even the open shard; a full disk may prevent it.
            for end in (self._shards.flush, self._skipped.close):
                with suppress(OSError):
                    end()
            if not shard_numbers(self.temp):
                shutil.rmtree(self.temp, ignore_errors=True)
        self._shards.close()
        self._artifact.__exit__(kind, error, trace)


def _clear(folder: Path, keep: set[str]) -> None:
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink()


def _cannot_write(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be written ({error.strerror or error}); make room on that disk and run "
        "the same command again, finished shards are kept"
    )


@dataclass(frozen=True)
class ExternalVectors:
    """Vectors that were computed outside clipkit, as the rows of a store or an index.

    Attributes:
        vectors: float32 [n, dim], rows of unit length.
        table: their records.
        model: what encoded them.
    """

    vectors: Float32[NDArray[np.float32], "n dim"]
    table: pa.Table
    model: ModelRef

    @classmethod
    def of(
        cls,
        vectors: NDArray[Any],
        keys: Sequence[str],
        metadata: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | None,
        model: ModelRef | None,
    ) -> Self:
        """Check and scale vectors; arguments and errors as of ``EmbeddingStore.from_vectors``."""
        given = np.asarray(vectors)
        if given.dtype.kind not in "fiu":
            raise TypeError(f"the vectors are of {given.dtype}, expected real numbers [n, dim]")
        rows = np.array(given, np.float32)
        if rows.ndim != 2 or not rows.shape[1]:
            raise DataError(f"the vectors have shape {list(rows.shape)}, expected [n, dim]")
        if isinstance(keys, str):
            raise TypeError("keys is a str, expected a sequence of str, one for each vector")
        names = list(keys)
        if len(names) != len(rows):
            raise DataError(
                f"there are {len(names)} keys for {len(rows)} vectors, expected as many"
            )
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"the key {name!r} has type {type(name).__name__}, expected str")
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise DataError(
                f"the key {twice!r} is repeated, expected a different key for each vector"
            )
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
        if len(bad):
            raise DataError(
                f"the vector of {names[bad[0]]!r} has length {lengths[bad[0], 0]:.4g}, expected a "
                "finite length above 0; remove it"
            )
        if model is not None and not isinstance(model, ModelRef):
            raise TypeError(
                f"model is a {type(model).__name__}, expected a ModelRef, as encoder.model is"
            )
        if model is not None and model.dim != rows.shape[1]:
            raise DataError(
                f"the vectors have dimension {rows.shape[1]}, but those of {model} have {model.dim}"
            )
        columns = _metadata_columns(metadata, len(rows))
        fixed = {"size": 0, "mtime_ns": 0, "captions": [], "label": None, "content_hash": None}
        records = [
            {**fixed, "key": key, **{name: values[row] for name, values in columns.items()}}
            for row, key in enumerate(names)
        ]
        return cls(rows / lengths, as_table(records), model or ModelRef.of_external(rows.shape[1]))

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.vectors.shape[1])

    @property
    def source(self) -> dict[str, Any]:
        """Their origin, for a manifest."""
        return {"kind": "external", "origin": "external"}

    def __len__(self) -> int:
        return len(self.vectors)

    def shards(self) -> Iterator[tuple[Vectors, pa.Table]]:
        """Vectors and records, a bounded number at a time."""
        for start in range(0, len(self), _BLOCK):
            part = self.vectors[start : start + _BLOCK]
            yield part, self.table.slice(start, len(part))


_BLOCK = 2**14
"""Rows of external vectors that are handed on at once."""


def _metadata_columns(
    metadata: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | None, count: int
) -> dict[str, list[Any]]:
    """Columns of metadata, each of ``count`` values; captions as lists of texts."""
    if metadata is None:
        return {}
    if isinstance(metadata, Sequence):
        names = {name: None for row in metadata for name in row}
        columns = {str(name): [row.get(name) for row in metadata] for name in names}
    else:  # a mapping, or a pandas data frame, which iterates over its columns as well
        columns = {str(name): list(metadata[name]) for name in metadata}
    for name, values in columns.items():
        if isinstance(metadata, Mapping) and isinstance(metadata[name], str | bytes):
            raise TypeError(f"the metadata column {name!r} is one string, expected a list")
        if len(values) != count:
            raise DataError(
                f"the metadata column {name!r} has {len(values)} values, expected {count}, one for "
                "each vector"
            )
        if name in ("key", "size", "mtime_ns", "content_hash", "id"):
            raise DataError(f"a metadata column is named {name!r}, which is reserved; rename it")
        # NumPy's scalars are no values of Arrow's when they are mixed with others.
        columns[name] = [
            value.item() if isinstance(value, np.generic) else value for value in values
        ]
    captions = columns.get("captions", [])
    if captions:
        columns["captions"] = [[c] if isinstance(c, str) else list(c or ()) for c in captions]
    return columns


def open_store(path: str | Path) -> EmbeddingStore:
    """Open an embedding store; errors as of ``EmbeddingStore.open``."""
    return EmbeddingStore.open(path)
