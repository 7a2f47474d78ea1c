"""A collection: an index opened for being shown, and the newer one that takes its place."""

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from clipkit.artifacts import MANIFEST
from clipkit.data.images import Decode, read_image
from clipkit.data.transforms import Pixels
from clipkit.index.roots import Root, roots_of
from clipkit.index.vector_index import Hit, VectorIndex
from clipkit.models.encoder import Encoder
from clipkit.models.inference_precision import DEFAULT_PRECISION, Precision
from clipkit.models.loading import load_model_ref
from clipkit.store.shards import Vectors
from clipkit.web.batching import Vector
from clipkit.web.filters import Column, Rows, find_columns, with_folder
from clipkit.web.images import Facts, PictureFiles, read_upload, readable
from clipkit.web.security import RequestError

_LOOKED_AT = 20
"""Pictures that are looked for to learn whether an index has any."""


class Collection:
    """An index, the model that made it, its records by key, and its picture files.

    Args:
        index: what is searched.
        encoder: its model.
        images: the folder of the pictures; None: where they were when they were indexed.
    """

    def __init__(self, index: VectorIndex, encoder: Encoder, images: Path | None = None) -> None:
        self.index, self.encoder = index, encoder
        self.keys = index.keys
        self.rows = {key: row for row, key in enumerate(self.keys)}
        self.records: pa.Table = with_folder(index.records()).combine_chunks()
        self.columns: list[Column] = find_columns(self.records)
        roots = [Root("", str(images.resolve()), True)] if images else roots_of(index.manifest)
        self.files = PictureFiles(roots, self._facts)

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def missing(self) -> str | None:
        """Why none of a few keys, spread over the index, has a picture; None where one has."""
        some = self.keys[:: max(1, len(self.keys) // _LOOKED_AT)]
        reasons = [self.files.missing(key) for key in some]
        return None if None in reasons or not reasons else reasons[0]

    def row(self, key: str) -> int:
        """The row of a key; raises RequestError (404) where the index has none such."""
        if key not in self.rows:
            raise RequestError(404, "the index has no picture of this key")
        return self.rows[key]

    def vector(self, key: str) -> Vector | None:
        """The vector of a key as it was encoded; None where the index keeps only a lossy one.

        Raises:
            RequestError: the index has no such key (404).
        """
        segment, row = self.index.locate(int(self.index.places[self.row(key)]))
        return None if segment.vectors is None else np.asarray(segment.vectors[row], np.float32)

    def probabilities(self, query: Vector, hits: Sequence[Hit]) -> list[float] | None:
        """The probability that each hit is what a caption tells of; None where that is not known.

        Args:
            query: float32 [dim], the caption's vector.
            hits: of it.
        """
        calibration = self.index.calibration
        scores = np.array([hit.score for hit in hits], np.float32)
        found = calibration.probabilities(query, scores) if calibration else None
        return None if found is None else found.tolist()

    def _facts(self, key: str) -> Facts:
        """What the index says of a picture's content."""
        row = self.rows[key]
        return self.records["size"][row].as_py(), self.records["content_hash"][row].as_py()

    def read(self, key: str) -> Pixels:
        """The picture of a key, ready for the model, read as those of the index were.

        Raises:
            RequestError: its file is not there (404) or no picture (415).
        """
        preprocess, decode = self.encoder.preprocess, cast(Decode, self.index.decode)
        data = self.files.read(key)
        picture = readable(key, lambda: read_image(data, preprocess.reduction(decode)))
        return preprocess.pixels(picture, decode)

    def read_upload(self, data: bytes) -> tuple[Pixels, bytes]:
        """The same of a picture that was handed in, and a thumbnail of it, a JPEG.

        Raises:
            RequestError: it is no picture (415), or has too many pixels (413).
        """
        preprocess, decode = self.encoder.preprocess, cast(Decode, self.index.decode)
        picture, jpeg = read_upload(data, preprocess.reduction(decode))
        return preprocess.pixels(picture, decode), jpeg

    def described(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The records of some keys, as plain data."""
        rows = pa.array([self.rows[key] for key in keys], pa.int64())
        described: list[dict[str, Any]] = self.records.take(rows).to_pylist()
        return described

    def search(self, queries: Vectors, k: int, rows: Rows | None = None) -> list[list[Hit]]:
        """The best ``k`` hits of each query among some rows, best first.

        Args:
            queries: float32 [n, dim].
            k: how many, at least 1.
            rows: those that may be found; None: all.
        """
        return self.index.search(queries, k, rows)


class Current:
    """The collection that is served now; it is replaced as a whole, so that no request waits.

    A request takes ``collection`` once and keeps to it.

    Args:
        path: the directory of the index.
        images: as for ``Collection``.
        encoder: the index's model; loaded from its manifest where None.
        precision: as of ``load_model_ref``, for models that are loaded; None: its default.

    Raises:
        ArtifactError: no index, or a damaged one.
        ModelError: its model cannot be loaded.
    """

    def __init__(
        self,
        path: Path,
        images: Path | None = None,
        encoder: Encoder | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.path, self._images = path, images
        self._precision = precision or DEFAULT_PRECISION
        self._refreshing = threading.Lock()
        self._stamp = self._look()
        self.collection = self._open(encoder)

    def refresh(self) -> bool:
        """Open the index again if its manifest is another one by now; whether it was.

        Raises:
            ClipkitError: the new state cannot be opened; the old one stays.
        """
        with self._refreshing:
            stamp = self._look()
            if stamp in (None, self._stamp):  # None: it is being replaced this very moment
                return False
            self.collection = self._open(self.collection.encoder)
            self._stamp = stamp
            return True

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = (self.path / MANIFEST).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _open(self, encoder: Encoder | None) -> Collection:
        index = VectorIndex.open(self.path)
        if encoder is None or encoder.model.fingerprint != index.model.fingerprint:
            encoder = load_model_ref(
                index.model, f"the index {self.path}", precision=self._precision
            )
        return Collection(index, encoder, self._images)
