"""The 77-token byte-level BPE of CLIP, enforced.

Ids are identical to those of open_clip's ``SimpleTokenizer`` for any text. What does not fit in 77
tokens is never lost silently: it is reported, refused, or split into several captions.

Captions of a whole set as the model reads them: lengths, cuts, repetitions.
"""

import html
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import regex

from clipkit.errors import CaptionError
from clipkit.models.bpe import END, SPECIAL, START, VOCAB, vocabulary

__all__ = [
    "CONTEXT",
    "END",
    "START",
    "VOCAB",
    "CaptionTruncationWarning",
    "Tokenization",
    "TruncatedCaption",
    "TruncationReport",
    "decode",
    "encode",
    "inspect",
    "split_caption",
    "tokenize",
    "warn_truncated",
]

CONTEXT = 77
ROOM = CONTEXT - 2  # the start and end tokens are always there
WORST_CASES = 10

_CACHED_LENGTH = 32  # characters; a longer chunk is hardly ever met twice
_CACHED_CHUNKS = 200_000  # about 40 MB when full
_WORD = regex.compile(
    rf"{'|'.join(SPECIAL)}|'(?:s|t|re|ve|m|ll|d)|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)


class CaptionTruncationWarning(UserWarning):
    """Captions were longer than 77 tokens, and their ends were not read."""


@dataclass(frozen=True)
class TruncatedCaption:
    """A caption that did not fit: its text, the tokens it needs of 77, the text not read."""

    text: str
    needed: int
    lost: str


@dataclass
class TruncationReport:
    """What was cut among the captions seen; ``worst`` holds the longest ones, longest first."""

    seen: int = 0
    cut: int = 0
    lost_tokens: int = 0
    worst: list[TruncatedCaption] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the captions that were cut, 0 to 1."""
        return self.cut / self.seen if self.seen else 0.0

    def add(self, text: str, ids: Sequence[int]) -> None:
        """Count a caption that was cut; ``ids`` are all its ids, without start and end."""
        self.cut += 1
        self.lost_tokens += len(ids) - ROOM
        if len(self.worst) < WORST_CASES or len(ids) + 2 > self.worst[-1].needed:
            self.worst.append(TruncatedCaption(text, len(ids) + 2, _lost(ids)))
            self.worst.sort(key=lambda case: -case.needed)
            del self.worst[WORST_CASES:]

    def include(self, counts: dict[str, Any]) -> None:
        """Count what another report counted, too; ``counts`` is what ``asdict`` made of it."""
        self.seen += counts["seen"]
        self.cut += counts["cut"]
        self.lost_tokens += counts["lost_tokens"]
        worst = [*self.worst, *(TruncatedCaption(**case) for case in counts["worst"])]
        self.worst = sorted(worst, key=lambda case: -case.needed)[:WORST_CASES]

    def render(self) -> str:
        """The report for a person, one line and one more for each of the worst cases."""
        lines = [f"{self.cut} of {self.seen} captions ({self.share:.2%}) exceed {CONTEXT} tokens"]
        if self.cut:
            lines[0] += f"; {self.lost_tokens} tokens were not read"
        for case in self.worst:
            lines.append(f"  {case.needed} tokens, not read: {shorten(case.lost, 100)!r}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Tokenization:
    """How a text is read.

    Attributes:
        ids: what the model reads, start and end included, at most 77; tokens: their strings.
        used: how many of the 77 are used; needed: how many the whole text would use.
        lost: the text that is not read, lower-case; empty when everything fits.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    used: int
    needed: int
    lost: str


class _Chunks(dict[str, tuple[int, ...]]):
    """Ids of chunks of text between spaces, computed when missing, and kept when short.

    No word of the pattern crosses a space, so a caption's ids are those of its chunks, end to end:
    a caption made of chunks met before is a few look-ups.
    """

    def __missing__(self, chunk: str) -> tuple[int, ...]:
        ids: list[int] = []
        for word in _WORD.findall(chunk):
            special = SPECIAL.get(word)
            ids += vocabulary().encode_word(word) if special is None else [special]
        if len(chunk) <= _CACHED_LENGTH:
            if len(self) >= _CACHED_CHUNKS:
                self.clear()
            self[chunk] = tuple(ids)
        return tuple(ids)


_chunks = _Chunks()


def _clean(text: str) -> str:
    """Lower-case text without mojibake and HTML entities, as CLIP was trained on."""
    # In printable ASCII without "&" there is nothing for ftfy and html to mend. The test is a
    # hundred times cheaper than asking them.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # hardly ever needed for a query, and a tenth of a second to load

        text = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
    return text.lower()


def encode(text: str) -> list[int]:
    """Ids of a text of any length, without start and end.

    Raises:
        CaptionError: not a text.
    """
    if not isinstance(text, str):
        raise CaptionError(f"found a caption of type {type(text).__name__}, expected a text")
    return list(chain.from_iterable(map(_chunks.__getitem__, _clean(text).split())))


def caption_list(captions: str | Iterable[str]) -> list[str]:
    """One caption or many as a list.

    Raises:
        TypeError: neither a string nor an iterable of strings.
    """
    if isinstance(captions, str):
        return [captions]
    if not isinstance(captions, Iterable) or isinstance(captions, bytes):
        found = type(captions).__name__
        raise TypeError(f"found {found} as captions, expected a string or a sequence of strings")
    texts = list(captions)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            found = type(text).__name__
            raise TypeError(f"found {found} as caption {number}, expected a string")
    return texts


def decode(ids: Iterable[int]) -> str:
    """Text of ids: a space after each word; raises CaptionError for an id beyond 49407."""
    return vocabulary().decode(ids)


def tokenize(
    texts: str | Sequence[str],
    *,
    policy: Literal["cut", "error"] = "cut",
    report: TruncationReport | None = None,
) -> npt.NDArray[np.int64]:
    """Captions as the rows that CLIP's text tower reads, ``int64 [n, 77]``.

    Each row is the start token, at most 75 ids, the end token, then zeros.

    Args:
        texts: a caption or several.
        policy: what happens to a caption that does not fit: ``cut`` reads its first 75 ids,
            ``error`` refuses it.
        report: counts what is cut; without it cutting gives a ``CaptionTruncationWarning``.

    Raises:
        CaptionError: a caption does not fit and the policy is ``error``, or is not a text.
    """
    texts = [texts] if isinstance(texts, str) else texts
    rows = [encode(text) for text in texts]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    cut = np.flatnonzero(lengths > ROOM).tolist()
    if cut and policy == "error":
        raise CaptionError(_refusal(texts[cut[0]], rows[cut[0]]))
    counted = TruncationReport() if report is None else report
    counted.seen += len(rows)
    for i in cut:
        counted.add(texts[i], rows[i])
        rows[i] = rows[i][:ROOM]
    if report is None:
        warn_truncated(counted, stacklevel=3)
    return _fill(rows, np.minimum(lengths, ROOM))


def _fill(rows: list[list[int]], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    out = np.zeros((len(rows), CONTEXT), np.int64)
    out[:, 0] = START
    inside = np.arange(ROOM) < lengths[:, None]
    out[:, 1:-1][inside] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    out[np.arange(len(rows)), lengths + 1] = END
    return out


def inspect(text: str) -> Tokenization:
    """How a text is read: ids, token strings, how much of the 77 it uses, what is not read."""
    ids = encode(text)
    read = (START, *ids[:ROOM], END)
    pieces = vocabulary().pieces
    tokens = tuple(pieces[i].decode("utf-8", errors="backslashreplace") for i in read)
    return Tokenization(text, read, tokens, len(read), len(ids) + 2, _lost(ids))


def _lost(ids: Sequence[int]) -> str:
    return decode(ids[ROOM:]).strip()


def shorten(text: str, length: int) -> str:
    """A text of at most ``length`` characters, an ellipsis where it was cut."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def warn_truncated(report: TruncationReport, stacklevel: int = 2) -> None:
    """Give a ``CaptionTruncationWarning`` with the words that were not read, if there are any."""
    if report.cut:
        head, *_ = report.render().splitlines()
        lost = ", ".join(repr(shorten(case.lost, 200)) for case in report.worst[:3])
        warnings.warn(f"{head}: {lost}", CaptionTruncationWarning, stacklevel=stacklevel)


def _refusal(text: str, ids: Sequence[int]) -> str:
    return (
        f"the caption {shorten(text, 60)!r} needs {len(ids) + 2} tokens, expected at most "
        f"{CONTEXT}; shorten it, or allow cutting or splitting, which would part it before "
        f"{shorten(_lost(ids), 60)!r}"
    )


# Where a long caption may be parted, best place first; each match ends where a piece ends.
_PLACES = [
    regex.compile(r"""[.!?…]+["'”’»)\]]*\s+|[。！？]+|\n+"""),
    regex.compile(r"[;,:]\s+|\s?[—–]\s?|\s-\s|[；，：、]"),
    regex.compile(r"\s+"),
]


def split_caption(text: str) -> list[str]:
    """Part a long caption at sentence ends, else at clause ends, else between words.

    Each piece fits in 77 tokens and is as long as the places allow. Only white space between
    pieces is dropped. A word that alone does not fit is parted between characters.
    """
    return [piece for part in _split(text, 0) if (piece := part.strip())] or [text]


def _split(text: str, level: int) -> list[str]:
    if _fits(text):
        return [text]
    if level == len(_PLACES):
        half = len(text) // 2
        return [*_split(text[:half], level), *_split(text[half:], level)]
    ends = [match.end() for match in _PLACES[level].finditer(text)]
    parts = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True) if a < b]
    return _pack(parts, lambda part: _split(part, level + 1))


def _pack(parts: list[str], divide: Callable[[str], list[str]]) -> list[str]:
    """Join neighbours while they fit; a part that alone does not is divided."""
    packed = [""]
    for part in parts:
        if _fits(packed[-1] + part):
            packed[-1] += part
        elif _fits(part):
            packed.append(part)
        else:
            packed += [*divide(part), ""]
    return packed


def _fits(text: str) -> bool:
    return len(encode(text.strip())) <= ROOM


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
    cut: TruncationReport = field(default_factory=TruncationReport)
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
