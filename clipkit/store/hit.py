"""Hit: what a search finds."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hit:
    """An item found: its key, and its inner product with the query, higher being better.

    ``id`` is the number that the item keeps in its index, whatever becomes of its key;
    ``probability`` tells how likely it is what a caption asked for, where that is known.
    """

    key: str
    score: float
    id: int = field(default=-1, compare=False)
    probability: float | None = field(default=None, compare=False)
