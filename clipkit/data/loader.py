"""Load image–caption pairs in batches: read, decode, augment and collate them in threads.

Batches depend on the seed and the epoch alone, so a run resumes exactly; several processes each
read a part of every batch.
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
        rank: rank of this process.
        size: number of processes.
        all_gather: gathers a value of every process, by rank; the values must be JSON-serialisable.
            It is called once a batch, with counts and the rows that could not be used, because
            every process must stop at the same batch if too many are bad.
    """

    rank: int = 0
    size: int = 1
    all_gather: Callable[[Any], list[Any]] = field(default=_alone)


@dataclass(frozen=True)
class PairBatch:
    """A batch for the training loop.

    Attributes:
        images: uint8 [n, 3, height, width], or cached features of them, float32 [n, …].
        tokens: int64 [n, 77].
        keys: the keys of the images.
        weights: float32 [n], weights of the pairs in the loss; None if all are equal.
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
class Collated:
    """A batch whose captions are not tokenized yet.

    Attributes:
        images: as in ``PairBatch``.
        captions, keys, weights: those of the same pairs.
        parts: for each pair, the number of its source in a mixture.
        bad: rows that could not be used.
    """

    images: Tensor
    captions: list[str]
    keys: list[str]
    weights: list[float]
    parts: list[int]
    bad: list[Skipped]

    @classmethod
    def of(cls, rows: Sequence[Pair | Skipped], blank: NDArray[Any], *, pinned: bool) -> "Collated":
        """Collate the rows of a batch.

        Args:
            rows: pairs, and rows that could not be used.
            blank: an array of the shape of an image, for a batch without images.
            pinned: put images into pinned memory, from which a CUDA device copies asynchronously.
        """
        pairs = [row for row in rows if isinstance(row, Pair)]
        arrays = [pair.image for pair in pairs] or [blank]
        if blank.dtype == np.uint8:
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

    def tokenized(
        self, tokenize: Callable[[Sequence[str]], NDArray[np.int64]], *, weighted: bool
    ) -> PairBatch:
        """The batch with tokens, and with weights if ``weighted``."""
        tokens = torch.from_numpy(tokenize(self.captions))
        weights = torch.tensor(self.weights) if weighted else None
        return PairBatch(self.images, tokens, self.keys, weights)


# Rows that a thread reads at a time: enough to share one table look-up, few enough to keep every
# thread busy.
_CHUNK = 16
# Fewest rows that the fraction of bad rows is taken of, so that an early one does not stop a run.
_FEW = 1000


@dataclass(frozen=True)
class _Chunk:
    """Rows, or row numbers of the table, for one thread; ``last`` marks the end of a batch.

    For a stream, ``place`` is where the next batch begins.
    """

    rows: Sequence[Any]
    last: bool
    place: dict[str, Any] | None


@dataclass
class PairLoader:
    """Batches of the pairs of a source.

    Order, choice of caption and augmentation depend only on the seed, the epoch and the row's key,
    never on workers, timing or caches, so a run resumes exactly.

    Attributes:
        preprocess: maps an image, uint8 [h, w, 3], and a random generator to uint8
            [height, width, 3], of one size for all images; called from several threads.
        tokenize: maps captions to int64 [n, 77]; called from the thread that asks for batches.
        split: splits a caption that is too long into several; None leaves captions whole.
        workers: threads that decode and preprocess; 0 uses the thread that asks.
        skip_limit: maximum fraction of bad rows among those seen, in [0, 1].
        reduction: the factor by which images may be decoded smaller; None: full size.
        classes: int64 [rows], the class of each row of a table, to draw all classes equally often;
            None draws every row once an epoch.
        count_tokens: counts the tokens of captions, int64 [n], for length bucketing; None turns it
            off.
        weights: loss weights by label; 1 for labels that are not named.
        cache: cache of decoded images of a table, if any.
        features: cached features of the images; no image is read then.
        pinned: put images into pinned memory, from which a CUDA device copies asynchronously.
        share: the part of each batch that this process reads; batches and skipped rows are those of
            a single process.
        skipped: reasons by key, of the rows that were left out.
        seen, bad: number of rows of this epoch up to the last batch, and of those left out.
        drawn: number of pairs drawn from each source of a mixture in all epochs, up to the last
            batch.

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
        """The state after the last batch, for a checkpoint."""
        state = {
            "skipped": self.skipped,
            "seen": self.seen,
            "bad": self.bad,
            "drawn": self.drawn,
        }
        return state | ({"place": self._place} if self._place else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` returned."""
        self.skipped.update(state["skipped"])
        self.seen, self.bad = state["seen"], state["bad"]
        self.drawn = [*state.get("drawn", self.drawn)]
        self._place = state.get("place")  # absent for tables and in old checkpoints

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The batches of an epoch from number ``start`` on.

        An incomplete last batch is dropped, unless it is the only one. A bad row (an unreadable
        image, or no caption) is left out of its batch and listed in ``skipped``. After ``restore``
        a stream continues at ``start`` by reading again only the rows that wait in its shuffle
        buffer; otherwise it reads all rows before.

        Raises:
            SkipLimitError: more than ``skip_limit`` of the rows seen, or a whole batch, are bad.
        """
        chunks = self._chunks(epoch, start)
        # One whole batch ahead, so that decoding continues during a training step.
        ahead = -(-self.batch_size // _CHUNK) + 2 * self.workers
        work = map_ordered(
            lambda chunk: (self._read(chunk), chunk),
            chunks,
            workers=self.workers,
            ahead=ahead,
        )
        if not start:
            self.seen = self.bad = 0
        # Collate the next batch in the background: a GPU would wait for it.
        ready = map_ordered(
            lambda one: (Collated.of(one[0], self._blank(), pinned=self.pinned), one[1]),
            _joined(work),
            workers=min(self.workers, 1),
            ahead=2,
        )
        for batch, place in ready:
            self._count(batch.parts, batch.bad)
            self._place = place
            yield batch.tokenized(self.tokenize, weighted=bool(self.weights))

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
        """Batches of row numbers, each with the number of earlier draws of that row."""
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
        # Round robin from a random first one, so n draws read each of n captions once. The pieces
        # of a split caption take turns, too.
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

    def _blank(self) -> NDArray[Any]:
        """An array of the shape of an image, for a share of a batch without images."""
        if self.features is not None:
            features: NDArray[Any] = self.features.values[0, 0]
            return features
        return np.empty((1, 1, 3), np.uint8)

    def _count(self, parts: Sequence[int], bad: Sequence[Skipped]) -> None:
        """Count the pairs of a batch by source, over all processes."""
        counts = np.bincount(parts, minlength=len(self.drawn) or 1).tolist()
        gathered = self.share.all_gather((counts, [(row.key, row.reason) for row in bad]))
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
    """The rows of each whole batch, and where the next one begins."""
    batch: list[Pair | Skipped] = []
    for rows, chunk in chunks:
        batch += rows
        if chunk.last:
            yield batch, chunk.place
            batch = []
