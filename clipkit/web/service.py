"""From a search or a classification, as asked, to its answer."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipkit.classifiers.zero_shot import ZeroShotClassifier
from clipkit.data.labels import Label, parse_label
from clipkit.data.prompts import DEFAULT_TEMPLATES
from clipkit.index import vector_index
from clipkit.index.calibration import GOOD
from clipkit.index.hits import combined
from clipkit.models.tokenizer import TruncationReport, tokenize
from clipkit.web.batching import Batcher, Vector, Vectors
from clipkit.web.collection import Collection
from clipkit.web.filters import Rows, parse_conditions, rows_where
from clipkit.web.images import Upload, Uploads, Work
from clipkit.web.schemas import (
    MOST_CAPTIONS,
    MOST_HITS,
    Answer,
    Classification,
    Classified,
    Classify,
    Hit,
    Search,
)
from clipkit.web.security import RequestError

CLASSIFIERS_KEPT = 32
MOST_LETTERS = 2000
"""Of one text of a record, so that no answer is larger than a few megabytes."""


@dataclass(frozen=True)
class _Wanted:
    """One search of an index; those that differ only in their vector are made together."""

    collection: Collection
    vector: Vector
    k: int
    where: tuple[str, ...]
    rows: Rows | None


class Answerer:
    """Answers searches and classifications of whatever collection they name.

    Args:
        vectors: encodes captions and pictures.
        work: runs what takes a while, a bounded number at a time.
    """

    def __init__(self, vectors: Vectors, work: Work) -> None:
        self.vectors, self.work, self.uploads = vectors, work, Uploads()
        self._searches: Batcher[_Wanted, list[vector_index.Hit]] = Batcher(_search_together)
        self._classifiers: OrderedDict[tuple[str, ...], ZeroShotClassifier] = OrderedDict()

    def close(self) -> None:
        """Finish what is waiting."""
        self._searches.close()
        self.vectors.close()

    async def take(self, collection: Collection, data: bytes) -> str:
        """Read and encode a picture that was handed in; returns the name to search for it by."""
        pixels, jpeg = await self.work.run(lambda: collection.read_upload(data))
        vector = await self.vectors.of_picture(collection.encoder, pixels)
        return self.uploads.keep(data, Upload(vector, collection.encoder.model.fingerprint, jpeg))

    async def search(self, collection: Collection, search: Search) -> Answer:
        """The hits of a search; of nothing to search for, pictures in the index's order.

        Raises:
            RequestError: a key or a picture that is not there, or a condition that is none.
            DataError: what is searched for cancels itself out.
        """
        start = time.perf_counter()
        rows = await _chosen(collection, search.where)
        total = len(collection) if rows is None else int(np.count_nonzero(rows))
        query = await self._query(collection, search)
        stop = min(search.offset + search.limit, MOST_HITS)
        chances = None
        if query is None:
            hits = _listed(collection, rows, search.offset, stop)
        elif search.offset >= stop or not total:
            hits = []
        else:
            # The pictures that were named are no news.
            k = _rounded(stop + len(search.like))
            wanted = _Wanted(collection, query, k, tuple(search.where), rows)
            found = [hit for hit in await self._searches(wanted) if hit.key not in search.like]
            if _is_caption(search):
                chances = collection.probabilities(query, found)
            hits = [(hit.key, hit.score) for hit in found[search.offset : stop]]
        return Answer(
            hits=_shown(collection, hits, chances, search.offset),
            total=total,
            matched=max(chances) >= GOOD if chances else None,
            image=search.image,
            notes=_unread(search),
            milliseconds=1000 * (time.perf_counter() - start),
        )

    async def classify(self, collection: Collection, asked: Classify) -> Classification:
        """The probabilities of labels for pictures of the index or one that was handed in.

        Raises:
            RequestError: no picture is named, one is not there, or there are too many captions.
            CaptionError: labels or templates that are empty, repeated, or lack the slot.
        """
        labels = [parse_label(text) for text in asked.labels]
        templates = asked.templates or list(DEFAULT_TEMPLATES)
        captions = sum(len(label.phrases) for label in labels) * len(templates)
        if captions > MOST_CAPTIONS:
            raise RequestError(
                422,
                f"the labels with {len(templates)} templates make {captions} captions, at most "
                f"{MOST_CAPTIONS} are encoded; name fewer",
            )
        keys: list[str | None] = [*([None] if asked.image else []), *asked.keys]
        if not keys:
            raise RequestError(422, "there is no picture to classify; name keys or an image")
        vectors = [self._upload(collection, asked.image)] if asked.image else []
        vectors += await asyncio.gather(*(self._of_key(collection, key) for key in asked.keys))
        classifier = await self._classifier(collection, labels, asked.labels, templates)
        shares = classifier.probabilities(np.stack(vectors)).tolist()
        return Classification(
            labels=[str(label) for label in labels],
            templates=templates,
            pictures=[
                Classified(key=key, probabilities=row)
                for key, row in zip(keys, shares, strict=True)
            ],
        )

    async def _query(self, collection: Collection, search: Search) -> Vector | None:
        """The query's vector; None where there is nothing to search for."""
        captions = [search.q] if search.q.strip() else []
        unwanted = [text for text in search.minus if text.strip()]
        found = await self.vectors.of_captions(collection.encoder, captions + unwanted)
        plus, minus = found[: len(captions)], found[len(captions) :]
        if search.image is not None:
            plus.append(self._upload(collection, search.image))
        plus += [await self._of_key(collection, key) for key in search.like]
        minus += [await self._of_key(collection, key) for key in search.unlike]
        return combined(plus, minus) if plus or minus else None

    def _upload(self, collection: Collection, name: str) -> Vector:
        return self.uploads.get(name, collection.encoder.model.fingerprint).vector

    async def _of_key(self, collection: Collection, key: str) -> Vector:
        vector = collection.vector(key)
        if vector is not None:
            return vector
        pixels = await self.work.run(lambda: collection.read(key))
        return await self.vectors.of_picture(collection.encoder, pixels)

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

            def build() -> ZeroShotClassifier:
                return ZeroShotClassifier.from_labels(encoder, labels, templates)

            self._classifiers[name] = await self.vectors.run(encoder, build)
            if len(self._classifiers) > CLASSIFIERS_KEPT:
                self._classifiers.popitem(last=False)
        return self._classifiers[name]


async def _chosen(collection: Collection, where: Sequence[str]) -> Rows | None:
    if not where:
        return None
    conditions = parse_conditions(where, collection.columns)
    return await asyncio.to_thread(rows_where, collection.records, conditions)


def _rounded(k: int) -> int:
    """At least ``k``, and the same for neighbouring pages and for most requests.

    So that requests can be made together, and equal scores at the end of a page, of which FAISS
    returns whichever it met first, come on one page and on one alone.
    """
    return max(128, 1 << (k - 1).bit_length())


def _search_together(wanted: Sequence[_Wanted]) -> list[list[vector_index.Hit]]:
    results: list[list[vector_index.Hit]] = [[] for _ in wanted]
    alike: dict[tuple[int, int, tuple[str, ...]], list[int]] = {}
    for n, one in enumerate(wanted):
        alike.setdefault((id(one.collection), one.k, one.where), []).append(n)
    for numbers in alike.values():
        first = wanted[numbers[0]]
        queries = np.stack([wanted[n].vector for n in numbers])
        found = first.collection.search(queries, first.k, first.rows)
        for n, hits in zip(numbers, found, strict=True):
            results[n] = hits
    return results


def _listed(
    collection: Collection, rows: Rows | None, start: int, stop: int
) -> list[tuple[str, float | None]]:
    if rows is None:
        return [(key, None) for key in collection.keys[start:stop]]
    return [(collection.keys[row], None) for row in np.flatnonzero(rows)[start:stop]]


def _shown(
    collection: Collection,
    hits: Sequence[tuple[str, float | None]],
    chances: Sequence[float] | None,
    offset: int,
) -> list[Hit]:
    records = collection.described([key for key, _ in hits])
    own = ("key", "size", "mtime_ns", "captions", "label", "content_hash", "id")
    return [
        Hit(
            rank=offset + n,
            key=key,
            score=score,
            probability=chances[offset + n - 1] if chances else None,
            captions=[text[:MOST_LETTERS] for text in record["captions"] or []],
            label=record["label"],
            more={name: _plain(value) for name, value in record.items() if name not in own},
        )
        for n, ((key, score), record) in enumerate(zip(hits, records, strict=True), 1)
    ]


def _is_caption(search: Search) -> bool:
    """Whether words alone are searched for: the scores of nothing else are calibrated."""
    more = search.image or search.like or search.unlike or any(map(str.strip, search.minus))
    return bool(search.q.strip()) and not more


def _plain(value: Any) -> str | int | float | bool | None:
    """A value of any column as JSON has it: no NaN, no bytes, nothing without end."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)[:MOST_LETTERS]


def _unread(search: Search) -> list[str]:
    """A sentence about the words that no model reads, where there are such."""
    report = TruncationReport()
    tokenize([text for text in (search.q, *search.minus) if text.strip()], report=report)
    return [
        f"The words after the first 75 tokens are not read: {case.lost[:100]}…"
        for case in report.worst
    ]
