"""Image–caption pairs as batches, the same ones whenever asked."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipkit.data.images import Skipped
from clipkit.data.sources import Source, row_image
from clipkit.data.workers import map_ordered
from clipkit.errors import DataError, ImageError, SkipLimitError

Row = dict[str, Any]

SHUFFLE_BUFFER = 1000  # rows of a stream, still encoded: about 100 MB of photos
# Rows a thread reads at a time: one look-up in the table for all of them, yet enough parts in a
# batch to keep every thread busy.
_CHUNK = 16
# Fewer rows than this say little about the share that is bad.
_FEW = 1000


@dataclass(frozen=True)
class PairBatch:
    """What the training loop eats: images ``[n, 3, height, width]``, tokens ``int64 [n, 77]``."""

    images: Tensor
    tokens: Tensor
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class _Pair:
    key: str
    pixels: NDArray[np.uint8]
    caption: str


@dataclass(frozen=True)
class _Chunk:
    """Rows, or their numbers in the table, that one thread reads; ``last`` ends a batch."""

    rows: Sequence[Any]
    last: bool


@dataclass
class PairLoader:
    """Batches of a source's pairs.

    Order, choice of caption and augmentation depend on the seed, the epoch and the row's key
    alone, never on workers or timing, so that a run resumes exactly.

    Attributes:
        preprocess: an RGB image and its random generator to uint8 ``[height, width, 3]``, of one
            size for all; called from several threads.
        tokenize: captions to ``int64 [n, 77]``; called from the thread that asks for batches.
        split: parts a caption that is too long into several; None leaves captions whole.
        workers: threads that decode and preprocess; 0 does it in the thread that asks.
        skip_limit: the share of the rows seen, 0 to 1, that may be bad.
        skipped: rows that were left out, key to reason.

    Raises:
        DataError: the source has no rows.
    """

    source: Source
    preprocess: Callable[[Image.Image, random.Random], NDArray[np.uint8]]
    tokenize: Callable[[Sequence[str]], NDArray[np.int64]]
    split: Callable[[str], list[str]] | None
    batch_size: int
    seed: int
    workers: int
    skip_limit: float
    skipped: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.source.streaming and not len(self.source.rows):
            raise DataError(f"{self.source.spec} has no images, expected at least one; add some")

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches in an epoch; None for a stream, whose length is not known."""
        if self.source.streaming:
            return None
        return max(1, len(self.source.rows) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The batches of an epoch from number ``start`` on.

        An incomplete last batch is dropped, unless it is the only one. A row that is bad (its
        image cannot be read, it has no caption) is missing from its batch and listed in
        ``skipped``. A stream is shuffled within a buffer of 1,000 rows, and its ``start`` is
        reached by passing over the rows before.

        Raises:
            SkipLimitError: more than ``skip_limit`` of the rows seen, or a whole batch, are bad.
        """
        chunks = self._chunks(epoch, start)
        # One whole batch ahead, so that decoding goes on while the step of the last one runs.
        ahead = -(-self.batch_size // _CHUNK) + 2 * self.workers
        work = map_ordered(
            lambda chunk: (self._read(chunk, epoch), chunk.last),
            chunks,
            workers=self.workers,
            ahead=ahead,
        )
        seen = bad = 0
        pairs: list[_Pair] = []
        for results, last in work:
            for result in results:
                seen += 1
                if isinstance(result, _Pair):
                    pairs.append(result)
                else:
                    bad += 1
                    self.skipped[result.key] = result.reason
            if last:
                self._check_limit(bad, seen, len(pairs))
                yield self._collate(pairs)
                pairs = []

    def _chunks(self, epoch: int, start: int) -> Iterator[_Chunk]:
        for rows in (
            self._stream(epoch, start) if self.source.streaming else self._plan(epoch, start)
        ):
            for i in range(0, len(rows), _CHUNK):
                yield _Chunk(rows[i : i + _CHUNK], last=i + _CHUNK >= len(rows))

    def _plan(self, epoch: int, start: int) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source.rows))
        for number in range(start, self.batches_per_epoch or 0):
            yield order[number * self.batch_size : (number + 1) * self.batch_size].tolist()

    def _stream(self, epoch: int, start: int) -> Iterator[list[Row]]:
        seed = _stable_hash(self.seed, epoch) % 2**32
        rows = self.source.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        stream = iter(rows.skip(start * self.batch_size))
        for number in count(start):
            batch = list(islice(stream, self.batch_size))
            if not batch or (number and len(batch) < self.batch_size):
                return
            yield batch

    def _read(self, chunk: _Chunk, epoch: int) -> list[_Pair | Skipped]:
        rows = chunk.rows
        if not self.source.streaming:
            columns = self.source.rows[rows]
            rows = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
        return [self._pair(row, epoch) for row in rows]

    def _pair(self, row: Row, epoch: int) -> _Pair | Skipped:
        key = row["key"]
        captions = [caption for caption in row["captions"] if caption and caption.strip()]
        if not captions:
            return Skipped(key, "has no caption")
        generator = random.Random(_stable_hash(self.seed, epoch, key))
        try:
            pixels = self.preprocess(row_image(row), generator)
        except ImageError as error:
            return Skipped(key, str(error))
        return _Pair(key, pixels, self._caption(key, captions, epoch))

    def _caption(self, key: str, captions: list[str], epoch: int) -> str:
        # In turn from a random first one: n epochs read each of n captions once, which leaves none
        # out by chance. Pieces of a split caption take their turns among its turns.
        turn = _stable_hash(self.seed, key) + epoch
        caption = captions[turn % len(captions)]
        if self.split is None:
            return caption
        pieces = self.split(caption)
        return pieces[turn // len(captions) % len(pieces)]

    def _collate(self, pairs: list[_Pair]) -> PairBatch:
        pixels = torch.from_numpy(np.stack([pair.pixels for pair in pairs]))
        tokens = torch.from_numpy(self.tokenize([pair.caption for pair in pairs]))
        # A view: channels stay last in memory, as convolutions like them.
        return PairBatch(pixels.permute(0, 3, 1, 2), tokens, [pair.key for pair in pairs])

    def _check_limit(self, bad: int, seen: int, good_in_batch: int) -> None:
        few = _FEW if self.source.streaming else min(_FEW, len(self.source.rows))
        if good_in_batch and bad <= self.skip_limit * max(seen, few):
            return
        key, reason = next(reversed(self.skipped.items()))
        allowed = (
            f"at most {self.skip_limit:.1%} in all"
            if good_in_batch
            else "some good ones in each batch"
        )
        raise SkipLimitError(
            f"{bad} of {seen} rows of {self.source.spec} cannot be used (for example {key}: "
            f"{reason}), expected {allowed}; mend what `clipkit data check` lists, or allow more"
        )


def _stable_hash(*parts: object) -> int:
    """A hash that is the same in every process, unlike Python's own of a text."""
    text = "\0".join(map(str, parts)).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
