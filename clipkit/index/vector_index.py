"""VectorIndex: an index opened for searching, by text, image, vector or several of these.

An index is a directory of segments (see ``segments``) and of ``manifest.json``, which names their
files and holds the FAISS factory string and the search parameters. ``IndexWriter`` changes one.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypedDict, Unpack, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from clipkit.arguments import require_encoder, require_integer, require_number, require_text
from clipkit.artifacts import MANIFEST, ArtifactWriter, Manifest, ModelRef, read_manifest
from clipkit.data.images import SUFFIXES, Decode, read_image
from clipkit.errors import ArtifactError, CaptionError, DataError, ImageError, ModelError
from clipkit.index.build import Built, Rows, cannot_write, write_segment
from clipkit.index.calibration import Assessment, Calibration
from clipkit.index.faiss_factory import default_search_parameters, set_search_parameters
from clipkit.index.filters import rows_where
from clipkit.index.hits import Hit, Hits, Record
from clipkit.index.roots import roots_of
from clipkit.index.search import split_search_parameters
from clipkit.index.segments import ID, Mask, Segment, mismatch, parts_of, search_segments
from clipkit.progress import print_status
from clipkit.shapes import Float32, Int64, Shaped
from clipkit.store.embedding_store import EXACT, EmbeddingStore, ExternalVectors
from clipkit.store.shards import SCHEMA, Vectors, json_value, together

if TYPE_CHECKING:
    from clipkit.models.encoder import Encoder
    from clipkit.models.text_encoder_numpy import QueryEncoder

    AnyEncoder: TypeAlias = Encoder | QueryEncoder

ImageQuery: TypeAlias = str | Path | Image.Image | NDArray[np.uint8]
Query: TypeAlias = str | Path | Image.Image | NDArray[Any]

ATTEMPTS = 100
"""How often an index that changes while it is opened is opened again."""
MINUS_WEIGHT = 0.5
"""Default weight of ``minus``. Text vectors of CLIP have a mean cosine of 0.74: subtracting one
with weight 1 removes most of the query and leaves noise."""
NEAR_DUPLICATE = 0.95
"""Cosine from which two images count as near-duplicates. Of 2,428 photos (ViT-B/32) two are so
near to another; the median cosine to the nearest other photo is 0.81."""
MOST_COMPARED = 10_000
"""Keys that a misspelt key is compared with: a million would take minutes."""


class SearchOptions(TypedDict, total=False):
    """The keyword arguments of ``VectorIndex.search``, for the types of its overloads."""

    where: str | None
    image: ImageQuery | None
    like: str | Sequence[str]
    minus: str | Sequence[str]
    minus_weight: float
    image_weight: float
    distinct: bool


class VectorIndex:
    """A finished index, opened for searching; later changes on disk do not affect it.

    Args:
        path: the directory.
        manifest: of the index.
        segments: opened.
        encoder: encodes text and image queries; None loads the index's own model on first use.

    Attributes:
        path: the directory.
        manifest: the model, the spec and the search parameters.
        segments: its parts; the first has the index's spec, the others are exact.
        model: the model that encoded the vectors; queries must come from the same one.
        dim: width of the vectors.

    Raises:
        ModelMismatchError: ``encoder`` is another model than the index's.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        segments: list[Segment],
        encoder: "AnyEncoder | None" = None,
    ) -> None:
        self.path, self.manifest, self.segments = path, manifest, segments
        self.model = manifest.require_model()
        self.dim = self.model.dim
        self._starts = np.cumsum([0, *(segment.rows for segment in segments)])
        self._encoder = encoder
        self._folder: _TemporaryFolder | None = None
        require_encoder(encoder)
        if encoder is not None:
            self._require(encoder)

    def _require(self, encoder: "AnyEncoder") -> None:
        if not self.model.external:
            self.model.require(
                encoder.model,
                what=f"the index {self.path}",
                repair="search with the index's own model, or build the index again with "
                "`clipkit index build IMAGES --out INDEX --model MODEL`",
            )
        elif encoder.model.dim != self.dim:
            raise ModelError(
                f"{encoder.model} gives vectors of dimension {encoder.model.dim}, but {self.path} "
                f"holds vectors of dimension {self.dim}; use the model that made those"
            )

    @classmethod
    def build(
        cls, store: EmbeddingStore, path: str | Path, spec: str = "Flat", *, replace: bool = False
    ) -> Self:
        """Build an index of a store's vectors, shard by shard.

        Args:
            store: the vectors.
            path: directory of the index.
            spec: FAISS factory string.
            replace: allow a finished index there; it is replaced once the new one is complete.

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
    def from_vectors(
        cls,
        vectors: Shaped[NDArray[Any], "n dim"],
        keys: Sequence[str],
        *,
        metadata: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | None = None,
        model: ModelRef | None = None,
        path: str | Path | None = None,
        spec: str = "Flat",
    ) -> Self:
        """Build an index of vectors that were computed elsewhere.

        Args:
            vectors: numbers [n, dim]; rows are scaled to unit length, so that scores are cosines.
            keys: n different names.
            metadata: further columns to filter by and to return: a mapping or data frame of
                columns, or one mapping a row. ``captions`` and ``label`` are known names.
            model: the model that encoded the vectors; None marks their origin as external, and
                text or image queries then need ``with_encoder``.
            path: directory of the index; None: a temporary one, deleted with this object.
            spec: FAISS factory string.

        Raises:
            DataError: shapes that do not fit, repeated keys, or vectors without a direction.
            SpecError: the spec is malformed or impossible for these vectors.
            ArtifactError: ``path`` is taken, or the disk is full.
        """
        rows = ExternalVectors.of(vectors, keys, metadata, model)
        folder = None
        if path is None:
            folder = _TemporaryFolder()
            path = folder.path / "index"
        write_index(rows, rows.model, path, spec, rows.source, {"decode": EXACT})
        index = cls.open(path)
        index._folder = folder
        return index

    @classmethod
    def open(cls, path: str | Path, *, encoder: "AnyEncoder | None" = None) -> Self:
        """Open a finished index and check that its files belong together.

        If a writer replaces the files meanwhile, opening starts again with the new ones.

        Args:
            path: the directory.
            encoder: encodes text and image queries; None loads the index's own model on first use.

        Raises:
            ArtifactError: not an index, half-written, or with damaged or foreign files.
            ModelMismatchError: ``encoder`` is another model than the index's.
        """
        path = Path(path)
        for _ in range(ATTEMPTS):
            before = _stamp(path)
            try:
                with _one_directory(path):
                    manifest = read_manifest(path, "index")
                    return cls(path, manifest, _open_segments(path, manifest), encoder)
            except _ReplacedError:
                continue
            except ArtifactError:
                if _stamp(path) == before:
                    raise
        raise ArtifactError(f"{path} changed {ATTEMPTS} times while it was opened; try again")

    def reopen(self) -> "VectorIndex":
        """The index as it is on disk now; unchanged segments are not read again."""
        manifest = read_manifest(self.path, "index")
        opened = {segment.parts.index: segment for segment in self.segments}
        segments = _open_segments(self.path, manifest, opened)
        index = VectorIndex(self.path, manifest, segments, self._encoder)
        index._folder = self._folder
        return index

    def with_encoder(self, encoder: "AnyEncoder") -> "VectorIndex":
        """The same index, searched with this encoder.

        Raises:
            ModelMismatchError: it is another model than the index's.
        """
        index = VectorIndex(self.path, self.manifest, self.segments, encoder)
        index._folder = self._folder
        return index

    def __len__(self) -> int:
        return self.manifest.count

    def __repr__(self) -> str:
        return f"VectorIndex({str(self.path)!r}, {len(self):,} vectors of {self.model})"

    @property
    def spec(self) -> str:
        """The FAISS factory string that it was built with."""
        return str(self.manifest.detail.get("spec"))

    @property
    def decode(self) -> str:
        """How its images were read, "exact" or "fast"; image queries are read the same way."""
        return str(self.manifest.detail.get("decode", EXACT))

    @cached_property
    def calibration(self) -> Calibration | None:
        """How scores become probabilities; None if the index is not calibrated.

        Raises:
            ArtifactError: it is damaged, or an older clipkit made it.
        """
        raw = self.manifest.detail.get("calibration")
        return None if raw is None else Calibration.from_dict(raw, self.dim, str(self.path))

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

    def records(self) -> pa.Table:
        """All records, in the order in which they were added.

        Columns: key, size in bytes, mtime_ns, captions, label, content_hash, metadata, and id.
        """
        return together((t for s in self.segments for t in s.tables(s.live)), pa.schema([ID]))

    def shards(self) -> Iterator[tuple[Vectors, pa.Table]]:
        """Vectors, float32 [m, dim], and records of its rows, a bounded number at a time.

        Raises:
            ArtifactError: an older clipkit built it with a lossy spec and stored no vectors.
        """
        for segment in self.segments:
            yield from segment.blocks(segment.live, self.path)

    def vector(self, key: str) -> Float32[NDArray[np.float32], " {self.dim}"]:
        """The vector of an item, float32 [dim].

        Raises:
            DataError: the index has no such key.
            ArtifactError: an older clipkit stored no exact vectors.
        """
        for segment in self.segments:
            rows = np.flatnonzero(np.asarray(pc.equal(segment.keys, key)))
            if segment.live is not None:
                rows = rows[segment.live[rows]]
            if len(rows):
                return self._vector(segment, int(rows[0]))
        close = self.closest_key(key)
        hint = f"did you mean {close!r}" if close else "a search shows keys as they are"
        raise DataError(f"{self.path} has no item {key!r} ({hint}); name one that it has")

    def closest_key(self, key: str) -> str | None:
        """The key most like a misspelt one, among the first ``MOST_COMPARED``; None: none is."""
        return next(iter(get_close_matches(key, self.keys[:MOST_COMPARED], 1)), None)

    def read_records(self, hits: Sequence[Hit]) -> list[Record]:
        """For each hit its captions, its label, and its metadata as ``more``, read from disk.

        Values are those of JSON: dates and times become text, infinite numbers None.
        """
        columns = {name for segment in self.segments for name in segment.schema.names}
        names = sorted(columns - {*SCHEMA.names, ID.name})
        records = []
        for hit in hits:
            segment, row = self._locate_hit(hit)
            record = segment.record(row)
            more = {name: json_value(record.get(name)) for name in names}
            captions = record.get("captions") or []
            records.append({"captions": captions, "label": record.get("label"), "more": more})
        return records

    def mask(self, where: str) -> Mask:
        """The rows that fulfil a condition, bool [len(self)] in the order of the records.

        Args:
            where: such as ``"year >= 2023 and folder = 'holiday'"`` (see ``filters``).

        Raises:
            DataError: a syntax error, an unknown column, or a value of another type.
        """
        return rows_where(self.segments, where)

    @overload
    def search(
        self,
        query: str | Path | Image.Image | None = None,
        k: int = 10,
        **options: Unpack[SearchOptions],
    ) -> Hits: ...
    @overload
    def search(
        self,
        query: list[Any] | tuple[Any, ...],
        k: int = 10,
        **options: Unpack[SearchOptions],
    ) -> list[Hits]: ...
    @overload
    def search(
        self,
        query: NDArray[Any],
        k: int = 10,
        **options: Unpack[SearchOptions],
    ) -> Any: ...
    def search(
        self,
        query: Query | Sequence[Query] | None = None,
        k: int = 10,
        *,
        where: str | None = None,
        image: ImageQuery | None = None,
        like: str | Sequence[str] = (),
        minus: str | Sequence[str] = (),
        minus_weight: float = MINUS_WEIGHT,
        image_weight: float = 1.0,
        distinct: bool = False,
    ) -> Any:
        """The ``k`` items nearest to a query, best first.

        Query, ``image``, ``like`` and ``minus`` add up as unit vectors; the sum is scaled to unit
        length. Hits of a text alone have a probability if the index is calibrated with captions of
        its images.

        Args:
            query: text (a ``str`` is always text), an image (``Path``, PIL image, or uint8 array
                [height, width, 3]), or a vector (array [dim]). A list or tuple of these, or an
                array [n, dim], is several queries.
            k: how many hits.
            where: a condition on the records that all hits fulfil, such as
                ``"year >= 2023 and folder = 'holiday'"``.
            image: an image that is added to the query; a ``str`` is a path here.
            like: keys of the index, added to the query and left out of the hits.
            minus: texts that are subtracted from the query.
            minus_weight: weight of each text in ``minus``.
            image_weight: weight of ``image``.
            distinct: leave out near-duplicates of better hits.

        Returns:
            ``Hits`` of one query; a list of ``Hits`` for several.

        Raises:
            CaptionError: a blank text.
            ImageError: an image cannot be read.
            DataError: no query, an unknown key, a malformed condition, or terms that cancel each
                other out.
            ArgumentError: ``k`` is below 1, or a weight is not a finite positive number.
            ModelError: the index's model cannot be loaded, or is not known.
            TypeError: a query of another type.
        """
        k = require_integer("k", k)
        if where is not None:
            require_text("where", where, "year >= 2023")
        queries, several = _as_queries(query)
        like, minus = _as_list(like, "like"), _as_list(minus, "minus")
        require_number("minus_weight", minus_weight)
        require_number("image_weight", image_weight)
        mask = None if where is None else self.mask(where)
        terms = self._terms(image, like, minus, minus_weight, image_weight)
        if not terms and any(one is None for one in queries):
            raise DataError("there is nothing to search for, expected a text, an image or a vector")
        encoded = self._encode(queries)
        if not queries:
            return []
        vectors = np.stack(
            [combine(([own] if own is not None else []) + [v for _, v in terms]) for own in encoded]
        )
        found = self._nearest(vectors, k, mask, set(like), distinct)
        results = []
        for one, vector, hits in zip(queries, vectors, found, strict=True):
            words = [*([] if one is None else [_describe(one)]), *(text for text, _ in terms)]
            roots = tuple(roots_of(self.manifest))
            result = Hits(tuple(hits), ", ".join(words), roots, self.read_records)
            # Of texts alone: an image scores far above any text, its hits would all be certain.
            if isinstance(one, str) and not terms:
                result = self._assessed(result, vector)
            results.append(result)
        return results if several else results[0]

    def _terms(
        self,
        image: ImageQuery | None,
        like: Sequence[str],
        minus: Sequence[str],
        minus_weight: float,
        image_weight: float,
    ) -> list[tuple[str, Vectors]]:
        """What is added to every query: in words, and as weighted vectors."""
        terms = []
        if image is not None:
            image = Path(image) if isinstance(image, str) else image
            terms.append((_describe(image), np.float32(image_weight) * self._encode_image(image)))
        terms += [(f"like {key}", self.vector(key)) for key in like]
        for text, vector in zip(minus, self._encode_texts(minus), strict=True):
            terms.append((f"without {text}", np.float32(-minus_weight) * vector))
        return terms

    def _encode(self, queries: Sequence[Query | None]) -> list[Vectors | None]:
        """The unit vector of each query, float32 [dim]; None for None."""
        texts = iter(self._encode_texts([one for one in queries if isinstance(one, str)]))
        vectors: list[Vectors | None] = []
        for one in queries:
            if one is None:
                vectors.append(None)
            elif isinstance(one, str):
                vectors.append(next(texts))
            elif isinstance(one, np.ndarray) and one.ndim == 1:
                vectors.append(combine([self._checked(one[None])[0]]))
            else:
                vectors.append(self._encode_image(one))
        return vectors

    def _encode_texts(self, texts: Sequence[str]) -> list[Vectors]:
        if not texts:
            return []
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"a text to search for is a {type(text).__name__}, expected a str")
            if not text.strip():
                raise CaptionError("the text to search for is empty, expected words")
            if os.path.splitext(text)[1].lower() in SUFFIXES and os.path.isfile(text):
                print_status(
                    f"note: {text} is searched for as text; an image is given as "
                    "--image, image=, or a Path"
                )
        return list(self.text_encoder.encode_text(list(texts)))

    def _encode_image(self, image: "Path | Image.Image | NDArray[np.uint8]") -> Vectors:
        """The vector of an image, float32 [dim], read as those of the index were."""
        from clipkit.data.transforms import as_batch

        encoder, decode = self.image_encoder, cast(Decode, self.decode)
        preprocess = encoder.preprocess
        if isinstance(image, Path):
            try:
                image = read_image(image, preprocess.reduction(decode))
            except ImageError as error:
                raise ImageError(f"cannot search with {image}: it {error}") from None
        elif isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise TypeError(
                    f"an array to search for has dtype {image.dtype} and shape "
                    f"{list(image.shape)}, expected an image, uint8 [height, width, 3], or a "
                    f"vector, float32 [{self.dim}]"
                )
            image = Image.fromarray(image)
        elif not isinstance(image, Image.Image):
            raise TypeError(
                f"an image to search for is a {type(image).__name__}, expected a path, a PIL image "
                "or a uint8 array [height, width, 3]"
            )
        pixels = preprocess.pixels(image, decode)
        vector: Vectors = encoder.encode_images(as_batch([pixels]))[0]
        return vector

    @cached_property
    def text_encoder(self) -> "AnyEncoder":
        """Encodes texts: the encoder given, else the index's model, without torch if possible.

        Raises:
            ModelError: the model cannot be loaded, or is not known.
        """
        if self._encoder is not None:
            return self._encoder
        if "image_encoder" not in self.__dict__ and not self.model.external:
            from clipkit.models.text_encoder_numpy import load_query_encoder

            encoder = load_query_encoder(self.model)
            if encoder is not None:
                return encoder
        return self.image_encoder

    @cached_property
    def image_encoder(self) -> "Encoder":
        """Encodes images; errors as of ``text_encoder``."""
        if self._encoder is not None:
            from clipkit.models.text_encoder_numpy import QueryEncoder

            if not isinstance(self._encoder, QueryEncoder):
                return self._encoder
        from clipkit.models.loading import load_model_ref

        return load_model_ref(self.model, f"the index {self.path}", precision="fp32")

    def _nearest(
        self, vectors: Vectors, k: int, mask: Mask | None, excluded: set[str], distinct: bool
    ) -> list[list[Hit]]:
        """The best ``k`` hits of each query, without excluded keys and near-duplicates."""
        if not (excluded or distinct):
            return self.search_vectors(vectors, k, mask)
        results = []
        for vector in vectors:
            asked = k + len(excluded)
            while True:
                hits = self.search_vectors(vector[None], asked, mask)[0]
                kept = [hit for hit in hits if hit.key not in excluded]
                kept = self.distinct(kept) if distinct else kept
                if len(kept) >= k or len(hits) < asked:
                    break
                asked *= 2
            results.append(kept[:k])
        return results

    def distinct(self, hits: Sequence[Hit]) -> list[Hit]:
        """The hits without near-duplicates of better ones.

        Raises:
            ArtifactError: an older clipkit stored no exact vectors.
        """
        vectors = np.array([self._vector(*self._locate_hit(hit)) for hit in hits])
        kept: list[int] = []
        for number in range(len(hits)):
            if not kept or float((vectors[kept] @ vectors[number]).max()) < NEAR_DUPLICATE:
                kept.append(number)
        return [hits[number] for number in kept]

    def _assessed(self, hits: Hits, vector: Vectors) -> Hits:
        """The hits of a text with what the calibration says of them."""
        found = self.assess(vector, hits)
        items = hits.items
        if found.probabilities is not None:
            pairs = zip(hits, found.probabilities.tolist(), strict=True)
            items = tuple(replace(hit, probability=chance) for hit, chance in pairs)
        return replace(hits, items=items, any_match=found.any_match, matched=found.matched)

    def assess(self, query: Vectors, hits: Sequence[Hit]) -> Assessment:
        """What the calibration says of the scores of a text's hits; nothing if there is none.

        Args:
            query: the text's vector, float32 [dim].
            hits: its hits, from the best one on.

        Raises:
            ArtifactError: the calibration is damaged, or an older clipkit made it.
        """
        if self.calibration is None:
            return Assessment()
        return self.calibration.assess(query, np.array([hit.score for hit in hits], np.float32))

    def search_vectors(
        self, queries: Float32[NDArray[np.float32], "n dim"], k: int, mask: Mask | None = None
    ) -> list[list[Hit]]:
        """The best ``k`` items of each query vector, best first; fewer if the index has fewer.

        Args:
            queries: float32 [n, dim], finite.
            k: how many, at least 1.
            mask: the rows to search, bool [len(self)] in the order of the records; None: all.

        Raises:
            ArtifactError: ``queries`` or ``mask`` have another shape, or are not finite.
            ArgumentError: ``k`` is below 1.
        """
        queries = self._checked(queries)
        k = require_integer("k", k)
        if not len(self) or not len(queries):
            return [[] for _ in queries]
        k = min(k, len(self))
        found = search_segments(self.segments, queries, k, mask)
        return [self._hits(*pair, k) for pair in zip(*found, strict=True)]

    def _checked(self, queries: NDArray[Any]) -> Float32[NDArray[np.float32], "n {self.dim}"]:
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
        # Equal scores in row order, so that the hits do not depend on how FAISS walked.
        order = np.lexsort((rows, -scores))
        best = [n for n in order if rows[n] >= 0][:k]
        return [self._hit(float(scores[n]), int(rows[n])) for n in best]

    def _hit(self, score: float, place: int) -> Hit:
        segment, row = self.locate(place)
        return Hit(segment.keys[row].as_py(), score, int(segment.ids[row]))

    @cached_property
    def places(self) -> Int64[NDArray[np.int64], " n"]:
        """The place of each record, int64 [n]: its row number, counted over all segments."""
        live = (s.live if s.live is not None else np.ones(s.rows, bool) for s in self.segments)
        return np.flatnonzero(np.concatenate([*live]))

    def locate(self, place: int) -> tuple[Segment, int]:
        """The segment of a place, and the row in it."""
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.segments[number], place - int(self._starts[number])

    def _locate_hit(self, hit: Hit) -> tuple[Segment, int]:
        for segment in self.segments:
            own = segment.ids == hit.id
            rows = np.flatnonzero(own if segment.live is None else own & segment.live)
            if len(rows):
                return segment, int(rows[0])
        raise ArtifactError(f"{self.path} has no item with id {hit.id}; search again")

    def _vector(self, segment: Segment, row: int) -> Vectors:
        if segment.vectors is None:
            raise ArtifactError(
                f"{self.path} was built by an older clipkit, which stored its vectors only "
                "approximately; build the index again"
            )
        return np.array(segment.vectors[row], np.float32)


def open_index(path: str | Path, *, encoder: "AnyEncoder | None" = None) -> VectorIndex:
    """Open an index for searching; arguments and errors as of ``VectorIndex.open``."""
    return VectorIndex.open(path, encoder=encoder)


def load_text_encoder(model: ModelRef, what: str) -> "AnyEncoder":
    """As ``load_model_ref``, without torch if the text tower's weights are known."""
    from clipkit.models.text_encoder_numpy import load_query_encoder

    if (encoder := load_query_encoder(model)) is not None:
        return encoder
    from clipkit.models.loading import load_model_ref

    return load_model_ref(model, what, precision="fp32")


def combine(vectors: Sequence[Vectors]) -> Vectors:
    """The direction of a sum of weighted unit vectors: float32 [dim], of unit length.

    Raises:
        DataError: they cancel each other out.
    """
    total = np.sum(vectors, axis=0, dtype=np.float32)
    length = float(np.linalg.norm(total))
    if length < 1e-3:
        raise DataError(
            "the terms of the query cancel each other out, so that the query has no direction; "
            "search for fewer of them"
        )
    return np.asarray(total / length, np.float32)


def _as_queries(query: Any) -> tuple[list[Query | None], bool]:
    """A list of queries, and whether several were given."""
    if query is None or isinstance(query, str | Path | Image.Image):
        return [query], False
    if isinstance(query, list | tuple):
        return [one for item in query for one in _as_queries(item)[0]], True
    if hasattr(query, "detach"):  # a torch tensor
        query = query.detach().cpu().numpy()
    if isinstance(query, np.ndarray) and query.dtype.kind not in "OU":
        return (list(query), True) if query.ndim == 2 else ([query], False)
    if isinstance(query, Iterable) and not isinstance(query, bytes | Mapping | Set):
        return _as_queries(list(query))  # a series, an array of texts, a generator
    raise TypeError(
        f"a query is a {type(query).__name__}, expected text (str), an image (Path, PIL image, or "
        "uint8 array [height, width, 3]), a vector (array [dim]), or a list of these"
    )


def _as_list(values: str | Sequence[str], name: str) -> list[str]:
    values = [values] if isinstance(values, str) else list(values)
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{name} holds a {type(value).__name__}, expected str or list of str")
    return values


def _describe(query: Query) -> str:
    """A query in words."""
    if isinstance(query, str):
        return query
    if isinstance(query, np.ndarray) and query.ndim == 1:
        return "a vector"
    return f"like {query}" if isinstance(query, Path) else "like an image"


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
        "search": default_search_parameters(built.index),
        "trained_on": built.trained_on,
        "generation": 0,
        "next_id": built.next_id,
        "segments": [built.parts.to_dict()],
    }


def _open_segments(
    path: Path, manifest: Manifest, opened: dict[str, Segment] | None = None
) -> list[Segment]:
    dim, opened = manifest.require_model().dim, opened or {}
    segments = [
        opened[parts.index].renewed(parts)
        if parts.index in opened
        else Segment.open(path, parts, dim)
        for parts in parts_of(manifest, path)
    ]
    if not segments or sum(map(len, segments)) != manifest.count:
        raise mismatch(path, f"{sum(map(len, segments))} vectors", manifest.count)
    segments[0].rerank_factor, parameters = split_search_parameters(
        manifest.detail.get("search", {})
    )
    set_search_parameters(segments[0].index, parameters)
    return segments


class _TemporaryFolder:
    """A folder that is deleted with this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="clipkit-"))
        weakref.finalize(self, shutil.rmtree, self.path, True)


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
