"""The batches of an epoch of a stream, shuffled, from its start or from where a run stood."""

from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np

from clipkit.data.rows import Place, Row, Stream
from clipkit.data.source import Source
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
    shuffled = Shuffled(source.stream, seed, epoch, place["rows"] if known else None)
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
