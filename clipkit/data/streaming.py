"""The batches of an epoch of a stream, from its start or from where a run stood.

Rows that can only be read in order: shard by shard, shuffled, and gone on with anywhere.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.data.source import Row, Source
from clipkit.progress import is_main_process, print_status

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


Position = Any
"""Where a shard's reader goes on, in values that JSON could hold; None is the shard's start."""
Read = Callable[[Any, Position], Iterator[tuple["pa.RecordBatch", Position]]]
"""Gives the rows of a shard from a position on, in batches, each with the position after it."""
Place = list[Any]
"""The position of a batch, and how many of its rows come before."""

LANES = 16
"""Shards of a shuffled stream that are read at once."""
PART = 128
"""Rows of a shuffled stream that are read together."""
WAITS = 16
"""A row of a shuffled stream leaves with its own part or with one of the 15 after it. On average
half as many parts wait: about 1,100 rows, still encoded, or 110 MB of photos."""
_HELD = 16  # rows of a batch that are made Python's at a time
_TABLE_ROWS = 1000  # rows of a table in a batch, as many as `datasets` writes in one piece


@dataclass(frozen=True)
class Stream:
    """Rows in the order of their shards, which are read from the start or from anywhere.

    Rows of the same image file are merged where they follow each other in a shard; beyond that,
    keys are not checked, which would take memory without bound.

    Attributes:
        read: reads a shard.
        shards: what ``read`` is given, one by one.
        steps: what each row goes through; each gives the row, changed or not, or None to leave it
            out.
        most: rows in all; None: as many as there are.
    """

    read: Read
    shards: list[Any]
    steps: tuple[Callable[[Row], Row | None], ...] = ()
    most: int | None = None

    def __iter__(self) -> Iterator[Row]:
        rows = (row for shard in self.shards for row, _ in self.rows(shard))
        return islice(rows, self.most)

    def filter(self, keep: Callable[[Row], bool]) -> "Stream":
        """The rows that ``keep`` says yes to."""
        return replace(self, steps=(*self.steps, lambda row: row if keep(row) else None))

    def map(self, change: Callable[[Row], Row]) -> "Stream":
        """All rows, with the values that ``change`` gives for each."""
        return replace(self, steps=(*self.steps, lambda row: row | change(row)))

    def take(self, most: int) -> "Stream":
        """The first rows, when they are read in order."""
        return replace(self, most=most)

    def batches(self) -> Iterator["pa.RecordBatch"]:
        """What the shards hold, in order, before anything is done to it."""
        return (batch for shard in self.shards for batch, _ in self.read(shard, None))

    def rows(self, shard: Any, place: Place | None = None) -> Iterator[tuple[Row, Place]]:
        """The rows of a shard from a place on, each with the place after it."""
        for row, after in merge_neighbours(self._single_rows(shard, *(place or (None, 0)))):
            kept: Row | None = row
            for step in self.steps:
                kept = kept if kept is None else step(kept)
            if kept is not None:
                yield kept, after

    def _single_rows(self, shard: Any, start: Position, before: int) -> Iterator[tuple[Row, Place]]:
        for batch, after in self.read(shard, start):
            for first in range(before, len(batch), _HELD):
                for number, row in enumerate(batch.slice(first, _HELD).to_pylist(), first + 1):
                    # After the last of a batch it need not be read again.
                    yield row, [start, number] if number < len(batch) else [after, 0]
            start, before = after, 0


def merge_neighbours(rows: Iterable[tuple[Row, Place]]) -> Iterator[tuple[Row, Place]]:
    """Join rows that follow each other and name the same image file; the last one's place holds."""
    held: tuple[Row, Place] | None = None
    for row, after in rows:
        path = row["image"]["path"]
        if held is not None and path is not None and held[0]["image"]["path"] == path:
            held[0]["captions"] += row["captions"]
            held[0]["label"] = held[0]["label"] or row["label"]
            held = held[0], after
            continue
        if held is not None:
            yield held
        held = row, after
    if held is not None:
        yield held


def table_stream(table: "Dataset") -> Stream:
    """The rows of a table in the common columns, as if they could only be read in order."""
    rows = table.with_format("arrow")

    def read(_: Any, at: Position) -> Iterator[tuple["pa.RecordBatch", Position]]:
        yield from table_batches(rows, at or 0)

    return Stream(read, [None])


def table_batches(rows: "Dataset", start: int) -> Iterator[tuple["pa.RecordBatch", int]]:
    """The rows of a table in Arrow's format from number ``start`` on, with how many came before."""
    for first in range(start, len(rows), _TABLE_ROWS):
        for batch in rows[first : first + _TABLE_ROWS].to_batches():
            start += len(batch)
            yield batch, start


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


_PASSING = (
    "the checkpoint does not say where in {spec}, as it is now, the rest of this epoch begins; the "
    "{start} batches before are read again, but not decoded"
)


def stream_batches(
    source: Source,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int,
    place: dict[str, Any] | None,
) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """Rows of a stream in batches, the same ones whenever asked, each with the place after it.

    Args:
        source: what is read.
        batch_size: rows; an incomplete last batch is dropped, unless it is the only one.
        seed: of the run.
        epoch: its number.
        start: the batch to begin with.
        place: that of the batch before. Where it is another one's, of another version of the
            source or of clipkit, or missing, the rows before are read and passed over, and a person
            is told so.
    """
    about = {"source": source.fingerprint, "epoch": epoch, "sizes": shuffle_sizes()}
    place = place or {}
    known = all(place.get(name) == value for name, value in (about | {"batch": start}).items())
    shuffled = Shuffled(source.rows, seed, epoch, place["rows"] if known else None)
    rows = iter(shuffled)
    if start and not known:
        if is_main_process():
            print_status(_PASSING.format(spec=source.spec, start=start))
        deque(islice(rows, start * batch_size), maxlen=0)
    for number in count(start):
        batch = list(islice(rows, batch_size))
        if not batch or (number and len(batch) < batch_size):
            return
        yield batch, about | {"batch": number + 1, "rows": shuffled.state()}
