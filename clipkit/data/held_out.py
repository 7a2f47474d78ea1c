"""Keep a part of the training pairs aside, to measure on."""

from dataclasses import replace
from hashlib import blake2b

import numpy as np

from clipkit.data.sources import Source

HELD_OUT_MOST = 1000
"""Most images held out: enough to tell models apart, few enough to measure often."""


def split_held_out(source: Source, share: float, seed: int) -> tuple[Source, Source | None]:
    """Split a source into pairs to train on and pairs held out.

    Args:
        source: all pairs.
        share: share of the images to hold out, in [0, 1), at most ``HELD_OUT_MOST`` images. Of a
            stream, whose length is not known, a hash of the key decides, and of those held out the
            first ``HELD_OUT_MOST`` are measured on.
        seed: decides which.

    Returns:
        the pairs to train on, and those held out (None if the share comes to nothing).
    """
    if not share:
        return source, None
    rows = source.rows
    if source.streaming:
        kept = rows.filter(lambda row: not _is_held(row["key"], share, seed))
        held = rows.filter(lambda row: _is_held(row["key"], share, seed)).take(HELD_OUT_MOST)
        if next(iter(held), None) is None:  # a short stream, of which chance held out nothing
            return source, None
        return replace(source, rows=kept), replace(source, rows=held)
    count = min(HELD_OUT_MOST, round(share * len(rows)))
    if not count:
        return source, None
    order = np.random.default_rng(seed).permutation(len(rows))
    kept, held = rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))
    return replace(source, rows=kept), replace(source, rows=held)


def _is_held(key: str, share: float, seed: int) -> bool:
    digest = blake2b(f"{seed} {key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
