"""CLIP's tokenizer with its context of 77 tokens, and statistics of tokenized captions.

The ids equal those of open_clip's ``SimpleTokenizer`` for every text. Text beyond 77 tokens is
never lost silently: it is reported, refused, or split into several captions.
"""

import html
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import regex

from clipkit.arguments import require_choice
from clipkit.errors import CaptionError
from clipkit.models.bpe import END, SPECIAL, START, VOCAB, vocabulary
from clipkit.shapes import Int64

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
ROOM = CONTEXT - 2  # without the start and end tokens
WORST_CASES = 10

_CACHED_LENGTH = 32  # characters; longer chunks hardly ever repeat
_CACHED_CHUNKS = 200_000  # about 40 MB when full
_WORD = regex.compile(
    rf"{'|'.join(SPECIAL)}|'(?:s|t|re|ve|m|ll|d)|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)


class CaptionTruncationWarning(UserWarning):
    """Captions were longer than 77 tokens and were cut."""


@dataclass(frozen=True)
class TruncatedCaption:
    """A caption that did not fit: its text, the number of tokens it needs, the text lost."""

    text: str
    needed: int
    lost: str


@dataclass
class TruncationReport:
    """Counts of seen and cut captions; ``worst`` lists the longest ones, longest first."""

    seen: int = 0
    cut: int = 0
    lost_tokens: int = 0
    worst: list[TruncatedCaption] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the captions that were cut, 0 to 1."""
        return self.cut / self.seen if self.seen else 0.0

    def add(self, text: str, ids: Sequence[int]) -> None:
        """Count a cut caption; ``ids`` are all its ids without start and end."""
        self.cut += 1
        self.lost_tokens += len(ids) - ROOM
        if len(self.worst) < WORST_CASES or len(ids) + 2 > self.worst[-1].needed:
            self.worst.append(TruncatedCaption(text, len(ids) + 2, _lost(ids)))
            self.worst.sort(key=lambda case: -case.needed)
            del self.worst[WORST_CASES:]

    def include(self, counts: dict[str, Any]) -> None:
        """Add the counts of another report, given as ``asdict`` returns it."""
        self.seen += counts["seen"]
        self.cut += counts["cut"]
        self.lost_tokens += counts["lost_tokens"]
        worst = [*self.worst, *(TruncatedCaption(**case) for case in counts["worst"])]
        self.worst = sorted(worst, key=lambda case: -case.needed)[:WORST_CASES]

    def render(self) -> str:
        """The report as text: a summary line and a line for each of the worst cases."""
        lines = [f"{self.cut} of {self.seen} captions ({self.share:.2%}) exceed {CONTEXT} tokens"]
        if self.cut:
            lines[0] += f"; {self.lost_tokens} tokens were not read"
        for case in self.worst:
            lines.append(f"  {case.needed} tokens, not read: {shorten(case.lost, 100)!r}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Tokenization:
    """A tokenized text.

    Attributes:
        text: the text.
        ids: at most 77 token ids, with start and end.
        tokens: the string of each id.
        used: number of ids.
        needed: number of ids of the whole text.
        lost: the text beyond 77 tokens, lower-case; empty if everything fits.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    used: int
    needed: int
    lost: str


class _Chunks(dict[str, tuple[int, ...]]):
    """Ids of whitespace-separated chunks, computed when missing, cached when short.

    The pattern's words never cross a space, so the ids of a caption are those of its chunks in
    order. A caption of cached chunks costs a few look-ups.
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
    # ftfy and html change nothing in printable ASCII without "&". This test is a hundred times
    # cheaper than calling them.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy  # rarely needed for a query, and takes 0.1 s to import

        text = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
    return text.lower()


def encode(text: str) -> list[int]:
    """Ids of a text of any length, without start and end.

    Raises:
        CaptionError: ``text`` is not a string.
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
    if not isinstance(captions, Iterable) or isinstance(captions, bytes | Mapping | Set):
        found = type(captions).__name__
        raise TypeError(f"found {found} as captions, expected a string or a sequence of strings")
    texts = list(captions)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            found = type(text).__name__
            raise TypeError(f"found {found} as caption {number}, expected a string")
    return texts


def decode(ids: Iterable[int]) -> str:
    """The text of ids, with a space after each word; raises CaptionError for an id above 49407."""
    return vocabulary().decode(ids)


def tokenize(
    texts: str | Iterable[str],
    *,
    policy: Literal["cut", "error"] = "cut",
    report: TruncationReport | None = None,
) -> Int64[npt.NDArray[np.int64], "n 77"]:
    """Tokenize captions for CLIP's text tower.

    Args:
        texts: one caption or several.
        policy: for captions that do not fit: ``"cut"`` keeps their first 75 ids, ``"error"``
            refuses them.
        report: counts the cut captions; without it they cause a ``CaptionTruncationWarning``.

    Returns:
        int64 [n, 77]; each row is the start token, at most 75 ids, the end token, then zeros.

    Raises:
        TypeError: ``texts`` is neither a string nor an iterable of strings.
        ArgumentError: ``policy`` is something else.
        CaptionError: a caption does not fit and ``policy`` is ``"error"``.
    """
    require_choice("policy", policy, ("cut", "error"))
    texts = caption_list(texts)
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


def _fill(
    rows: list[list[int]], lengths: Int64[npt.NDArray[np.int64], " n"]
) -> Int64[npt.NDArray[np.int64], "n 77"]:
    out = np.zeros((len(rows), CONTEXT), np.int64)
    out[:, 0] = START
    inside = np.arange(ROOM) < lengths[:, None]
    out[:, 1:-1][inside] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    out[np.arange(len(rows)), lengths + 1] = END
    return out


def inspect(text: str) -> Tokenization:
    """Tokenize a text and report ids, token strings, length and lost text."""
    ids = encode(text)
    read = (START, *ids[:ROOM], END)
    pieces = vocabulary().pieces
    tokens = tuple(pieces[i].decode("utf-8", errors="backslashreplace") for i in read)
    return Tokenization(text, read, tokens, len(read), len(ids) + 2, _lost(ids))


def _lost(ids: Sequence[int]) -> str:
    return decode(ids[ROOM:]).strip()


def shorten(text: str, length: int) -> str:
    """The text cut to ``length`` characters, the last one an ellipsis if it was longer."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def warn_truncated(report: TruncationReport, stacklevel: int = 2) -> None:
    """Issue a ``CaptionTruncationWarning`` that shows the lost text, if captions were cut."""
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


# Places to split a long caption, best first; a piece ends where a match ends.
_PLACES = [
    regex.compile(r"""[.!?…]+["'”’»)\]]*\s+|[。！？]+|\n+"""),
    regex.compile(r"[;,:]\s+|\s?[—–]\s?|\s-\s|[；，：、]"),
    regex.compile(r"\s+"),
]


def split_caption(text: str) -> list[str]:
    """Split a long caption between sentences, else between clauses, else between words.

    Each piece fits in 77 tokens and is as long as possible. Only whitespace between pieces is
    dropped. A word longer than 77 tokens is split between characters.
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
    """Join neighbouring parts while they fit; divide parts that do not fit alone."""
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
    """Captions with equal ids.

    Attributes:
        distinct: number of different captions.
        repeats: number of captions that equal an earlier one.
        top: the most frequent captions with their counts.
    """

    distinct: int
    repeats: int
    top: list[tuple[str, int]]


@dataclass
class CaptionSurvey:
    """Lengths, cuts and repetitions of captions; captions with equal ids count as equal.

    Attributes:
        tokens: the uncut length of each caption, with start and end token.
        cut: the captions that do not fit.
        counts: number of occurrences by hash of the ids.
        texts: a text for each hash that is repeated or in ``known``.
        known: hashes that another survey has seen.
    """

    tokens: "array[int]" = field(default_factory=lambda: array("L"))
    cut: TruncationReport = field(default_factory=TruncationReport)
    counts: Counter[int] = field(default_factory=Counter)
    texts: dict[int, str] = field(default_factory=dict)
    known: "Counter[int]" = field(default_factory=Counter)

    def add(self, text: str) -> None:
        """Count one caption; its text is stored only if it is repeated or known."""
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
        """The repeated captions."""
        top = [(self.texts[key], n) for key, n in self.counts.most_common(TOP) if n > 1]
        return Repeated(len(self.counts), self.counts.total() - len(self.counts), top)
