"""Captions that stand for what people ask: those of the images themselves, or generic ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

MOST = 1000
"""Captions that are asked at most, spread over all images that have any."""
FEWEST = 50
"""Images with captions below which generic ones are asked."""
NONSENSE = 200
"""Questions without meaning, which nothing fits."""
_SYLLABLES = [
    "ba",
    "ke",
    "lo",
    "mi",
    "tu",
    "ra",
    "ze",
    "no",
    "shi",
    "pla",
    "gru",
    "vex",
    "qua",
    "fro",
    "zy",
    "dwi",
    "olp",
    "urk",
    "snee",
    "thab",
]


@dataclass(frozen=True)
class Queries:
    """Captions to ask an index with.

    Attributes:
        captions: the texts.
        rows: for each the row of the image it was written for; empty for generic ones.
    """

    captions: list[str]
    rows: list[int]

    @property
    def source(self) -> str:
        """Where they come from, for a manifest."""
        return "captions of the images" if self.rows else "generic captions"


def choose_queries(tables: Iterable[Any], most: int = MOST) -> Queries:
    """One caption each of some images, drawn with a fixed seed; generic ones where few have any.

    Args:
        tables: the records in row order, tables with a column ``captions`` of lists of strings.
        most: how many at most.
    """
    random = np.random.default_rng(0)
    # A reservoir (Vitter 1985, algorithm R): each of the images is as likely to be drawn.
    drawn: list[tuple[int, str]] = []
    row = seen = 0
    for table in tables:
        for captions in table["captions"].to_pylist():
            told = [caption for caption in captions or () if caption.strip()]
            if told:
                place = seen if seen < most else int(random.integers(seen + 1))
                if place < most:
                    pick = (row, told[int(random.integers(len(told)))])
                    drawn[place : place + 1] = [pick]
                seen += 1
            row += 1
    if len(drawn) < FEWEST:
        return Queries(generic_captions(), [])
    drawn.sort()
    return Queries([caption for _, caption in drawn], [place for place, _ in drawn])


def generic_captions() -> list[str]:
    """Captions of what photos often show, in words of every day."""
    text = files("clipkit.data").joinpath("captions.txt").read_text(encoding="utf-8")
    return text.splitlines()


@cache
def nonsense() -> list[str]:
    """Strings of words that mean nothing, drawn with a fixed seed: what nothing should match."""
    random = np.random.default_rng(0)
    return [
        " ".join(
            "".join(random.choice(_SYLLABLES, random.integers(2, 5)))
            for _ in range(random.integers(1, 6))
        )
        for _ in range(NONSENSE)
    ]
