"""What an index is asked to tune and to calibrate it: vectors of captions, and of nonsense."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clipkit.data.queries import choose_queries, nonsense
from clipkit.store.exact import Floats, Integers

Encode = Callable[[Sequence[str]], Floats]
"""Captions to unit vectors float32 [m, dim], by the model of the index."""


@dataclass(frozen=True)
class Questions:
    """Questions as vectors.

    Attributes:
        captions: float32 [m, dim].
        rows: int64 [m], for each the row of its image; empty for generic captions.
        nonsense: float32 [g, dim], what nothing should match.
        source: where the captions come from.
    """

    captions: Floats
    rows: Integers
    nonsense: Floats
    source: str


def make_questions(tables: Iterable[pa.Table], encode: Encode) -> Questions:
    """Questions for an index with these records, in row order."""
    chosen, without = choose_queries(tables), nonsense()
    vectors = encode([*chosen.captions, *without])
    rows = np.array(chosen.rows, np.int64)
    count = len(chosen.captions)
    return Questions(vectors[:count], rows, vectors[count:], chosen.source)
