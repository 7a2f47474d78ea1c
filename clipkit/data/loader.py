"""Batches that several processes share.

Pairs put together into a batch.

Image–caption pairs as batches, the same ones whenever asked.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipkit.data.feature_cache import Features
from clipkit.data.image_cache import ImageCache
from clipkit.data.images import Reduction, Skipped
from clipkit.data.rows import Row, Table
from clipkit.data.sampler import CaptionLengths, Sampler, first_turn, stable_hash
from clipkit.data.source import Source, usable
from clipkit.data.streaming import Draw, stream_batches
from clipkit.data.transforms import Pixels, as_batch
from clipkit.data.workers import map_ordered
from clipkit.errors import DataError, ImageError, SkipLimitError


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Share:
    """The part of every batch that this process reads.

    Attributes:
        rank: this process's number.
        size: how many processes there are.
        exchange: what each process has to tell, in the order of ranks: values that JSON can hold.
    """

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] = field(default=_alone)


@dataclass(frozen=True)
class PairBatch:
    """What the training loop eats.

    Attributes:
        images: uint8 [n, 3, height, width]; or stored features of them, float32 [n, …].
        tokens: int64 [n, 77].
        keys: of the images.
        weights: of the pairs in the loss, float32 [n]; None where all weigh the same.
    """

    images: Tensor
    tokens: Tensor
    keys: list[str]
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Pair:
    """An image, uint8 [height, width, 3], or its features, and one caption.

    ``part`` is the number of its source in a mixture.
    """

    key: str
    image: NDArray[Any]
    caption: str
    weight: float
    part: int = 0


@dataclass(frozen=True)
class Gathered:
    """Rows of a batch whose captions are still to be read.

    Attributes:
        images: as of ``PairBatch``.
        captions, keys, weights: of the same pairs.
        parts: the number of each pair's part of a mixture.
        bad: rows that are missing.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    weights: list[float]
    parts: list[int]
    bad: list[Skipped]

    @classmethod
    def of(
        cls, rows: Sequence[Pair | Skipped], nothing: NDArray[Any], *, pinned: bool
    ) -> "Gathered":
        """Put rows together.

        Args:
            rows: of a batch.
            nothing: what has the form of an image, for a batch without any.
            pinned: images into memory that a CUDA device can fetch by itself.
        """
        pairs = [row for row in rows if isinstance(row, Pair)]
        arrays = [pair.image for pair in pairs] or [nothing]
        if nothing.dtype == np.uint8:
            images = as_batch(arrays, pinned=pinned)
        else:
            images = torch.from_numpy(np.stack(arrays))
        return cls(
            images[: len(pairs)],
            [pair.caption for pair in pairs],
            [pair.key for pair in pairs],
            [pair.weight for pair in pairs],
            [pair.part for pair in pairs],
            [row for row in rows if isinstance(row, Skipped)],
        )

    def read(
        self, tokenize: Callable[[Sequence[str]], NDArray[np.int64]], *, weighted: bool
    ) -> PairBatch:
        """The batch, with weights if they are to count."""
        tokens = torch.from_numpy(tokenize(self.captions))
        weights = torch.tensor(self.weights) if weighted else None
        return PairBatch(self.images, tokens, self.keys, weights)


# Rows a thread reads at a time: one look-up in the table for all of them, yet enough parts in a
# batch to keep every thread busy.
_CHUNK = 16
# Fewer rows than this say little about the share that is bad.
_FEW = 1000


@dataclass(frozen=True)
class _Chunk:
    """Rows, or their numbers in the table, that one thread reads; ``last`` ends a batch.

    Of a stream, ``place`` is where the next batch begins.
    """

    rows: Sequence[Any]
    last: bool
    place: dict[str, Any] | None


@dataclass
class PairLoader:
    """Batches of a source's pairs.

    Order, choice of caption and augmentation depend on the seed, the epoch and the row's key
    alone, never on workers, timing or what is cached, so that a run resumes exactly.

    Attributes:
        preprocess: an image, uint8 [h, w, 3], and its random generator to uint8
            [height, width, 3], of one size for all; called from several threads.
        tokenize: captions to ``int64 [n, 77]``; called from the thread that asks for batches.
        split: parts a caption that is too long into several; None leaves captions whole.
        workers: threads that decode and preprocess; 0 does it in the thread that asks.
        skip_limit: the share of the rows seen, 0 to 1, that may be bad.
        reduction: how much smaller images may be read; None: not at all.
        classes: of a table, each row's class, int64 [rows], to draw each equally often; None: all
            rows are drawn once an epoch.
        count_tokens: the number of tokens of each caption, int64 [n], to make batches of captions
            of similar length; None: of any length.
        weights: of the pairs of a label in the loss; 1 for labels not named.
        cache: where decoded images of a table are kept, if anywhere.
        features: of the images, where they are stored: then no image is read.
        pinned: put images into memory that a CUDA device can fetch by itself.
        share: the part of each batch that this process reads; the batches are those of one that
            reads alone, and so is what is skipped.
        skipped: rows that were left out, key to reason.
        seen, bad: rows of this epoch up to the last batch, and those of them left out.
        drawn: pairs drawn from each part of a mixture in all epochs, up to the last batch.

    Raises:
        DataError: the source has no rows.
    """

    source: Source
    preprocess: Callable[[Pixels, random.Random], Pixels]
    tokenize: Callable[[Sequence[str]], NDArray[np.int64]]
    split: Callable[[str], list[str]] | None
    batch_size: int
    seed: int
    workers: int
    skip_limit: float
    reduction: Reduction | None = None
    classes: NDArray[np.int64] | None = None
    count_tokens: Callable[[Sequence[str]], NDArray[np.int64]] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    cache: ImageCache | None = None
    features: Features | None = None
    pinned: bool = False
    share: Share = field(default_factory=Share)
    skipped: dict[str, str] = field(default_factory=dict, init=False)
    seen: int = field(default=0, init=False)
    bad: int = field(default=0, init=False)
    drawn: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        parts = self.source.parts
        self.drawn = [0] * len(parts)
        self._table: Table | None = None
        self._sampler: Sampler | None = None
        self._place: dict[str, Any] | None = None
        if self.source.streaming:
            return
        self._table, rows = self.source.table, self.source.count or 0
        if not rows:
            raise DataError(f"{self.source.spec} has no images, expected at least one; add some")
        lengths, classes, quotas = None, self.classes, None
        if self.count_tokens is not None:
            lengths = CaptionLengths.of(self.source, self.seed, self.count_tokens)
        sizes = [part.source.count or 0 for part in parts]
        self._ends = np.cumsum(sizes)
        if any(part.weight != 1 for part in parts):
            classes = np.repeat(np.arange(len(parts)), sizes)
            draws = [max(1, round(part.weight * n)) for part, n in zip(parts, sizes, strict=True)]
            quotas = np.array(draws, np.int64)
        self._sampler = Sampler(rows, self.batch_size, self.seed, classes, lengths, quotas)

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches in an epoch; None for a stream, whose length is not known."""
        return self._sampler.batches if self._sampler else None

    def state(self) -> dict[str, Any]:
        """What the rest of an epoch needs to know of the batches before, for a checkpoint."""
        state = {
            "skipped": self.skipped,
            "seen": self.seen,
            "bad": self.bad,
            "drawn": self.drawn,
        }
        return state | ({"place": self._place} if self._place else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave."""
        self.skipped.update(state["skipped"])
        self.seen, self.bad = state["seen"], state["bad"]
        self.drawn = [*state.get("drawn", self.drawn)]
        self._place = state.get("place")  # not there: of a table, or of an earlier version

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The batches of an epoch from number ``start`` on.

        An incomplete last batch is dropped, unless it is the only one. A row that is bad (its
        image cannot be read, it has no caption) is missing from its batch and listed in
        ``skipped``. A stream goes on at ``start`` by reading the few rows before that wait with
        the next ones, where ``restore`` has brought its place, and else all rows before.

        Raises:
            SkipLimitError: more than ``skip_limit`` of the rows seen, or a whole batch, are bad.
        """
        chunks = self._chunks(epoch, start)
        # One whole batch ahead, so that decoding goes on while the step of the last one runs.
        ahead = -(-self.batch_size // _CHUNK) + 2 * self.workers
        work = map_ordered(
            lambda chunk: (self._read(chunk), chunk),
            chunks,
            workers=self.workers,
            ahead=ahead,
        )
        if not start:
            self.seen = self.bad = 0
        # The next batch is put together meanwhile, for which a GPU would wait.
        ready = map_ordered(
            lambda one: (Gathered.of(one[0], self._nothing(), pinned=self.pinned), one[1]),
            _joined(work),
            workers=min(self.workers, 1),
            ahead=2,
        )
        for batch, place in ready:
            self._count(batch.parts, batch.bad)
            self._place = place
            yield batch.read(self.tokenize, weighted=bool(self.weights))

    def _chunks(self, epoch: int, start: int) -> Iterator[_Chunk]:
        plan: Iterator[tuple[Sequence[Any], dict[str, Any] | None]]
        if self._sampler:
            plan = self._plan(epoch, start)
        else:
            plan = stream_batches(
                self.source,
                self.batch_size,
                self.seed,
                epoch,
                start,
                self._place,
                self._lengths if self.count_tokens is not None else None,
            )
        for rows, place in plan:
            own: Sequence[Any] = rows[self.share.rank :: self.share.size]
            for i in range(0, len(own) or 1, _CHUNK):  # an empty share is one empty chunk
                yield _Chunk(own[i : i + _CHUNK], last=i + _CHUNK >= len(own), place=place)

    def _plan(self, epoch: int, start: int) -> Iterator[tuple[list[tuple[int, int]], None]]:
        """Batches of row numbers, each with how often the run has drawn the row before."""
        for draws in self._sampler.plan(epoch)[start:] if self._sampler else ():
            yield [(row, before) for row, before in draws.tolist()], None

    def _read(self, chunk: _Chunk) -> list[Pair | Skipped]:
        if self._table is None:
            return [self._pair(row, None, before, part) for row, before, part in chunk.rows]
        parts = np.searchsorted(self._ends, [n for n, _ in chunk.rows], side="right").tolist()
        return [
            self._pair(self._table.text(n), n, before, part)
            for (n, before), part in zip(chunk.rows, parts, strict=True)
        ]

    def _pair(self, row: Row, number: int | None, before: int, part: int) -> Pair | Skipped:
        key, captions = row.key, usable(row.captions)
        if not captions:
            return Skipped(key, "has no caption")
        generator = random.Random(stable_hash(self.seed, before, key))
        try:
            if self.features is None:
                image: NDArray[Any] = self.preprocess(self._pixels(row, number), generator)
            else:
                image = self.features.draw(key, generator)
        except ImageError as error:
            return Skipped(key, str(error))
        weight = self.weights.get(row.label or "", 1.0)
        return Pair(key, image, self._caption(key, captions, before), weight, part)

    def _pixels(self, row: Row, number: int | None) -> Pixels:
        if number is None or self._table is None:
            return np.asarray(row.read_image(self.reduction))
        kept = self.cache.get(number) if self.cache else None
        if kept is not None:
            return kept
        pixels = np.asarray(self._table.image(number).read(self.reduction))
        if self.cache:
            self.cache.put(number, pixels)
        return pixels

    def _caption(self, key: str, captions: list[str], before: int) -> str:
        # In turn from a random first one: n draws read each of n captions once, which leaves none
        # out by chance. Pieces of a split caption take their turns among its turns.
        turn = first_turn(self.seed, key) + before
        caption = captions[turn % len(captions)]
        if self.split is None:
            return caption
        pieces = self.split(caption)
        return pieces[turn // len(captions) % len(pieces)]

    def _lengths(self, draws: Sequence[Draw]) -> NDArray[np.int64]:
        """Tokens of the caption that each draw of a stream reads, int64 [n]; 0 if it has none."""
        assert self.count_tokens is not None
        texts = []
        for row, before, _ in draws:
            captions = usable(row.captions) or [""]
            texts.append(captions[(first_turn(self.seed, row.key) + before) % len(captions)])
        return self.count_tokens(texts)

    def _nothing(self) -> NDArray[Any]:
        """What has the form of an image, for a share of a batch without any."""
        if self.features is not None:
            features: NDArray[Any] = self.features.values[0, 0]
            return features
        return np.empty((1, 1, 3), np.uint8)

    def _count(self, parts: Sequence[int], bad: Sequence[Skipped]) -> None:
        """Count the pairs of a batch by their parts, with those that other processes read of it."""
        counts = np.bincount(parts, minlength=len(self.drawn) or 1).tolist()
        gathered = self.share.exchange((counts, [(row.key, row.reason) for row in bad]))
        for counts, rows in gathered:
            self.skipped.update(rows)
            self.bad += len(rows)
            self.seen += sum(counts) + len(rows)
            self.drawn = [n + more for n, more in zip(self.drawn, counts, strict=False)]
        self._check_limit(sum(sum(counts) for counts, _ in gathered))

    def _check_limit(self, good_in_batch: int) -> None:
        few = _FEW if self.source.count is None else min(_FEW, self.source.count)
        if good_in_batch and self.bad <= self.skip_limit * max(self.seen, few):
            return
        key, reason = next(reversed(self.skipped.items()))
        allowed = (
            f"at most {self.skip_limit:.1%} in all"
            if good_in_batch
            else "some good ones in each batch"
        )
        raise SkipLimitError(
            f"{self.bad} of {self.seen} rows of {self.source.spec} cannot be used (for example "
            f"{key}: {reason}), expected {allowed}; fix what `clipkit data check` lists, or allow "
            "more"
        )


def _joined(
    chunks: Iterable[tuple[list[Pair | Skipped], _Chunk]],
) -> Iterator[tuple[list[Pair | Skipped], dict[str, Any] | None]]:
    """The rows of whole batches, and where the next one begins."""
    batch: list[Pair | Skipped] = []
    for rows, chunk in chunks:
        batch += rows
        if chunk.last:
            yield batch, chunk.place
            batch = []
