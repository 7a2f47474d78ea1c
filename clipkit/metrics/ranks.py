"""Where right items stand among wrong ones, block by block, without the matrix of all scores."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import DataError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Scores = NDArray[np.float64]

BLOCK = (510, 8192)
"""Images and captions of a block: 16 MiB of scores, and images in two parts of 255."""
_NEAR = 2e-6
"""Scores of float32 products nearer than this are computed again in float64. Their largest error
among 9 million products of unit vectors was 7.2e-7 at 256 dimensions, 5.5e-7 at 512 to 1,024."""
_TIE = 1e-9
_PART = 255  # rows whose ones a byte can count
_GATHERED = 1024  # pairs computed in float64 at a time
_SPARSE = 32
"""If one score in so many may be ahead or fewer, these are looked at one by one. A good model has
next to none, and a pass over a block of scores takes a tenth of the time of making them."""


def wrong_ahead(
    images: Floats,
    captions: Floats,
    image_of: Integers,
    caption_of: Integers,
    block: tuple[int, int] = BLOCK,
) -> tuple[Integers, Integers]:
    """For each right pair, how many wrong captions and how many wrong images score as high.

    An item is ahead of a right one when its score in float64 is higher or equal (to 1e-9): ties
    count against the model, so that vectors which are all equal do not look perfect. One product
    of each block of images with each block of captions serves both directions. Where float32
    cannot tell two scores apart, these alone are computed again, so that the result depends
    neither on the block nor on how a library sums.

    Args:
        images: float32 [n, dim], rows of unit length.
        captions: float32 [m, dim], rows of unit length.
        image_of: int64 [pairs], the image of each right pair; a pair stands once.
        caption_of: int64 [pairs], its caption.
        block: images and captions per matrix product; bounds the memory, not the result.

    Returns:
        int64 [pairs]: of the captions that are not right for the pair's image, those that score at
        least as high as the pair; int64 [pairs]: the same of the images that are not right for
        its caption.

    Raises:
        DataError: vectors that are not finite.
    """
    scores = scores_of(images, captions, image_of, caption_of)
    if not np.isfinite(scores).all():
        raise DataError(
            "the vectors hold numbers that are not finite, expected unit vectors; the model is "
            "broken, measure an earlier checkpoint"
        )
    of_images = _Side(images, captions, image_of, caption_of, scores)
    of_captions = _Side(captions, images, caption_of, image_of, scores)
    # Held on to: fresh memory for each product costs a tenth of it.
    room = np.empty(min(block[0], len(images)) * min(block[1], len(captions)), np.float32)
    for top in range(0, len(images), block[0]):
        rows = slice(top, min(top + block[0], len(images)))
        for left in range(0, len(captions), block[1]):
            columns = slice(left, min(left + block[1], len(captions)))
            shape = (rows.stop - top, columns.stop - left)
            table = room[: shape[0] * shape[1]].reshape(shape)
            np.matmul(images[rows], captions[columns].T, out=table)
            # What is right stands aside of what is wrong, in both directions alike.
            table[of_images.places(rows, columns)] = -np.inf
            of_images.add(table, rows, columns)
            of_captions.add(table.T, columns, rows)
    return of_images.ahead, of_captions.ahead


def scores_of(images: Floats, captions: Floats, i: Integers, j: Integers) -> Scores:
    """The inner products of images ``i`` with captions ``j`` in float64, [pairs]."""
    scores = np.empty(len(i))
    for start in range(0, len(i), _GATHERED):
        part = slice(start, start + _GATHERED)
        left, right = images[i[part]].astype(np.float64), captions[j[part]].astype(np.float64)
        scores[part] = (left * right).sum(axis=1)
    return scores


class _Side:
    """One direction: the wrong items of the other side that are ahead, counted block by block.

    Attributes:
        ahead: int64 [pairs], how many there are so far.
    """

    def __init__(
        self, own: Floats, others: Floats, own_of: Integers, other_of: Integers, scores: Scores
    ) -> None:
        self.own, self.others = own, others
        self.own_of, self.other_of, self.scores = own_of, other_of, scores
        self.ahead = np.zeros(len(own_of), np.int64)
        self._order = np.lexsort((scores, own_of))
        self._items, starts = np.unique(own_of[self._order], return_index=True)
        self._starts = np.append(starts, len(own_of))

    def places(self, mine: slice, theirs: slice) -> tuple[Integers, Integers]:
        """Where in a block's table the right pairs stand."""
        first, last = np.searchsorted(self._items, [mine.start, mine.stop])
        pairs = self._order[self._starts[first] : self._starts[last]]
        other = self.other_of[pairs]
        inside = (other >= theirs.start) & (other < theirs.stop)
        return self.own_of[pairs[inside]] - mine.start, other[inside] - theirs.start

    def add(self, table: Floats, mine: slice, theirs: slice) -> None:
        """Count the items of one block.

        Args:
            table: float32 [own items, items of the other side], in either order of memory, with
                minus infinity where a pair is right.
            mine: the block's own items.
            theirs: those of the other side.
        """
        few: _Few | None = None
        for pairs in self._levels(mine):
            rows = self.own_of[pairs] - mine.start
            limits = np.full(len(table), np.inf)
            limits[rows] = self.scores[pairs]
            low, high = ((limits + e).astype(np.float32) for e in (-_NEAR, _NEAR))
            if few is None:
                most = table >= low[:, None]
                if np.count_nonzero(most.ravel("K")) <= most.size // _SPARSE:
                    few = _Few.of(table, most)
            if few is None:
                counts, own, other = _count_all(table, most, high)
            else:
                # What is not ahead of the lowest right item is not ahead of a higher one.
                few = few.at_least(low)
                counts, own, other = few.count(high)
            if len(own):
                again = scores_of(self.own, self.others, mine.start + own, theirs.start + other)
                ahead = again >= limits[own] - _TIE
                counts += np.bincount(own[ahead], minlength=len(table))
            self.ahead[pairs] += counts[rows]

    def _levels(self, part: slice) -> Iterator[Integers]:
        """The lowest pair of each item of a block, then the second of those that have one, …"""
        first, last = np.searchsorted(self._items, [part.start, part.stop])
        starts, ends = self._starts[first:last], self._starts[first + 1 : last + 1]
        while len(starts):
            yield self._order[starts]
            starts, ends = starts[starts + 1 < ends] + 1, ends[starts + 1 < ends]


@dataclass(frozen=True)
class _Few:
    """Scores of a table of which there are few.

    Attributes:
        rows: how many the table has.
        own: int64 [n], their rows.
        other: int64 [n], their columns.
        values: float32 [n].
    """

    rows: int
    own: Integers
    other: Integers
    values: Floats

    @classmethod
    def of(cls, table: Floats, mask: NDArray[np.bool_]) -> "_Few":
        flat = np.flatnonzero(mask.ravel("K"))
        values = table.ravel("K")[flat]
        by_rows = table.flags.c_contiguous
        across = table.shape[1] if by_rows else len(table)
        line = flat // across
        place = flat - line * across
        own, other = (line, place) if by_rows else (place, line)
        return cls(len(table), own, other, values)

    def at_least(self, low: Floats) -> "_Few":
        kept = self.values >= low[self.own]
        return _Few(self.rows, self.own[kept], self.other[kept], self.values[kept])

    def count(self, high: Floats) -> tuple[Integers, Integers, Integers]:
        """As ``_count_all``."""
        above = self.values > high[self.own]
        counts = np.bincount(self.own[above], minlength=self.rows)
        return counts, self.own[~above], self.other[~above]


def _count_all(
    table: Floats, most: NDArray[np.bool_], high: Floats
) -> tuple[Integers, Integers, Integers]:
    """How many scores of each row are above a limit, and which ``most`` has beside these."""
    above = table > high[:, None]
    counts = _ones(above)
    doubtful = np.flatnonzero(counts != _ones(most))
    own, other = np.nonzero(above[doubtful] ^ most[doubtful])
    return counts, doubtful[own], other


def _ones(mask: NDArray[np.bool_]) -> Integers:
    """The ones of each row; across memory, bytes add up ten times as fast as numbers."""
    if mask.flags.c_contiguous:
        return np.array([np.count_nonzero(row) for row in mask], np.int64)
    counts = np.zeros(len(mask), np.int64)
    for start in range(0, mask.shape[1], _PART):
        part = mask[:, start : start + _PART].view(np.uint8)
        counts += np.add.reduce(part, axis=1, dtype=np.uint8)
    return counts
