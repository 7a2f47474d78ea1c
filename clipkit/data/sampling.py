"""Which rows a batch of training pairs is made of: shuffled, of like length, or class by class."""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Draws = NDArray[np.int64]
"""A batch as planned, [n, 2]: row numbers, and how often the run has drawn each row before."""

_SORTED_TOGETHER = 32  # batches
_LAST_DRAW, _CLASS_ORDER, _BATCH_ORDER = 1, 2, 3  # streams of random numbers beside the rows' own


@dataclass(frozen=True)
class CaptionLengths:
    """Lengths of a table's captions, and which caption of a row is read when.

    Attributes:
        tokens: of all captions in the order of their rows, int64 [captions].
        first: where in ``tokens`` each row's begin, int64 [rows].
        count: how many each row has, int64 [rows].
        turn: the turn of each row's captions at its first draw, int64 [rows].
    """

    tokens: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    turn: NDArray[np.int64]

    def drawn(self, draws: Draws) -> NDArray[np.int64]:
        """Length of the caption that each draw reads, int64 [n]; 0 for a row without captions."""
        rows, before = draws.T
        place = (self.turn[rows] + before) % np.maximum(self.count[rows], 1)
        found = self.tokens[np.minimum(self.first[rows] + place, len(self.tokens) - 1)]
        return np.where(self.count[rows] > 0, found, 0)


@dataclass(frozen=True)
class Sampler:
    """The plan of an epoch: a list of batches that depends on seed and epoch alone.

    Attributes:
        rows: of the table.
        batch_size: rows per batch.
        seed: of the run.
        classes: each row's class, counted from 0, int64 [rows]: every class is equally likely;
            None: every row is.
        lengths: batches are made of captions of like length; None: of any.
    """

    rows: int
    batch_size: int
    seed: int
    classes: NDArray[np.int64] | None
    lengths: CaptionLengths | None

    @property
    def batches(self) -> int:
        """Batches in an epoch; an incomplete last one is dropped, unless it is the only one."""
        return max(1, self.rows // self.batch_size)

    def plan(self, epoch: int) -> list[Draws]:
        """The batches of an epoch, in order."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self.rows)
        draws = np.stack([order, np.full_like(order, epoch)], axis=1)
        if self.classes is not None:
            draws = self._balanced(self.classes, epoch)[order]
        # What does not fill a batch is dropped before anything is sorted: by chance alone.
        draws = draws[: self.batches * self.batch_size]
        if self.lengths is None:
            return np.split(draws, self.batches)
        lengths = self.lengths.drawn(draws)
        together = _SORTED_TOGETHER * self.batch_size
        parts = range(0, len(draws), together)
        sort = [at + np.argsort(lengths[at : at + together], kind="stable") for at in parts]
        batches = np.split(draws[np.concatenate(sort)], self.batches)
        places = np.random.default_rng([self.seed, epoch, _BATCH_ORDER]).permutation(self.batches)
        return [batches[place] for place in places]

    def _balanced(self, classes: NDArray[np.int64], epoch: int) -> Draws:
        """As many draws as there are rows, equally many of each class, in no order.

        Each class goes through its own rows in one endless sequence of permutations, of which an
        epoch takes the next piece: no row is drawn twice before all others of its class were.
        """
        ends = np.cumsum(np.bincount(classes))
        members = np.split(np.argsort(classes, kind="stable"), ends[:-1])
        each, left = divmod(self.rows, len(members))
        parts = [
            self._piece(rows, number, epoch * each, (epoch + 1) * each)
            for number, rows in enumerate(members)
        ]
        # What the classes cannot share equally goes to some of them, by lot.
        random = np.random.default_rng([self.seed, epoch, _LAST_DRAW])
        lucky = random.permutation(len(members))[:left]
        last = [[random.choice(members[number]), epoch] for number in lucky]
        return np.concatenate([*parts, np.array(last, np.int64).reshape(-1, 2)])

    def _piece(self, members: NDArray[np.int64], number: int, start: int, end: int) -> Draws:
        passes = range(start // len(members), -(-end // len(members)))
        whole = [
            np.random.default_rng([self.seed, number, turn, _CLASS_ORDER]).permutation(members)
            for turn in passes
        ]
        if not whole:
            return np.empty((0, 2), np.int64)
        rows = np.concatenate(whole)
        turns = np.repeat(np.array(passes), len(members))
        offset = start - passes[0] * len(members)
        return np.stack([rows, turns], axis=1)[offset : offset + end - start]


def stable_hash(*parts: object) -> int:
    """A hash of 64 bits that is the same in every process, unlike Python's own of a text."""
    text = "\0".join(map(str, parts)).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


def first_turn(seed: int, key: str) -> int:
    """Which of a row's captions, modulo their number, its first draw reads; the next, the next."""
    return stable_hash(seed, key)
