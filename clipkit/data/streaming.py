"""The batches of an epoch of a stream, shuffled, from its start or from where a run stood."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.rows import Place, Row, Stream, Table
from clipkit.data.sampler import stable_hash
from clipkit.data.source import Part, Source
from clipkit.progress import is_main_process, print_status

LANES = 16
"""Shards of a shuffled stream that are read at once."""
PART = 128
"""Rows of a shuffled stream that are read together."""
WAITS = 16
"""A row of a shuffled stream leaves with its own part or with one of the 15 after it. On average
half as many parts wait: about 1,100 rows, still encoded, or 110 MB of photos."""


def shuffle_sizes() -> list[int]:
    """What a state of a shuffled stream holds for, and no other sizes."""
    return [LANES, PART, WAITS]


class _Lanes:
    """Rows of several shards at once, one of each in turn, for ever the same from a state on."""

    def __init__(self, stream: Stream, order: list[int], state: dict[str, Any]) -> None:
        self._stream, self._order = stream, order
        self._opened, self._turn = state["opened"], state["turn"]
        self._numbers = [number for number, _ in state["lanes"]]
        self._places = [place for _, place in state["lanes"]]
        self._rows = [self._open(number, place) for number, place in state["lanes"]]

    def state(self) -> dict[str, Any]:
        """Where it stands: shards opened so far, whose turn it is, and those open with places."""
        lanes = [list(lane) for lane in zip(self._numbers, self._places, strict=True)]
        return {"opened": self._opened, "turn": self._turn, "lanes": lanes}

    def __iter__(self) -> Iterator[Row]:
        while self._fill():
            self._turn %= len(self._rows)
            found = next(self._rows[self._turn], None)
            if found is None:
                for lane in (self._numbers, self._places, self._rows):
                    del lane[self._turn]
                continue
            row, self._places[self._turn] = found
            self._turn += 1
            yield row

    def _fill(self) -> bool:
        """Open shards until enough are open; whether any is."""
        while len(self._rows) < LANES and self._opened < len(self._order):
            number = self._order[self._opened]
            self._numbers.append(number)
            self._places.append(None)
            self._rows.append(self._open(number, None))
            self._opened += 1
        return bool(self._rows)

    def _open(self, number: int, place: Place | None) -> Iterator[tuple[Row, Place]]:
        return self._stream.rows(self._stream.shards[number], place)


class Shuffled:
    """The rows of a stream in the random order of an epoch, from its start or from a state on.

    Shards are read in random order, ``LANES`` of them at once with a row of each in turn, in parts
    of ``PART`` rows. A part's rows leave evenly with it and the next ``WAITS - 1`` parts, by lot,
    and what leaves together is permuted. Rows in one batch are thus as seldom neighbours in the
    source as those of a buffer of 1,000 rows, out of which a random one is taken for each that is
    put in (P(both of a pair within d rows of each other) = d / 1024, there d / 1000). But how long
    a row waits there is not bounded, so that only reading all again brings such a buffer back;
    here the last ``WAITS`` parts bring back all that waits.

    Args:
        stream: what to shuffle.
        seed: at least 0.
        epoch: at least 0.
        state: where to go on, as ``state`` gave it for the same stream, seed and epoch.
    """

    def __init__(
        self, stream: Stream, seed: int, epoch: int, state: dict[str, Any] | None = None
    ) -> None:
        self._seed = [seed, epoch]
        self._part: int = state["part"] if state else 0
        self._done: int = state["done"] if state else 0
        order = np.random.default_rng(self._seed).permutation(len(stream.shards)).tolist()
        begin = state["lanes"] if state else {"opened": 0, "turn": 0, "lanes": []}
        self._lanes = _Lanes(stream, order, begin)
        self._starts = deque([begin], WAITS)

    def state(self) -> dict[str, Any]:
        """Where the next row lies: the part it leaves with, how many of that part left before it,
        and where the first part begins that some of its rows may come from.
        """
        return {"part": self._part, "done": self._done, "lanes": self._starts[0]}

    def __iter__(self) -> Iterator[Row]:
        wanted, rows = self._part, iter(self._lanes)
        waiting: defaultdict[int, list[Row]] = defaultdict(list)
        self._starts.clear()
        for number in count(max(0, wanted - WAITS + 1)):
            self._starts.append(self._lanes.state())
            part = list(islice(rows, PART))
            draw = np.random.default_rng([*self._seed, number])
            for turn, place in enumerate(draw.permutation(len(part))):
                # The first rows wait until there is something to mix them with.
                waiting[max(number + turn % WAITS, WAITS // 2)].append(part[place])
            ended = len(part) < PART
            due = sorted(waiting) if ended else [number]
            leaving = [row for one in due for row in waiting.pop(one, [])]
            if number >= wanted:
                self._part = number
                for place in draw.permutation(len(leaving))[self._done :]:
                    self._done += 1
                    yield leaving[place]
                self._done = 0
            if ended:
                return


class _ShuffledTable:
    """The rows of a table in the random order of an epoch, from its start or from a state on."""

    def __init__(self, table: Table, seed: int, epoch: int, done: int | None) -> None:
        self._table, self._seed, self._done = table, [seed, epoch], done or 0

    def state(self) -> int:
        """How many rows were given."""
        return self._done

    def __iter__(self) -> Iterator[Row]:
        order = np.random.default_rng(self._seed).permutation(len(self._table))
        for number in order[self._done :].tolist():
            self._done += 1
            yield self._table[number]


class _Passes:
    """The rows of a part of a mixture in an epoch: as many passes over them as its weight says.

    Of the last pass only a fraction of the rows is drawn if the weight is not a whole number: those
    whose keys have a hash below it.
    """

    def __init__(self, part: Part, seed: int, epoch: int, state: list[Any] | None) -> None:
        self._rows, self._weight, self._seed = part.rows, part.weight, seed
        self._pass, self._at = state or [0, None]
        self._before = epoch * math.ceil(part.weight)
        self._shuffled: _ShuffledTable | Shuffled | None = None

    def state(self) -> list[Any]:
        """The pass, and where its next row lies."""
        return [self._pass, self._shuffled.state() if self._shuffled else self._at]

    def __iter__(self) -> Iterator[tuple[Row, int]]:
        """The rows, each with how often the run may have drawn it before."""
        while self._pass < self._weight:
            number, fraction = self._before + self._pass, self._weight - self._pass
            rows, of = self._rows, (self._seed, number, self._at)
            self._shuffled = (
                _ShuffledTable(rows, *of) if isinstance(rows, Table) else Shuffled(rows, *of)
            )
            for row in self._shuffled:
                if fraction >= 1 or _unit(self._seed, number, row.key) < fraction:
                    yield row, number
            self._shuffled, self._at = None, None
            self._pass += 1


Draw = tuple[Row, int, int]
"""A row, how often the run has drawn it before, and the number of its part of a mixture."""


class _ShuffledParts:
    """The draws of an epoch from all parts of a source, mixed at random.

    The next row comes from a part with a probability in proportion to the rows that are left of it,
    so that all parts end at about the same time. How many rows a stream has is estimated from its
    first shard.
    """

    def __init__(
        self, source: Source, seed: int, epoch: int, state: dict[str, Any] | None = None
    ) -> None:
        parts = source.parts
        self._seed = [seed, epoch]
        begin = state or {
            "turn": 0,
            "open": list(range(len(parts))),
            "left": [part.weight * _expected_rows(part.rows) for part in parts],
            "passes": [None] * len(parts),
        }
        self._turn, self._open, self._left = begin["turn"], [*begin["open"]], [*begin["left"]]
        self._passes = [
            _Passes(part, stable_hash(seed, number), epoch, at)
            for number, (part, at) in enumerate(zip(parts, begin["passes"], strict=True))
        ]

    def state(self) -> dict[str, Any]:
        """Where the next row lies."""
        return {
            "turn": self._turn,
            "open": [*self._open],
            "left": [*self._left],
            "passes": [passes.state() for passes in self._passes],
        }

    def __iter__(self) -> Iterator[Draw]:
        rows = [iter(passes) for passes in self._passes]
        while self._open:
            ends = np.cumsum([max(self._left[number], 1) for number in self._open])
            chosen = _unit(*self._seed, self._turn) * ends[-1]
            number = self._open[int(np.searchsorted(ends, chosen, side="right"))]
            found = next(rows[number], None)
            if found is None:
                self._open.remove(number)
                continue
            self._turn += 1
            self._left[number] -= 1
            yield *found, number


def _unit(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return stable_hash(*parts) / 2**64


def _expected_rows(rows: Table | Stream) -> int:
    if isinstance(rows, Table):
        return len(rows)
    first = sum(len(batch) for batch, _ in rows.read(rows.shards[0], None))
    return first * len(rows.shards)


_PASSING = (
    "the checkpoint does not say where in {spec}, as it is now, the rest of this epoch begins; the "
    "{start} batches before are read again, but not decoded"
)
_SORTED_ROWS = WAITS * PART
"""Rows of a stream that are sorted by length together; at least two batches."""


def stream_batches(
    source: Source,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int,
    place: dict[str, Any] | None,
    lengths: Callable[[list[Draw]], NDArray[np.int64]] | None = None,
) -> Iterator[tuple[list[Draw], dict[str, Any]]]:
    """Rows of a stream in batches, the same ones whenever asked, each with the place after it.

    Args:
        source: what is read.
        batch_size: rows; an incomplete last batch is dropped, unless it is the only one.
        seed: of the run.
        epoch: its number.
        start: the batch to begin with.
        place: that of the batch before. If it is of another batch, of another version of the source
            or of clipkit, or missing, the rows before are read and passed over, with a message.
        lengths: gives the length of the caption that each draw reads. Draws are then sorted by it
            within groups of batches, and the batches of a group are shuffled. None: any lengths.
    """
    group = 1 if lengths is None else max(2, _SORTED_ROWS // batch_size)
    sizes = shuffle_sizes() + ([group] if lengths else [])
    about = {"source": source.fingerprint, "epoch": epoch, "sizes": sizes}
    place = place or {}
    known = all(place.get(name) == value for name, value in (about | {"batch": start}).items())
    state = place["rows"] if known else None
    shuffled: _ShuffledParts | Shuffled
    if source.parts:
        shuffled = _ShuffledParts(source, seed, epoch, state)
        draws = iter(shuffled)
    else:
        shuffled = Shuffled(source.stream, seed, epoch, state)
        draws = ((row, epoch, 0) for row in shuffled)
    if start and not known:
        if is_main_process():
            print_status(_PASSING.format(spec=source.spec, start=start))
        deque(islice(draws, start // group * group * batch_size), maxlen=0)
    for number in count(start // group):
        before = shuffled.state()
        some = list(islice(draws, group * batch_size))
        batches = _batches(some, batch_size, keep_incomplete=not number)
        if lengths is not None:
            batches = _by_length(batches, lengths, [seed, epoch, number])
        after = shuffled.state()
        for turn, batch in enumerate(batches, number * group):
            if turn >= start:
                rows = after if turn + 1 == (number + 1) * group else before
                yield batch, about | {"batch": turn + 1, "rows": rows}
        if len(batches) < group:
            return


def _batches(draws: list[Draw], size: int, *, keep_incomplete: bool) -> list[list[Draw]]:
    """Whole batches; an incomplete one only if it is the only one and wanted."""
    whole = len(draws) // size * size or (len(draws) if keep_incomplete else 0)
    return [draws[at : at + size] for at in range(0, whole, size)]


def _by_length(
    batches: list[list[Draw]],
    lengths: Callable[[list[Draw]], NDArray[np.int64]],
    seed: list[int],
) -> list[list[Draw]]:
    """The same draws in batches of similar length, which are in random order."""
    if not batches:
        return batches
    draws = [draw for batch in batches for draw in batch]
    order = np.argsort(lengths(draws), kind="stable").reshape(len(batches), -1)
    shuffled = np.random.default_rng(seed).permutation(len(batches))
    return [[draws[at] for at in order[number].tolist()] for number in shuffled.tolist()]
