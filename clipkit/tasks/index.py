"""Build, calibrate and maintain indexes: ``clipkit index build|remove|compact|calibrate``."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipkit.arguments import require_items
from clipkit.artifacts import (
    MANIFEST,
    ArtifactWriter,
    is_complete,
    partial_path,
    read_manifest,
    write_json,
)
from clipkit.data.images import Decode
from clipkit.data.source import Data, Source
from clipkit.errors import ArtifactError
from clipkit.index.calibration import Calibration, calibrate
from clipkit.index.faiss_factory import new_index
from clipkit.index.sample_queries import (
    SampleQueries,
    encode_sample_queries,
    write_sample_queries,
)
from clipkit.index.tuning import AUTO, Measured, TuningTarget, build_tuned, remeasure
from clipkit.index.vector_index import VectorIndex, load_text_encoder
from clipkit.index.writer import IndexWriter
from clipkit.store.embedding_store import EmbeddingStore
from clipkit.store.shards import shard_numbers

if TYPE_CHECKING:
    from clipkit.models.encoder import BatchSize, Encoder
    from clipkit.models.text_encoder_numpy import QueryEncoder


def remove_items(index: str | Path | VectorIndex, names: str | Sequence[str]) -> list[str]:
    """Remove items from an index, all of them or none.

    Args:
        index: the index, or its directory.
        names: keys, or patterns such as ``holiday/*``, in which ``*`` also matches slashes.

    Returns:
        The keys that were removed, in the index's order.

    Raises:
        ArtifactError: a key is unknown, a pattern has no match, or another process is writing.
    """
    names = [names] if isinstance(names, str) else require_items("names", names, "['a.jpg']")
    with IndexWriter(index) as writer:
        keys = writer.index.keys
        indexed, chosen = set(keys), set()
        for name in names:
            if name in indexed or not any(sign in name for sign in "*?["):
                chosen.add(name)
                continue
            fitting = {key for key in keys if fnmatchcase(key, name)}
            if not fitting:
                raise ArtifactError(
                    f"no key of {writer.path} matches the pattern {name!r}, nothing was removed; "
                    "`clipkit search INDEX` shows the keys"
                )
            chosen |= fitting
        writer.remove(sorted(chosen))
        writer.commit()
    return [key for key in keys if key in chosen]


def compact_index(index: str | Path | VectorIndex) -> VectorIndex:
    """Retrain and rebuild an index as a single segment, without removed rows.

    Raises:
        ArtifactError: the index is damaged, another process is writing it, or the disk is full.
        SpecError: too few items are left to train its spec on.
    """
    with IndexWriter(index) as writer:
        return writer.commit(compact=True)


TARGET = TuningTarget()


def build_index(
    data: Data | EmbeddingStore,
    out: str | Path,
    encoder: "Encoder | None" = None,
    *,
    spec: str = "Flat",
    target: TuningTarget = TARGET,
    decode: Decode | None = None,
    batch_size: "BatchSize" = "auto",
    workers: int | str = "auto",
) -> VectorIndex:
    """Build an index of a store, or of images, which are first embedded into ``OUT.store``.

    An existing index at ``out`` is replaced atomically once the new one is complete.

    Args:
        data: a store, or anything that ``open_source`` accepts.
        out: directory of the index.
        encoder: encodes images, and the query texts for ``"auto"``; None loads the store's model,
            or the default model for images.
        spec: FAISS factory string; ``"auto"`` chooses one and its search parameters by the measured
            recall of text queries.
        target: the recall and memory that ``"auto"`` aims at.
        decode: how images are read, as of ``embed``; ignored for a store.
        batch_size: images encoded at once, as of ``embed``; ignored for a store.
        workers: decoding threads, as of ``embed``; ignored for a store.

    Raises:
        SpecError: the spec is malformed, invalid for these vectors, or exceeds the memory limit.
        ArtifactError: ``out`` exists and is not an index, or the store is damaged.
        ModelError: the model cannot be loaded.
        ModelMismatchError: ``encoder`` is not the model of the store.
        DataError: the images cannot be opened, or too many are unreadable.
    """
    out = Path(out)
    store = _as_store(data)
    if store is None:
        from clipkit.tasks.embed import default_encoder, embed

        assert not isinstance(data, EmbeddingStore)
        source = _open_source(data)
        encoder = encoder or default_encoder(store_beside(out))
        # Refuse now what can be refused, not after hours of encoding.
        if spec != AUTO:
            new_index(spec, encoder.dim, source.count)
        with ArtifactWriter(out, "index", replace=True):
            pass
        store = embed(
            source,
            store_beside(out),
            encoder,
            decode=decode,
            batch_size=batch_size,
            workers=workers,
        )
    elif encoder is not None and not store.model.external:
        what, repair = f"the store {store.path}", "use its own model, or embed the images again"
        store.model.require(encoder.model, what=what, repair=repair)
    if spec == AUTO and not len(store):
        spec = "Flat"  # no queries to measure with
    if spec != AUTO:
        index = VectorIndex.build(store, out, spec, replace=True)
    else:
        text_encoder = encoder or load_text_encoder(store.model, f"the store {store.path}")
        tables = (table for _, table in store.shards())
        queries = encode_sample_queries(tables, text_encoder.encode_text)
        build_tuned(store, out, queries, target, replace=True)
        write_calibration(out, queries)
        index = VectorIndex.open(out)
    return index if encoder is None else index.with_encoder(encoder)


def is_store(path: str | Path) -> bool:
    """Whether a path is a clipkit artifact, which ``build_index`` opens as a store.

    A manifest.json alone does not count: other programs write files of that name, too.
    """
    path = Path(path)
    if partial_path(path).is_dir():
        return True
    try:
        read_manifest(path)
    except ArtifactError:
        return is_complete(path) and bool(shard_numbers(path))
    return True


def _as_store(data: Data | EmbeddingStore) -> EmbeddingStore | None:
    if isinstance(data, EmbeddingStore):
        return data
    if isinstance(data, str | Path) and is_store(data):
        return EmbeddingStore.open(data)
    return None


def _open_source(data: Data) -> Source:
    # Imported here because indexing a store needs neither torch nor datasets.
    from clipkit.data.open_source import open_source

    return data if isinstance(data, Source) else open_source(data, metadata=True)


def store_beside(out: Path) -> Path:
    """The directory of the store that ``build_index`` embeds images into."""
    return out.with_name(f"{out.name}.store")


@dataclass(frozen=True)
class Calibrated:
    """Result of ``calibrate_index``.

    Attributes:
        measured: recall and time of text queries, compared with exact search.
        calibration: maps scores to probabilities, and says how far these can be trusted.
    """

    measured: Measured
    calibration: Calibration

    @property
    def source(self) -> str:
        """The origin of the captions."""
        return self.calibration.source

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON."""
        return {**self.measured.to_dict(), **self.calibration.figures()}

    def _repr_html_(self) -> str:
        from clipkit.reports.evaluation import render_calibration

        return render_calibration(self.calibration)


def calibrate_index(
    index: str | Path | VectorIndex, encoder: "Encoder | QueryEncoder | None" = None
) -> Calibrated:
    """Measure text queries and store a calibration of scores as probabilities in the index.

    Args:
        index: the index, or its directory.
        encoder: the index's model; None loads it.

    Raises:
        ArtifactError: the index does not exist, is damaged or empty, or another process is writing
            it.
        ModelError: its model cannot be loaded.
        ModelMismatchError: ``encoder`` is another model than the index's.
    """
    path = index.path if isinstance(index, VectorIndex) else index
    opened = VectorIndex.open(path, encoder=encoder)
    if not len(opened):
        raise ArtifactError(f"{path} is empty, expected at least one image; add some")
    tables = (table for _, table in opened.shards())
    queries = encode_sample_queries(tables, opened.text_encoder.encode_text)
    measured = remeasure(opened, queries.captions)
    return Calibrated(measured, write_calibration(path, queries, measured))


def _captions_of(index: VectorIndex, rows: NDArray[np.int64]) -> dict[int, list[str]]:
    """The captions of ascending rows."""
    found: dict[int, list[str]] = {}
    start = 0
    for _, table in index.shards():
        inside = rows[(rows >= start) & (rows < start + len(table))]
        lists = table["captions"].take(pa.array(inside - start)).to_pylist()
        found |= {int(row): captions or [] for row, captions in zip(inside, lists, strict=True)}
        start += len(table)
    return found


def write_calibration(
    path: str | Path, queries: SampleQueries, measured: Measured | None = None
) -> Calibration:
    """Calibrate an index and store the result in its manifest, atomically.

    Args:
        path: an index with at least one image.
        queries: sample queries, encoded by the index's model.
        measured: recall of the queries; stored together with them. None stores neither.

    Raises:
        ArtifactError: the index does not exist, is damaged or lacks exact vectors, or another
            process is writing it.
    """
    path = Path(path)
    with ArtifactWriter(path, "index", replace=True):
        index = VectorIndex.open(path)
        calibration = calibrate(
            queries,
            lambda: (vectors for vectors, _ in index.shards()),
            lambda rows: _captions_of(index, rows),
        )
        manifest = read_manifest(path, "index")
        manifest.detail["calibration"] = calibration.to_dict()
        if measured is not None:
            write_sample_queries(path, queries.captions)
            manifest.detail["measured"] = measured.to_dict()
        write_json(path / MANIFEST, manifest.to_dict())
    return calibration
