"""The batches of an epoch of a stream, from its start or from where a run stood."""

from collections import deque
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

from clipkit.data.rows import Row, Source
from clipkit.data.stream import Shuffled, shuffle_sizes
from clipkit.progress import speaks, tell

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
        if speaks():
            tell(_PASSING.format(spec=source.spec, start=start))
        deque(islice(rows, start * batch_size), maxlen=0)
    for number in count(start):
        batch = list(islice(rows, batch_size))
        if not batch or (number and len(batch) < batch_size):
            return
        yield batch, about | {"batch": number + 1, "rows": shuffled.state()}
