"""Search, classification and images of the served index, used by the routes of ``app``."""

import asyncio
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipkit.classifiers.zero_shot import ZeroShotClassifier
from clipkit.data.formats.metadata import OWN
from clipkit.data.labels import Label, parse_label
from clipkit.data.prompts import DEFAULT_TEMPLATES
from clipkit.index.calibration import Assessment
from clipkit.index.filters import FOLDER
from clipkit.index.hits import Hit
from clipkit.index.vector_index import combine
from clipkit.models.tokenizer import TruncationReport, tokenize
from clipkit.web.batching import Batcher, EncoderQueue, Vector
from clipkit.web.collection import Collection, Mask, ServedIndex
from clipkit.web.images import ImageWorker, ThumbnailCache, Upload, UploadCache
from clipkit.web.metrics import Monitor
from clipkit.web.schemas import (
    MAX_CAPTIONS,
    MAX_DISTINCT_HITS,
    MAX_HITS,
    ClassifyRequest,
    ClassifyResponse,
    ImageProbabilities,
    RequestError,
    SearchHit,
    SearchQuery,
    SearchResponse,
)

MAX_CLASSIFIERS = 32
MAX_TEXT = 2000
"""Maximum characters per text of a record, which limits a response to a few megabytes."""


@dataclass(frozen=True)
class _VectorSearch:
    """One search of an index; searches that differ only in their vector form one batch."""

    collection: Collection
    vector: Vector
    k: int
    where: str
    mask: Mask | None


class Service:
    """Implements the routes of the HTTP API.

    Args:
        served: the served index.
        thumbnails: cache for thumbnails.
        monitor: counts batches, reloads and images.
    """

    def __init__(self, served: ServedIndex, thumbnails: ThumbnailCache, monitor: Monitor) -> None:
        self.served, self.monitor = served, monitor
        self.worker, self.uploads = ImageWorker(thumbnails), UploadCache()
        self._encoding = EncoderQueue(monitor.batches.observe)
        self._searches: Batcher[_VectorSearch, list[Hit]] = Batcher(_search_batch)
        self._classifiers: OrderedDict[tuple[str, ...], ZeroShotClassifier] = OrderedDict()

    @property
    def collection(self) -> Collection:
        """The current state of the index."""
        return self.served.collection

    async def refresh(self) -> None:
        """Reload the index if it has changed; keep the old state if that fails."""
        try:
            changed = await asyncio.to_thread(self.served.refresh)
        except Exception as error:
            self.monitor.reloads.labels("failed").inc()
            print(f"the index has changed but cannot be opened: {error}", file=sys.stderr)
            return
        if changed:
            self.monitor.reloads.labels("done").inc()
        self.monitor.images.set(len(self.collection))

    def close(self) -> None:
        """Process the waiting requests and stop."""
        self._searches.close()
        self._encoding.close()

    async def upload(self, collection: Collection, data: bytes) -> str:
        """Encode and cache an uploaded image; return the name to search with."""
        pixels, jpeg = await self.worker.run(lambda: collection.read_upload(data))
        vector = await self._encoding.encode_image(collection.encoder, pixels)
        return self.uploads.add(data, Upload(vector, collection.encoder.model.fingerprint, jpeg))

    async def search(self, collection: Collection, query: SearchQuery) -> SearchResponse:
        """The hits of a query; for an empty query, images in the order of the index.

        Raises:
            RequestError: a key or an upload does not exist (404).
            DataError: ``where`` is not a valid condition, or the query's terms cancel out.
        """
        start = time.perf_counter()
        mask = None
        if query.where.strip():
            mask = await asyncio.to_thread(collection.select, query.where)
        total = len(collection) if mask is None else int(np.count_nonzero(mask))
        vector = await self._query_vector(collection, query)
        stop = min(query.offset + query.k, MAX_HITS)
        assessment = Assessment()
        if vector is None:
            hits = _listed(collection, mask, query.offset, stop)
        else:
            found = []
            if query.offset < stop and total:
                found = await self._hits(collection, query, vector, mask, stop)
            if _is_caption(query):
                assessment = collection.index.assess(vector, found)
            hits = [(hit.key, hit.score) for hit in found[query.offset : stop]]
        return SearchResponse(
            hits=_describe(collection, hits, assessment, query.offset),
            total=total,
            any_match=assessment.any_match,
            matched=assessment.matched,
            image=query.image,
            notes=_truncation_notes(query),
            milliseconds=1000 * (time.perf_counter() - start),
        )

    async def classify(self, collection: Collection, asked: ClassifyRequest) -> ClassifyResponse:
        """The probabilities of labels for images of the index or an uploaded image.

        Raises:
            RequestError: no image is given (422), an image does not exist (404), or labels ×
                templates give too many captions (422).
            CaptionError: labels or templates are empty or repeated, or a template lacks ``{}``.
        """
        labels = [parse_label(text) for text in asked.labels]
        templates = asked.templates or list(DEFAULT_TEMPLATES)
        captions = sum(len(label.phrases) for label in labels) * len(templates)
        if captions > MAX_CAPTIONS:
            raise RequestError(
                422,
                f"the labels and {len(templates)} templates give {captions} captions, expected at "
                f"most {MAX_CAPTIONS}; use fewer labels or templates",
            )
        keys: list[str | None] = [*([None] if asked.image else []), *asked.keys]
        if not keys:
            raise RequestError(422, "no image to classify; give keys or an image")
        vectors = [self._uploaded(collection, asked.image)] if asked.image else []
        vectors += await asyncio.gather(*(self._vector_of(collection, key) for key in asked.keys))
        classifier = await self._classifier(collection, labels, asked.labels, templates)
        rows = classifier.probabilities(np.stack(vectors)).tolist()
        return ClassifyResponse(
            labels=[str(label) for label in labels],
            templates=templates,
            images=[
                ImageProbabilities(key=key, probabilities=row)
                for key, row in zip(keys, rows, strict=True)
            ],
        )

    async def _query_vector(self, collection: Collection, query: SearchQuery) -> Vector | None:
        """The query as one vector; None if it is empty."""
        captions = [query.q] if query.q.strip() else []
        minus = [text for text in query.minus if text.strip()]
        encoded = await self._encoding.encode_text(collection.encoder, captions + minus)
        wanted, unwanted = encoded[: len(captions)], encoded[len(captions) :]
        if query.image is not None:
            uploaded = self._uploaded(collection, query.image)
            wanted.append(np.float32(query.image_weight) * uploaded)
        wanted += [await self._vector_of(collection, key) for key in query.like]
        unwanted += [await self._vector_of(collection, key) for key in query.unlike]
        terms = wanted + [np.float32(-query.minus_weight) * vector for vector in unwanted]
        return combine(terms) if terms else None

    async def _hits(
        self,
        collection: Collection,
        query: SearchQuery,
        vector: Vector,
        mask: Mask | None,
        stop: int,
    ) -> list[Hit]:
        """The best hits, at least ``stop`` if the index has that many."""
        if query.distinct and stop > MAX_DISTINCT_HITS:
            raise RequestError(
                422,
                f"distinct hits were requested up to number {stop}, expected at most "
                f"{MAX_DISTINCT_HITS}; narrow the search instead",
            )
        # The images of ``like`` are not hits.
        k = _round_up(stop + len(query.like))
        while True:
            search = _VectorSearch(collection, vector, k, query.where, mask)
            found = await self._searches(search)
            hits = [hit for hit in found if hit.key not in query.like]
            if not query.distinct:
                return hits
            hits = await asyncio.to_thread(collection.distinct, hits)
            if len(hits) >= stop or len(found) < k:
                return hits
            k *= 2

    def _uploaded(self, collection: Collection, name: str) -> Vector:
        return self.uploads.get(name, collection.encoder.model.fingerprint).vector

    async def _vector_of(self, collection: Collection, key: str) -> Vector:
        vector = collection.vector(key)
        if vector is not None:
            return vector
        pixels = await self.worker.run(lambda: collection.read(key))
        return await self._encoding.encode_image(collection.encoder, pixels)

    async def _classifier(
        self,
        collection: Collection,
        labels: Sequence[Label],
        written: Sequence[str],
        templates: Sequence[str],
    ) -> ZeroShotClassifier:
        encoder = collection.encoder
        name = (encoder.model.fingerprint, *written, "", *templates)
        if name not in self._classifiers:
            self._classifiers[name] = await self._encoding.run(
                encoder, lambda: ZeroShotClassifier.from_labels(encoder, labels, templates)
            )
            if len(self._classifiers) > MAX_CLASSIFIERS:
                self._classifiers.popitem(last=False)
        return self._classifiers[name]


def _round_up(k: int) -> int:
    """Round ``k`` up to a number that neighbouring pages and most requests share.

    Requests with the same ``k`` can share a batch. FAISS breaks ties arbitrarily at the last hit;
    with the same ``k``, a tie at the end of a page appears on one page only.
    """
    return max(128, 1 << (k - 1).bit_length())


def _search_batch(searches: Sequence[_VectorSearch]) -> list[list[Hit]]:
    results: list[list[Hit]] = [[] for _ in searches]
    groups: dict[tuple[int, int, str], list[int]] = {}
    for n, one in enumerate(searches):
        groups.setdefault((id(one.collection), one.k, one.where), []).append(n)
    for numbers in groups.values():
        first = searches[numbers[0]]
        queries = np.stack([searches[n].vector for n in numbers])
        found = first.collection.search(queries, first.k, first.mask)
        for n, hits in zip(numbers, found, strict=True):
            results[n] = hits
    return results


def _listed(
    collection: Collection, mask: Mask | None, start: int, stop: int
) -> list[tuple[str, float | None]]:
    if mask is None:
        return [(key, None) for key in collection.keys[start:stop]]
    return [(collection.keys[row], None) for row in np.flatnonzero(mask)[start:stop]]


def _describe(
    collection: Collection,
    hits: Sequence[tuple[str, float | None]],
    assessment: Assessment,
    offset: int,
) -> list[SearchHit]:
    hidden = {*OWN}
    if FOLDER not in {column.name for column in collection.columns}:
        hidden.add(FOLDER)  # all images are in one folder
    records = collection.records_of([key for key, _ in hits])
    chances = assessment.probabilities
    return [
        SearchHit(
            rank=offset + n,
            key=key,
            score=score,
            probability=None if chances is None else float(chances[offset + n - 1]),
            captions=[text[:MAX_TEXT] for text in record["captions"] or []],
            label=record["label"],
            more={name: _as_json(value) for name, value in record.items() if name not in hidden},
        )
        for n, ((key, score), record) in enumerate(zip(hits, records, strict=True), 1)
    ]


def _is_caption(query: SearchQuery) -> bool:
    """Whether the query is only text: other scores are not calibrated."""
    more = query.image or query.like or query.unlike or any(map(str.strip, query.minus))
    return bool(query.q.strip()) and not more


def _as_json(value: Any) -> str | int | float | bool | None:
    """Convert a value of any column for JSON: no NaN, no bytes, truncated texts."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)[:MAX_TEXT]


def _truncation_notes(query: SearchQuery) -> list[str]:
    """Warnings about words beyond the model's context length."""
    report = TruncationReport()
    tokenize([text for text in (query.q, *query.minus) if text.strip()], report=report)
    return [
        f"Words after the first 75 tokens are ignored: {case.lost[:100]}…" for case in report.worst
    ]
