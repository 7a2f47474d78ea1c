"""Captions of a whole set as the model reads them: lengths, cuts, repetitions."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

from clipkit.model.tokenizer import CONTEXT, ROOM, CutReport, encode

TOP = 10


@dataclass(frozen=True)
class Repeated:
    """Captions that the model reads as the same ones.

    Attributes:
        distinct: how many different captions there are.
        repeats: how many captions are the same as an earlier one.
        top: the most frequent ones, with their counts.
    """

    distinct: int
    repeats: int
    top: list[tuple[str, int]]


@dataclass
class CaptionSurvey:
    """Captions as the model reads them: two are the same when their ids are.

    Attributes:
        tokens: each caption's length, with start and end token, before anything is cut.
        cut: what does not fit.
        counts: how often each reading (a hash of the ids) occurs.
        texts: one text of each reading that is repeated, or ``known`` from another survey.
    """

    tokens: "array[int]" = field(default_factory=lambda: array("L"))
    cut: CutReport = field(default_factory=CutReport)
    counts: Counter[int] = field(default_factory=Counter)
    texts: dict[int, str] = field(default_factory=dict)
    known: "Counter[int]" = field(default_factory=Counter)

    def add(self, text: str) -> None:
        """Count one caption; its text is kept only where it is repeated or known already."""
        ids = encode(text)
        self.tokens.append(len(ids) + CONTEXT - ROOM)
        self.cut.seen += 1
        if len(ids) > ROOM:
            self.cut.add(text, ids)
        reading = hash(tuple(ids))  # of integers: the same in every process
        self.counts[reading] += 1
        if self.counts[reading] == 2 or reading in self.known:
            self.texts.setdefault(reading, text)

    def repeated(self) -> Repeated:
        """How far captions repeat each other."""
        top = [(self.texts[key], n) for key, n in self.counts.most_common(TOP) if n > 1]
        return Repeated(len(self.counts), self.counts.total() - len(self.counts), top)
