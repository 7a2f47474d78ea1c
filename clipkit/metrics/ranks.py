"""Where right items stand among wrong ones, block by block, without the matrix of all scores."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import DataError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

BLOCK = (510, 8192)
"""Images and captions of a block: 16 MiB of scores, and rows in two parts of 255."""
_NEAR = 2e-6
"""Scores of float32 products nearer than this are computed again in float64. Their largest error
among 9 million products of unit vectors was 7.2e-7 at 256 dimensions, 5.5e-7 at 512 to 1,024."""
_TIE = 1e-9
_PART = 255  # rows whose ones a byte can count
_GATHERED = 4096  # pairs computed in float64 at a time
_SPARSE = 8  # a row with fewer candidates than a part in so many is looked at by these alone


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
    count = _Count(images, captions, image_of, caption_of)
    for top in range(0, len(images), block[0]):
        for left in range(0, len(captions), block[1]):
            count.add(slice(top, top + block[0]), slice(left, left + block[1]))
    return count.captions_ahead, count.images_ahead


def scores_of(images: Floats, captions: Floats, i: Integers, j: Integers) -> NDArray[np.float64]:
    """The inner products of images ``i`` with captions ``j`` in float64, [pairs]."""
    scores = np.empty(len(i))
    for start in range(0, len(i), _GATHERED):
        part = slice(start, start + _GATHERED)
        left, right = images[i[part]].astype(np.float64), captions[j[part]].astype(np.float64)
        scores[part] = (left * right).sum(axis=1)
    return scores


class _Count:
    """Counts, block by block; pairs are held sorted by image, and once more by caption."""

    def __init__(
        self, images: Floats, captions: Floats, image_of: Integers, caption_of: Integers
    ) -> None:
        self.images, self.captions = images, captions
        self.image_of, self.caption_of = image_of, caption_of
        self.scores = scores_of(images, captions, image_of, caption_of)
        if not np.isfinite(self.scores).all():
            raise DataError(
                "the vectors hold numbers that are not finite, expected unit vectors; the model is "
                "broken, measure an earlier checkpoint"
            )
        self.captions_ahead = np.zeros(len(image_of), np.int64)
        self.images_ahead = np.zeros(len(image_of), np.int64)
        self._by_image = _Grouped.of(image_of)
        self._by_caption = _Grouped.of(caption_of)

    def add(self, rows: slice, columns: slice) -> None:
        """Count the items of one block."""
        table = self.images[rows] @ self.captions[columns].T
        pairs = self._by_image.within(rows)
        right = self.caption_of[pairs]
        pairs = pairs[(right >= columns.start) & (right < columns.stop)]
        # What is right stands aside of what is wrong, in both directions alike.
        table[self.image_of[pairs] - rows.start, self.caption_of[pairs] - columns.start] = -np.inf
        for image, mine in self._by_image.groups(rows):
            self._add_row(table[image - rows.start], image, mine, columns.start)
        for level in self._by_caption.levels(columns):
            self._add_columns(table, level, rows.start, columns)

    def _add_row(self, row: Floats, image: int, pairs: Integers, left: int) -> None:
        """Captions ahead of the pairs of one image, among those of a block."""
        limits = self.scores[pairs]
        lowest = np.float32(limits.min() - _NEAR)
        found = row >= lowest
        number = np.count_nonzero(found)
        if not number:
            return
        # A good model has few wrong ones ahead, and these are quickly compared again and again.
        places = np.flatnonzero(found) if number < len(row) // _SPARSE else None
        values = row if places is None else row[places]
        for pair, limit in zip(pairs, limits, strict=True):
            low, high = np.float32(limit - _NEAR), np.float32(limit + _NEAR)
            above = np.count_nonzero(values > high)
            self.captions_ahead[pair] += above
            if np.count_nonzero(values >= low) > above:
                at = np.flatnonzero((values >= low) & (values <= high))
                there = left + (at if places is None else places[at])
                again = scores_of(self.images, self.captions, np.full(len(there), image), there)
                self.captions_ahead[pair] += np.count_nonzero(again >= limit - _TIE)

    def _add_columns(self, table: Floats, pairs: Integers, top: int, columns: slice) -> None:
        """Images ahead of one pair of each caption, among those of a block."""
        numbers = self.caption_of[pairs] - columns.start
        part = table if len(numbers) == table.shape[1] else table[:, numbers]
        limits = self.scores[pairs]
        high, low = np.float32(limits + _NEAR), np.float32(limits - _NEAR)
        for start in range(0, len(part), _PART):
            rows = part[start : start + _PART]
            above, most = rows > high, rows >= low
            counted, possible = _ones(above), _ones(most)
            self.images_ahead[pairs] += counted
            doubtful = np.flatnonzero(counted != possible)
            if not len(doubtful):
                continue
            image, at = np.nonzero(above[:, doubtful] ^ most[:, doubtful])
            at = doubtful[at]
            again = scores_of(
                self.images, self.captions, top + start + image, self.caption_of[pairs[at]]
            )
            ahead = again >= limits[at] - _TIE
            self.images_ahead[pairs] += np.bincount(at[ahead], minlength=len(pairs))


def _ones(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The ones of each column of at most 255 rows: bytes add up ten times as fast as numbers."""
    counts: NDArray[np.uint8] = np.add.reduce(mask.view(np.uint8), axis=0, dtype=np.uint8)
    return counts


@dataclass(frozen=True)
class _Grouped:
    """Pairs in order of the item that they are grouped by.

    Attributes:
        order: int64 [pairs], the pairs by their item.
        items: int64 [groups], the items that have pairs, ascending.
        starts: int64 [groups + 1], where the pairs of each begin in ``order``.
    """

    order: Integers
    items: Integers
    starts: Integers

    @classmethod
    def of(cls, item_of: Integers) -> "_Grouped":
        order = np.argsort(item_of, kind="stable")
        items, starts = np.unique(item_of[order], return_index=True)
        return cls(order, items, np.append(starts, len(order)))

    def _range(self, part: slice) -> tuple[int, int]:
        first, last = np.searchsorted(self.items, [part.start, part.stop])
        return int(first), int(last)

    def within(self, part: slice) -> Integers:
        """The pairs of the items of a block."""
        first, last = self._range(part)
        return self.order[self.starts[first] : self.starts[last]]

    def groups(self, part: slice) -> Iterator[tuple[int, Integers]]:
        """Each item of a block that has pairs, and these."""
        for g in range(*self._range(part)):
            yield int(self.items[g]), self.order[self.starts[g] : self.starts[g + 1]]

    def levels(self, part: slice) -> Iterator[Integers]:
        """The first pair of each item of a block, then the second of those that have one, …"""
        first, last = self._range(part)
        starts, ends = self.starts[first:last], self.starts[first + 1 : last + 1]
        while len(starts):
            yield self.order[starts]
            starts, ends = starts[starts + 1 < ends] + 1, ends[starts + 1 < ends]
