"""Recall@k, median rank and mean average precision of captions finding images and the reverse.

Where right items stand among wrong ones, block by block, without the matrix of all scores.
"""

from collections.abc import Iterator, Sequence
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


KS = (1, 5, 10, 50)
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class Retrieved:
    """How far each query got, in one direction.

    Attributes:
        queries: int64 [q], the caption or image that asked.
        ranks: int64 [q], how many wrong items stand before its best right one; 0 is a success at 1.
        precision: float64 [q], its average precision: the mean, over its right items, of the share
            of right ones among all that stand no lower.
        asks: int64 [pairs], the query of each right pair, as its place in ``queries``.
        images: int64 [pairs], its image. Images are what is drawn anew for error bars, for captions
            of one image are no independent observations; a query counts as often as its images do,
            on average.
        gallery: how many items were searched.
    """

    queries: Integers
    ranks: Integers
    precision: NDArray[np.float64]
    asks: Integers
    images: Integers
    gallery: int

    @property
    def shares(self) -> NDArray[np.float64]:
        """float64 [pairs], the part of its query that each pair stands for."""
        shares: NDArray[np.float64] = 1 / np.bincount(self.asks)[self.asks]
        return shares


def retrieved(
    images: Floats,
    captions: Floats,
    image_of: Integers,
    caption_of: Integers,
    block: tuple[int, int] = BLOCK,
) -> dict[str, Retrieved]:
    """Let each caption search the images and each image the captions, in bounded memory.

    Any number of captions may be right for an image, and any number of images for a caption.
    Images and captions without a right item are searched but do not ask.

    Args:
        images: float32 [n, dim], rows of unit length; may be memory-mapped.
        captions: float32 [m, dim], likewise.
        image_of: int64 [pairs], the image of each right pair; a pair stands once.
        caption_of: int64 [pairs], its caption.
        block: images and captions per matrix product; bounds the memory, not the result.

    Returns:
        ``{"text_to_image": …, "image_to_text": …}``.

    Raises:
        DataError: vectors that are not finite.
    """
    captions_ahead, images_ahead = wrong_ahead(images, captions, image_of, caption_of, block)
    return {
        "text_to_image": _queries(caption_of, images_ahead, image_of, len(images)),
        "image_to_text": _queries(image_of, captions_ahead, image_of, len(captions)),
    }


def _queries(asks: Integers, ahead: Integers, image_of: Integers, gallery: int) -> Retrieved:
    # The better a right item scores, the fewer wrong ones are ahead of it.
    order = np.lexsort((ahead, asks))
    asks, ahead = asks[order], ahead[order]
    queries, starts, places, counts = np.unique(
        asks, return_index=True, return_inverse=True, return_counts=True
    )
    place = np.arange(len(asks)) - starts[places] + 1
    precision = np.add.reduceat(place / (place + ahead), starts) / counts
    return Retrieved(queries, ahead[starts], precision, places, image_of[order], gallery)


def retrieval_figures(
    outcomes: dict[str, Retrieved], weights: NDArray[np.float64], ks: Sequence[int] = KS
) -> dict[str, NDArray[np.float64]]:
    """Recall@k, median rank (1 is best) and mean average precision of weighted images.

    Args:
        outcomes: of ``retrieved``.
        weights: float64 [b, images], how often each image counts, whole numbers; its captions count
            as often.
        ks: how many of the best count; those larger than the gallery are left out.

    Returns:
        by name, float64 [b].
    """
    figures: dict[str, NDArray[np.float64]] = {}
    for name, found in outcomes.items():
        parts = image_sums(found, weights.shape[1], ks)
        asked = np.bincount(found.images, weights=found.shares, minlength=weights.shape[1])
        queries = weights @ asked
        for figure, sums in parts.items():
            figures[f"{name}_{figure}"] = weights @ sums / queries
        figures[f"{name}_median_rank"] = _medians(found, weights)
    return figures


def image_sums(
    found: Retrieved, images: int, ks: Sequence[int] = KS
) -> dict[str, NDArray[np.float64]]:
    """What the queries of each image add to recall@k and to average precision, float64 [images]."""
    values = {f"r{k}": (found.ranks < k).astype(float) for k in ks if k <= found.gallery}
    values["map"] = found.precision
    return {
        name: np.bincount(
            found.images, weights=value[found.asks] * found.shares, minlength=images
        ).astype(np.float64)
        for name, value in values.items()
    }


def _medians(found: Retrieved, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median rank, counted from 1, where each image counts as often as its weight says."""
    ranks = found.ranks[found.asks] + 1
    order = np.argsort(ranks, kind="stable")
    ranks, images, shares = ranks[order], found.images[order], found.shares[order]
    medians = np.empty(len(weights))
    for row, weight in enumerate(weights):
        # The pairs of a query add up to it, and stand together or beside others of its rank.
        reached = np.cumsum(weight[images] * shares)
        half, rounding = reached[-1] / 2, 1e-9 * reached[-1]
        # Of an even number the mean of the two in the middle.
        middle = np.searchsorted(reached, [half - rounding, half + rounding])
        medians[row] = ranks[middle].mean()
    return medians


def retrieval_recall(
    images: Floats, captions: Floats, owners: Integers, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k in both directions, with any number of captions per image.

    A caption is right when its own image is among the k best; an image is right when any of its
    captions is among the k best (Karpathy & Fei-Fei 2015).

    Args:
        images: float32 [n, dim], rows of unit length.
        captions: float32 [m, dim], rows of unit length.
        owners: int64 [m], the row of each caption's image.
        ks: how many of the best count.

    Returns:
        ``{"text_to_image_r1": …, "image_to_text_r1": …, …}``, shares in [0, 1].

    Raises:
        DataError: vectors that are not finite.
    """
    found = retrieved(images, captions, owners, np.arange(len(captions), dtype=np.int64))
    return {
        f"{name}_r{k}": float((found[name].ranks < k).mean()) for name in DIRECTIONS for k in ks
    }
