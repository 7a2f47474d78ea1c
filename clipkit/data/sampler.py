"""Which rows a batch of training pairs is made of: shuffled, of like length, or class by class.

What the labels of a table of pairs decide: how often a row is drawn, and what it weighs.

Keep a part of the training pairs aside, to measure on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from hashlib import blake2b
from typing import Self

import numpy as np
from numpy.typing import NDArray

from clipkit.data.source import Source, chunks, mix, usable
from clipkit.errors import ConfigError, DataError

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

    @classmethod
    def of(
        cls, source: Source, seed: int, count_tokens: Callable[[Sequence[str]], NDArray[np.int64]]
    ) -> Self:
        """Count the tokens of all captions of a table.

        Args:
            source: a table of pairs.
            seed: of the run; selects the caption with which each image starts.
            count_tokens: the number of tokens of each caption, int64 [n].
        """
        tokens, counts, turns = [np.empty(0, np.int64)], [], []
        for rows in chunks(source.table.texts(), 1000):
            texts = [usable(row.captions) for row in rows]
            counts += [len(captions) for captions in texts]
            turns += [
                first_turn(seed, row.key) % max(len(captions), 1)
                for row, captions in zip(rows, texts, strict=True)
            ]
            tokens.append(count_tokens([text for captions in texts for text in captions]))
        count = np.array(counts, np.int64)
        first = np.cumsum(count) - count
        return cls(np.concatenate(tokens), first, count, np.array(turns, np.int64))

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
        quotas: draws of each class in an epoch, int64 [classes]; None: equally many.
    """

    rows: int
    batch_size: int
    seed: int
    classes: NDArray[np.int64] | None
    lengths: CaptionLengths | None
    quotas: NDArray[np.int64] | None = None

    @property
    def draws(self) -> int:
        """Rows drawn in an epoch, each as often as it is drawn."""
        return self.rows if self.quotas is None else int(self.quotas.sum())

    @property
    def batches(self) -> int:
        """Batches in an epoch; an incomplete last one is dropped, unless it is the only one."""
        return max(1, self.draws // self.batch_size)

    def plan(self, epoch: int) -> list[Draws]:
        """The batches of an epoch, in order."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self.draws)
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
        """The draws of an epoch, as many of each class as it has to have, in no order.

        Each class goes through its own rows in one endless sequence of permutations, of which an
        epoch takes the next piece: no row is drawn twice before all others of its class were.
        """
        ends = np.cumsum(np.bincount(classes))
        members = np.split(np.argsort(classes, kind="stable"), ends[:-1])
        each, left = divmod(self.rows, len(members))
        quotas = [each] * len(members) if self.quotas is None else self.quotas.tolist()
        parts = [
            self._piece(rows, number, epoch * quota, (epoch + 1) * quota)
            for number, (rows, quota) in enumerate(zip(members, quotas, strict=True))
        ]
        if self.quotas is not None:
            return np.concatenate(parts)
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


_SHOWN = 8  # labels


def class_numbers(source: Source) -> NDArray[np.int64]:
    """Each row's label as a number counted from 0, int64 [rows].

    Raises:
        ConfigError: the source streams, or is a mixture with weights.
        DataError: a row has no label.
    """
    if source.streaming:
        raise ConfigError(
            f"data.balance draws rows at random, but {source.spec} streams; set "
            'data.streaming = "no", or leave data.balance empty'
        )
    if any(part.weight != 1 for part in source.parts):
        raise ConfigError(
            "data.balance and data.weights both say how often a pair is drawn; leave one of them "
            "empty"
        )
    labels = source.table.labels
    bare = [number for number, label in enumerate(labels) if not label]
    if bare:
        key = source.table.text(bare[0]).key
        raise DataError(
            f"{len(bare)} of {len(labels)} rows of {source.spec} have no label (for example "
            f'{key}), expected one in each for data.balance = "label"; name data.label_column, '
            "or leave data.balance empty"
        )
    numbers: NDArray[np.int64] = np.unique(np.array(labels, str), return_inverse=True)[1].astype(
        np.int64
    )
    return numbers


def require_labels(source: Source, weights: Mapping[str, float]) -> None:
    """Refuse weights of labels that no row of a table has; those of a stream are not known.

    Raises:
        DataError: a label named in ``weights`` does not occur; with the nearest that does.
    """
    if source.streaming or not weights:
        return
    known = sorted({label for label in source.table.labels if label is not None})
    for label in weights:
        if label in known:
            continue
        close = get_close_matches(label, known, n=1)
        some = ", ".join(known[:_SHOWN]) + (", …" if len(known) > _SHOWN else "")
        hint = f"did you mean {close[0]!r}" if close else f"its labels are: {some or 'none'}"
        raise DataError(
            f"data.caption_weights names {label!r}, which is not a label of {source.spec} ({hint})"
        )


HELD_OUT_MOST = 1000
"""Most images held out: enough to tell models apart, few enough to measure often."""


def split_held_out(
    source: Source, share: float, seed: int, most: int = HELD_OUT_MOST
) -> tuple[Source, Source | None]:
    """Split a source into pairs to train on and pairs held out.

    Args:
        source: all pairs.
        share: share of the images to hold out, in [0, 1), at most ``most`` images. Of a stream,
            whose length is not known, a hash of the key decides, and of those held out the first
            ``most`` are measured on. Each part of a mixture is split.
        seed: decides which.
        most: maximum number of images held out.

    Returns:
        the pairs to train on, and those held out (None if the share comes to nothing).
    """
    if not share:
        return source, None
    if source.parts:
        each = max(1, most // len(source.parts))
        split = [split_held_out(part.source, share, seed, each) for part in source.parts]
        weights = [part.weight for part in source.parts]
        kept = mix([training for training, _ in split], weights)
        held = [held for _, held in split if held is not None]
        return replace(kept, spec=source.spec), mix(held) if held else None
    if source.streaming:
        stream = source.stream
        rest = stream.filter(lambda row: not _is_held(row.key, share, seed))
        some = stream.filter(lambda row: _is_held(row.key, share, seed)).take(most)
        if next(iter(some), None) is None:  # a short stream, of which chance held out nothing
            return source, None
        return replace(source, rows=rest), replace(source, rows=some)
    rows = source.table
    count = min(most, round(share * len(rows)))
    if not count:
        return source, None
    order = np.random.default_rng(seed).permutation(len(rows))
    training, held_out = np.sort(order[count:]), np.sort(order[:count])
    return replace(source, rows=rows.select(training)), replace(source, rows=rows.select(held_out))


def _is_held(key: str, share: float, seed: int) -> bool:
    digest = blake2b(f"{seed} {key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
