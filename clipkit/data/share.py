"""Batches that several processes share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Share:
    """The part of every batch that this process reads.

    Attributes:
        rank: this process's number.
        size: how many processes there are.
        exchange: what each process has to tell, in the order of ranks: values that JSON can hold.
    """

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] = field(default=_alone)
