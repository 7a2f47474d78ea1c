"""CLIP's byte-level byte-pair encoding: words to token ids and back.

Sources: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", §2.4; Sennrich et al. 2016 for byte-pair encoding. The merge table ships with
open_clip.
"""

import gzip
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from clipkit.errors import CaptionError, MissingExtraError

START, END = 49406, 49407
VOCAB = 49408
SPECIAL = {"<start_of_text>": START, "<end_of_text>": END}
WORD_END = "</w>"
MERGES = VOCAB - 2 * 256 - len(SPECIAL)
_GONE = -1


@dataclass(frozen=True)
class Vocabulary:
    """CLIP's 49,408 tokens: 256 bytes, 256 word-final bytes, 48,894 merges, start and end.

    Attributes:
        byte_ids: the id of each byte value; a word-final byte has this id plus 256.
        ranks: maps a pair of ids to the rank of its merge; the merged id is ``2 * 256 + rank``.
        pieces: the bytes of each id, followed by ``</w>`` if it ends a word.
    """

    byte_ids: list[int]
    ranks: dict[tuple[int, int], int]
    pieces: list[bytes]

    def encode_word(self, word: str) -> list[int]:
        """Encode one word by merging adjacent symbols in the order in which merges were learned.

        CLIP's reference repeatedly finds the pair of lowest rank and merges all its occurrences
        from left to right. Merging one occurrence at a time, lowest (rank, position) first, gives
        the same result: a merge only creates pairs that contain the new symbol, and merges of that
        symbol were learned later, so they have a higher rank than any pending occurrence. A heap
        and a linked list take O(n log n), so that a word of 100,000 letters does not hang.
        """
        symbols = [self.byte_ids[byte] for byte in word.encode()]
        symbols[-1] += 256
        after, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
        ranks, end = self.ranks, len(symbols)
        heap = [
            (rank, left)
            for left, pair in enumerate(pairwise(symbols))
            if (rank := ranks.get(pair)) is not None
        ]
        heapq.heapify(heap)
        while heap:
            rank, left = heapq.heappop(heap)
            right = after[left]
            if right == end or ranks.get((symbols[left], symbols[right])) != rank:
                continue  # one symbol of the pair has already been merged with its other neighbour
            symbols[left], symbols[right] = 2 * 256 + rank, _GONE
            after[left] = after[right]
            if after[left] < end:
                before[after[left]] = left
            for first, second in ((before[left], left), (left, after[left])):
                if first >= 0 and second < end:
                    rank_of_new = ranks.get((symbols[first], symbols[second]))
                    if rank_of_new is not None:
                        heapq.heappush(heap, (rank_of_new, first))
        return [symbol for symbol in symbols if symbol != _GONE]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text: a space after each word, U+FFFD for an incomplete character.

        Raises:
            CaptionError: an id is outside the vocabulary.
        """
        ids = list(ids)
        if strange := [i for i in ids if not 0 <= i < VOCAB]:
            raise CaptionError(f"found token id {strange[0]}, expected 0 to {VOCAB - 1}")
        text = b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")
        return text.replace(WORD_END, " ")


@cache
def vocabulary() -> Vocabulary:
    """Return the vocabulary, which is read once.

    Raises:
        MissingExtraError: open_clip, which ships the merge table, is not installed.
    """
    order, alphabet = _alphabet()
    ids = {char: i for i, char in enumerate(alphabet)}
    ids |= {char + WORD_END: 256 + i for i, char in enumerate(alphabet)}
    pieces = [bytes([byte]) for byte in order]
    pieces += [piece + WORD_END.encode() for piece in pieces]
    ranks = {}
    with gzip.open(_merges_file(), "rt", encoding="utf-8") as lines:
        next(lines)  # the version line
        for rank, line in zip(range(MERGES), lines, strict=False):
            left, right = line.split()
            ranks[ids[left], ids[right]] = rank
            pieces.append(pieces[ids[left]] + pieces[ids[right]])
            ids[left + right] = 2 * 256 + rank
    pieces += [name.encode() for name in SPECIAL]
    byte_ids = [0] * 256
    for i, byte in enumerate(order):
        byte_ids[byte] = i
    return Vocabulary(byte_ids, ranks, pieces)


def _alphabet() -> tuple[list[int], list[str]]:
    """The 256 byte values in vocabulary order, and the character of each in the merge table.

    Bytes that are printable in Latin-1 are written as that character. The others, which would break
    a text file, follow as the characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return visible + hidden, [*map(chr, visible), *(chr(256 + i) for i in range(len(hidden)))]


def _merges_file() -> Path:
    # find_spec locates the package without importing it; importing open_clip takes seconds.
    spec = find_spec("open_clip")
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place) / "bpe_simple_vocab_16e6.txt.gz"
        if file.is_file():
            return file
    raise MissingExtraError(
        "CLIP's merge table was not found, expected it in the package open_clip; "
        "pip install open_clip_torch"
    )
