"""Keep a part of the training pairs aside, to measure on."""

from dataclasses import replace

import numpy as np

from clipkit.data.sources import Source

HELD_OUT_MOST = 1000
"""Most images held out: enough to tell models apart, few enough to measure often."""


def split_held_out(source: Source, share: float, seed: int) -> tuple[Source, Source | None]:
    """Split a source into pairs to train on and pairs held out.

    Args:
        source: all pairs.
        share: share of the images to hold out, in [0, 1), at most ``HELD_OUT_MOST`` images; of a
            stream, whose length is not known, the first so many are.
        seed: decides which.

    Returns:
        the pairs to train on, and those held out (None if the share comes to nothing).
    """
    if not share:
        return source, None
    rows = source.rows
    if source.streaming:
        kept, held = rows.skip(HELD_OUT_MOST), rows.take(HELD_OUT_MOST)
        return replace(source, rows=kept), replace(source, rows=held)
    count = min(HELD_OUT_MOST, round(share * len(rows)))
    if not count:
        return source, None
    order = np.random.default_rng(seed).permutation(len(rows))
    kept, held = rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))
    return replace(source, rows=kept), replace(source, rows=held)
