"""The served index: records, images and columns, and reloading after a change."""

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipkit.artifacts import MANIFEST
from clipkit.data.formats.metadata import DAY, INTEGER, NUMBER, OWN, TEXT, TIME, TRUTH, kind_of
from clipkit.data.images import Decode
from clipkit.data.transforms import Pixels
from clipkit.index.filters import FOLDER, folders_of, parse_where
from clipkit.index.hits import Hit
from clipkit.index.roots import Root, roots_of
from clipkit.index.vector_index import VectorIndex
from clipkit.models.encoder import Encoder
from clipkit.models.inference_precision import DEFAULT_PRECISION, Precision
from clipkit.models.loading import load_model_ref
from clipkit.store.shards import Vectors
from clipkit.web.batching import Vector
from clipkit.web.images import IndexImages, decode, read_upload
from clipkit.web.schemas import Column, RequestError

Mask = NDArray[np.bool_]
"""bool [rows], True for rows to search."""
MAX_VALUES = 50
"""A text column with more distinct values gets a text field instead of one control per value."""
MAX_VALUE_LENGTH = 100
_SAMPLED = 20
"""Number of images checked to determine whether the image files of an index exist."""
_KINDS: dict[pa.DataType, Literal["text", "number", "time", "boolean"]] = {
    TEXT: "text",
    INTEGER: "number",
    NUMBER: "number",
    DAY: "time",
    TIME: "time",
    TRUTH: "boolean",
}


class Collection:
    """One state of an index, opened for serving: its encoder, records, columns and images.

    Args:
        index: the index.
        encoder: its model.
        images: folder of the images; None: their location when they were indexed.
    """

    def __init__(self, index: VectorIndex, encoder: Encoder, images: Path | None = None) -> None:
        self.index, self.encoder = index, encoder
        self.keys = index.keys
        self.rows = {key: row for row, key in enumerate(self.keys)}
        self.records: pa.Table = with_folder(index.records()).combine_chunks()
        self.columns = describe_columns(self.records)
        roots = [Root("", str(images.resolve()), True)] if images else roots_of(index.manifest)
        self.images = IndexImages(roots, self._recorded)

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def missing(self) -> str | None:
        """Why none of a few sampled keys has an image; None if at least one has."""
        sample = self.keys[:: max(1, len(self.keys) // _SAMPLED)]
        reasons = [self.images.why_missing(key) for key in sample]
        return None if None in reasons or not reasons else reasons[0]

    def row(self, key: str) -> int:
        """The row of a key; raises RequestError (404) for an unknown key."""
        if key not in self.rows:
            raise RequestError(404, "the index has no image with this key")
        return self.rows[key]

    def select(self, where: str) -> Mask | None:
        """The rows that satisfy a condition; None, meaning all rows, for an empty condition.

        Raises:
            DataError: as for ``index.filters.parse_where``.
        """
        if not where.strip():
            return None
        return parse_where(where, self.records.schema).rows(self.records)

    def search(self, queries: Vectors, k: int, mask: Mask | None = None) -> list[list[Hit]]:
        """The best ``k`` hits of each query, best first.

        Args:
            queries: float32 [n, dim].
            k: number of hits, at least 1.
            mask: bool [rows], the rows to search; None: all.
        """
        return self.index.search_vectors(queries, k, mask)

    def distinct(self, hits: Sequence[Hit]) -> list[Hit]:
        """The hits without near-duplicates of better ones."""
        return self.index.distinct(hits)

    def vector(self, key: str) -> Vector | None:
        """The vector of a key; None if the index does not store exact vectors.

        Raises:
            RequestError: the key is unknown (404).
        """
        segment, row = self.index.locate(int(self.index.places[self.row(key)]))
        return None if segment.vectors is None else np.asarray(segment.vectors[row], np.float32)

    def records_of(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The records of the given keys."""
        rows = pa.array([self.rows[key] for key in keys], pa.int64())
        records: list[dict[str, Any]] = self.records.take(rows).to_pylist()
        return records

    def read(self, key: str) -> Pixels:
        """The image of a key, preprocessed like those of the index.

        Raises:
            RequestError: the file is missing (404) or not an image (415).
        """
        preprocess, mode = self.encoder.preprocess, cast(Decode, self.index.decode)
        image = decode(key, self.images.read(key), preprocess.reduction(mode))
        return preprocess.pixels(image, mode)

    def read_upload(self, data: bytes) -> tuple[Pixels, bytes]:
        """An uploaded image, preprocessed like those of the index, and its thumbnail.

        Raises:
            RequestError: it is not an image (415), or has too many pixels (413).
        """
        preprocess, mode = self.encoder.preprocess, cast(Decode, self.index.decode)
        image, jpeg = read_upload(data, preprocess.reduction(mode))
        return preprocess.pixels(image, mode), jpeg

    def _recorded(self, key: str) -> tuple[int, str | None]:
        row = self.rows[key]
        return self.records["size"][row].as_py(), self.records["content_hash"][row].as_py()


def with_folder(records: pa.Table) -> pa.Table:
    """Add the folder column, which conditions can use, to the records."""
    if FOLDER in records.column_names:
        return records
    return records.append_column(FOLDER, folders_of(records["key"]))


def describe_columns(records: pa.Table) -> list[Column]:
    """Describe the columns that the page offers as filters, with their values or range."""
    names = [name for name in records.column_names if name not in OWN or name == "label"]
    found = (_describe(name, records[name]) for name in names)
    return [column for column in found if column is not None]


def _describe(name: str, data: pa.ChunkedArray) -> Column | None:
    kind = _KINDS.get(kind_of(data.type))
    # The condition syntax cannot express a name with a backquote.
    if kind is None or data.null_count == len(data) or "`" in name:
        return None
    if kind in ("number", "time"):
        ends = pc.min_max(data)
        low, high = str(ends["min"].as_py()), str(ends["max"].as_py())
        return Column(name=name, kind=kind, values=[], min=low, max=high)
    counts = pc.value_counts(data.drop_null().cast(pa.string())).to_pylist()
    if name == FOLDER and len(counts) < 2:
        return None
    short = all(len(item["values"]) <= MAX_VALUE_LENGTH for item in counts)
    few = short and len(counts) <= MAX_VALUES
    values = sorted((item["values"], item["counts"]) for item in counts) if few else []
    return Column(name=name, kind=kind, values=values, min=None, max=None)


class ServedIndex:
    """Holds the current collection, and replaces it when the index changes.

    A request reads ``collection`` once and keeps using it, so that a reload neither delays nor
    breaks requests.

    Args:
        path: directory of the index.
        images: as for ``Collection``.
        encoder: the index's model; None loads the model that its manifest names.
        precision: precision of a model loaded from the manifest; None: the default.
        device: device of a model loaded from the manifest; None: the first GPU, or the CPU.

    Raises:
        ArtifactError: the index does not exist or is damaged.
        ModelError: its model cannot be loaded.
        ModelMismatchError: ``encoder`` is another model than the index's.
    """

    def __init__(
        self,
        path: Path,
        images: Path | None = None,
        encoder: Encoder | None = None,
        precision: Precision | None = None,
        device: str | None = None,
    ) -> None:
        self.path, self._images = path, images
        self._precision, self._device = precision or DEFAULT_PRECISION, device
        self._refreshing = threading.Lock()
        self._state = self._manifest_state()
        index = VectorIndex.open(path, encoder=encoder)  # refuses the wrong model
        self.collection = self._collect(index, encoder)

    def refresh(self) -> bool:
        """Reload the index if its manifest has changed; return whether it has.

        Raises:
            ClipkitError: the new state cannot be opened; the old state stays in use.
        """
        with self._refreshing:
            state = self._manifest_state()
            if state in (None, self._state):  # None: a writer is replacing the index right now
                return False
            index = VectorIndex.open(self.path)
            self.collection = self._collect(index, self.collection.encoder)
            self._state = state
            return True

    def _manifest_state(self) -> tuple[int, int, int] | None:
        try:
            status = (self.path / MANIFEST).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _collect(self, index: VectorIndex, encoder: Encoder | None) -> Collection:
        changed = encoder is not None and encoder.model.fingerprint != index.model.fingerprint
        if encoder is None or (changed and not index.model.external):
            encoder = load_model_ref(
                index.model,
                f"the index {self.path}",
                precision=self._precision,
                device=self._device,
            )
        return Collection(index, encoder, self._images)
