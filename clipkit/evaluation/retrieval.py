"""Retrieval metrics: recall@k, median rank and mean average precision, in both directions.

Ranks are computed block by block, so that the matrix of all scores is never held in memory.

Tie convention: ties count against the model, unless ``ties="average"`` is chosen. The rank of a
query's best relevant item is the number of non-relevant items whose score in float64 is higher or
equal (to 1e-9), so a model that gives every item the same vector has the worst rank, not the best.
With ``"average"`` every metric is its mean over all orders of the tied items, so that such a model
scores exactly like a random order. Relevant items of the same query never count against each other.
Scores that float32 cannot tell apart are computed again in float64, so the ranks depend neither on
the block size nor on how a BLAS library sums.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import DataError
from clipkit.evaluation.bootstrap import Estimate, estimate
from clipkit.shapes import Float32, Float64, Int64

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Scores = NDArray[np.float64]
EqualCaptions = Literal["merge", "apart"]
Ties = Literal["against", "average"]

KS = (1, 5, 10, 50)
DIRECTIONS = ("text_to_image", "image_to_text")
BLOCK = (510, 8192)
"""Images and captions per block: 16 MiB of scores, and images in two parts of 255."""
_NEAR = 2e-6
"""float32 scores closer than this are computed again in float64. The largest error among 9 million
float32 products of unit vectors was 7.2e-7 at 256 dimensions and 5.5e-7 at 512 to 1,024."""
_TIE = 1e-9
_PART = 255  # rows whose ones fit into one byte
_GATHERED = 1024  # pairs computed in float64 at a time
_SPARSE = 32
"""If at most one score in this many may be ahead, these scores are looked at one by one. A good
model has next to none, and one pass over a block takes a tenth of the time of its product."""


@dataclass(frozen=True)
class Relevance:
    """Which captions are relevant to which images.

    Attributes:
        captions: int64 [m], the rows of the captions that are used: the first of merged ones.
        image_of: int64 [pairs], the image of each relevant pair.
        caption_of: int64 [pairs], its caption, as an index into ``captions``.
        distinct: the number of different captions.
    """

    captions: Int64[Integers, " m"]
    image_of: Int64[Integers, " pairs"]
    caption_of: Int64[Integers, " pairs"]
    distinct: int


def relevant_pairs(
    texts: list[str], owners: Int64[Integers, " captions"], equal_captions: EqualCaptions
) -> Relevance:
    """Match captions with images.

    Args:
        texts: the captions. Two are equal if they differ only in case and spaces, which CLIP's
            tokenizer does not see.
        owners: int64 [captions], the image of each caption.
        equal_captions: ``"merge"`` makes equal captions one, relevant to all of their images;
            ``"apart"`` keeps each relevant to its own image alone.
    """
    numbers: dict[str, int] = {}
    first: list[int] = []
    groups = np.empty(len(texts), np.int64)
    for place, text in enumerate(texts):
        words = " ".join(text.lower().split())
        if words not in numbers:
            numbers[words] = len(numbers)
            first.append(place)
        groups[place] = numbers[words]
    if equal_captions == "apart":
        rows = np.arange(len(texts), dtype=np.int64)
        return Relevance(rows, owners, rows, len(numbers))
    # An image with the same caption twice has it once.
    pairs = np.unique(np.stack([owners, groups], axis=1), axis=0)
    return Relevance(np.array(first, np.int64), pairs[:, 0], pairs[:, 1], len(numbers))


@dataclass(frozen=True)
class RetrievalResult:
    """The rank of every query in one direction.

    Attributes:
        queries: int64 [q], the caption or image that each query is.
        ranks: int64 [q], how many non-relevant items are ranked before the best relevant one;
            0 is a hit at 1. Tied items are among them if ties count against the model.
        tied: int64 [q], how many further non-relevant items tie with the best relevant one; all 0
            if ties count against the model.
        tied_relevant: int64 [q], how many relevant items have the score of the best one.
        average_precision: float64 [q]: the mean, over the relevant items, of the share of relevant
            ones among all items ranked as high.
        pair_query: int64 [pairs], the query of each relevant pair, as an index into ``queries``.
        pair_image: int64 [pairs], its image. The bootstrap resamples images, because captions of
            one image are not independent; a query counts as often as its images do, on average.
        gallery: the number of items searched.
    """

    queries: Int64[Integers, " q"]
    ranks: Int64[Integers, " q"]
    tied: Int64[Integers, " q"]
    tied_relevant: Int64[Integers, " q"]
    average_precision: Float64[Scores, " q"]
    pair_query: Int64[Integers, " pairs"]
    pair_image: Int64[Integers, " pairs"]
    gallery: int

    @property
    def shares(self) -> Float64[Scores, " pairs"]:
        """float64 [pairs], the share of its query that each pair stands for."""
        shares: NDArray[np.float64] = 1 / np.bincount(self.pair_query)[self.pair_query]
        return shares

    @property
    def mean_ranks(self) -> Float64[Scores, " q"]:
        """float64 [q], ``ranks``, averaged over all orders of the tied items."""
        # The non-relevant items fall with equal chance before, between and after the relevant ones.
        means: NDArray[np.float64] = self.ranks + self.tied / (self.tied_relevant + 1)
        return means

    def hits(self, k: int) -> Float64[Scores, " q"]:
        """float64 [q], the share of all orders of the tied items that have a hit at ``k``."""
        found = (self.ranks < k).astype(np.float64)
        for query in np.flatnonzero((self.tied > 0) & (self.ranks < k)):
            tied, relevant = int(self.tied[query]), int(self.tied_relevant[query])
            places = min(k - int(self.ranks[query]), tied + relevant)
            # Hypergeometric: no relevant item is among the first places of the tied ones.
            found[query] -= comb(tied, places) / comb(tied + relevant, places)
        return found


def measure_retrieval(
    images: Float32[Floats, "n dim"],
    captions: Float32[Floats, "m dim"],
    relevance: Relevance,
    ties: Ties = "against",
) -> tuple[dict[str, RetrievalResult], dict[str, Estimate]]:
    """Rank every query, and estimate the metrics by a bootstrap over images.

    Args:
        images: float32 [n, dim], unit rows.
        captions: float32 [m, dim], unit rows, merged or not.
        relevance: which captions are relevant to which images.
        ties: whether equal scores count against the model or are averaged over.

    Raises:
        DataError: a vector is not finite.
    """
    used = captions
    if len(relevance.captions) != len(captions):
        used = captions[relevance.captions]
    results = rank_queries(images, used, relevance.image_of, relevance.caption_of, ties=ties)
    return results, estimate(partial(retrieval_metrics, results), len(images))


def rank_queries(
    images: Float32[Floats, "n dim"],
    captions: Float32[Floats, "m dim"],
    image_of: Int64[Integers, " pairs"],
    caption_of: Int64[Integers, " pairs"],
    block: tuple[int, int] = BLOCK,
    ties: Ties = "against",
) -> dict[str, RetrievalResult]:
    """Search the images with each caption and the captions with each image, in bounded memory.

    Any number of captions may be relevant to an image, and any number of images to a caption.
    Images and captions without a relevant item are part of the gallery but are not queries.

    Args:
        images: float32 [n, dim], unit rows; may be memory-mapped.
        captions: float32 [m, dim], likewise.
        image_of: int64 [pairs], the image of each relevant pair; each pair is listed once.
        caption_of: int64 [pairs], its caption.
        block: images and captions per matrix product; bounds the memory and does not change the
            result.
        ties: whether equal scores count against the model or are averaged over.

    Returns:
        ``{"text_to_image": …, "image_to_text": …}``.

    Raises:
        DataError: a vector is not finite.
    """
    captions_ahead, images_ahead = count_ahead(images, captions, image_of, caption_of, block)
    average = ties == "average"
    return {
        "text_to_image": _result(caption_of, images_ahead, image_of, len(images), average),
        "image_to_text": _result(image_of, captions_ahead, image_of, len(captions), average),
    }


def _result(
    pair_query: Integers, count: "Ahead", image_of: Integers, gallery: int, average: bool
) -> RetrievalResult:
    ahead = count.ahead - count.tied if average else count.ahead
    tied = count.tied if average else np.zeros_like(count.tied)
    # The higher a relevant item scores, the fewer non-relevant ones are ahead of it.
    order = np.lexsort((tied, ahead, pair_query))
    pair_query, ahead, tied = pair_query[order], ahead[order], tied[order]
    queries, starts, places, counts = np.unique(
        pair_query, return_index=True, return_inverse=True, return_counts=True
    )
    place = np.arange(len(pair_query)) - starts[places] + 1
    precision = place / (place + ahead)
    best = (ahead == ahead[starts][places]) & (tied == tied[starts][places])
    relevant = np.bincount(places, weights=best).astype(np.int64)
    if tied.any():
        _average_over_ties(precision, pair_query, place, ahead, tied)
    return RetrievalResult(
        queries=queries,
        ranks=ahead[starts],
        tied=tied[starts],
        tied_relevant=relevant,
        average_precision=np.add.reduceat(precision, starts) / counts,
        pair_query=places,
        pair_image=image_of[order],
        gallery=gallery,
    )


def _average_over_ties(
    precision: Scores, query: Integers, place: Integers, ahead: Integers, tied: Integers
) -> None:
    """Replace the precision at tied relevant items by its mean over all orders.

    McSherry & Najork 2008, section 4.3: of a group of ``relevant`` and ``tied`` items, the item at
    each position is relevant with equal chance, and the ones before it are a random sample.
    """
    groups = np.stack([query, ahead, tied])
    starts = np.flatnonzero(np.any(np.diff(groups, axis=1, prepend=-1), axis=0))
    for start, end in zip(starts, np.append(starts[1:], len(query)), strict=True):
        if not tied[start]:
            continue
        relevant, size = end - start, end - start + tied[start]
        earlier, before = np.arange(size), place[start] - 1
        found = before + 1 + earlier * (relevant - 1) / max(size - 1, 1)
        at = found / (before + ahead[start] + 1 + earlier)
        precision[start:end] = at.sum() / size


def retrieval_metrics(
    results: dict[str, RetrievalResult], weights: Float64[Scores, "b n"], ks: Sequence[int] = KS
) -> dict[str, Float64[Scores, " b"]]:
    """Recall@k, median rank (1 is best) and mean average precision over weighted images.

    Args:
        results: as from ``rank_queries``.
        weights: float64 [b, images], whole numbers: how often each image counts. Its captions
            count as often.
        ks: the values of k; those larger than the gallery are left out.

    Returns:
        float64 [b] by name.
    """
    metrics: dict[str, NDArray[np.float64]] = {}
    for direction, result in results.items():
        images = weights.shape[1]
        per_image = np.bincount(result.pair_image, weights=result.shares, minlength=images)
        queries = weights @ per_image
        for name, sums in sums_per_image(result, images, ks).items():
            metrics[f"{direction}_{name}"] = weights @ sums / queries
        metrics[f"{direction}_median_rank"] = _median_ranks(result, weights)
    return metrics


def sums_per_image(
    result: RetrievalResult, images: int, ks: Sequence[int] = KS
) -> dict[str, NDArray[np.float64]]:
    """What the queries of each image add to recall@k and to average precision: float64 [images]."""
    values = {f"r{k}": result.hits(k) for k in ks if k <= result.gallery}
    values["map"] = result.average_precision
    return {
        name: np.bincount(
            result.pair_image, weights=value[result.pair_query] * result.shares, minlength=images
        ).astype(np.float64)
        for name, value in values.items()
    }


def _median_ranks(result: RetrievalResult, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median rank, counted from 1, for each row of image weights: float64 [b]."""
    ranks = result.mean_ranks[result.pair_query] + 1
    order = np.argsort(ranks, kind="stable")
    ranks, images, shares = ranks[order], result.pair_image[order], result.shares[order]
    medians = np.empty(len(weights))
    for row, weight in enumerate(weights):
        reached = np.cumsum(weight[images] * shares)
        half, rounding = reached[-1] / 2, 1e-9 * reached[-1]
        # For an even number of queries: the mean of the two in the middle.
        middle = np.searchsorted(reached, [half - rounding, half + rounding])
        medians[row] = ranks[middle].mean()
    return medians


def retrieval_recall(
    images: Float32[Floats, "n dim"],
    captions: Float32[Floats, "m dim"],
    owners: Int64[Integers, " m"],
    ks: Sequence[int] = (1, 5, 10),
    texts: list[str] | None = None,
) -> dict[str, float]:
    """Recall@k in both directions, for any number of captions per image.

    A caption is a hit if its image is among the k best; an image is a hit if any of its captions
    is (Karpathy & Fei-Fei 2015).

    Args:
        images: float32 [n, dim], unit rows.
        captions: float32 [m, dim], unit rows.
        owners: int64 [m], the row of each caption's image.
        ks: the values of k.
        texts: the m captions; equal ones are merged, as ``evaluate_retrieval`` does. None keeps
            each relevant to its own image alone.

    Returns:
        ``{"text_to_image_r1": …, "image_to_text_r1": …, …}``, shares in [0, 1].

    Raises:
        DataError: a vector is not finite.
    """
    image_of, caption_of = owners, np.arange(len(captions), dtype=np.int64)
    if texts is not None:
        relevance = relevant_pairs(texts, owners, "merge")
        captions = captions[relevance.captions]
        image_of, caption_of = relevance.image_of, relevance.caption_of
    results = rank_queries(images, captions, image_of, caption_of)
    return {f"{name}_r{k}": float(results[name].hits(k).mean()) for name in DIRECTIONS for k in ks}


@dataclass(frozen=True)
class Ahead:
    """For each relevant pair, the non-relevant items of one side that score at least as high.

    Attributes:
        ahead: int64 [pairs], their number.
        tied: int64 [pairs], how many of them score the same, to 1e-9.
    """

    ahead: Int64[Integers, " pairs"]
    tied: Int64[Integers, " pairs"]


def count_ahead(
    images: Float32[Floats, "n dim"],
    captions: Float32[Floats, "m dim"],
    image_of: Int64[Integers, " pairs"],
    caption_of: Int64[Integers, " pairs"],
    block: tuple[int, int] = BLOCK,
) -> tuple[Ahead, Ahead]:
    """For each relevant pair, how many non-relevant captions and images score at least as high.

    One product of each block of images with each block of captions serves both directions. The
    arguments are those of ``rank_queries``.

    Returns:
        Of the captions that are not relevant to the pair's image, how many score at least as high
        as the pair; the same for the images that are not relevant to its caption.

    Raises:
        DataError: a vector is not finite.
    """
    scores = _exact_scores(images, captions, image_of, caption_of)
    if not np.isfinite(scores).all():
        raise DataError(
            "some vectors are not finite, expected unit vectors; the model is broken: evaluate an "
            "earlier checkpoint"
        )
    of_images = _Side(images, captions, image_of, caption_of, scores)
    of_captions = _Side(captions, images, caption_of, image_of, scores)
    # Allocated once: fresh memory for each product costs a tenth of its time.
    buffer = np.empty(min(block[0], len(images)) * min(block[1], len(captions)), np.float32)
    for top in range(0, len(images), block[0]):
        rows = slice(top, min(top + block[0], len(images)))
        for left in range(0, len(captions), block[1]):
            columns = slice(left, min(left + block[1], len(captions)))
            shape = (rows.stop - top, columns.stop - left)
            table = buffer[: shape[0] * shape[1]].reshape(shape)
            np.matmul(images[rows], captions[columns].T, out=table)
            # Relevant pairs never count as ahead, in either direction.
            table[of_images.places(rows, columns)] = -np.inf
            of_images.add(table, rows, columns)
            of_captions.add(table.T, columns, rows)
    return Ahead(of_images.ahead, of_images.tied), Ahead(of_captions.ahead, of_captions.tied)


def _exact_scores(images: Floats, captions: Floats, i: Integers, j: Integers) -> Scores:
    """The inner products of images ``i`` with captions ``j`` in float64, [pairs]."""
    scores = np.empty(len(i))
    for start in range(0, len(i), _GATHERED):
        part = slice(start, start + _GATHERED)
        left, right = images[i[part]].astype(np.float64), captions[j[part]].astype(np.float64)
        scores[part] = (left * right).sum(axis=1)
    return scores


class _Side:
    """One direction: counts the non-relevant items of the other side that are ahead, by block.

    Attributes:
        ahead: int64 [pairs], the count so far.
        tied: int64 [pairs], how many of these score the same.
    """

    def __init__(
        self, own: Floats, others: Floats, own_of: Integers, other_of: Integers, scores: Scores
    ) -> None:
        self.own, self.others = own, others
        self.own_of, self.other_of, self.scores = own_of, other_of, scores
        self.ahead = np.zeros(len(own_of), np.int64)
        self.tied = np.zeros(len(own_of), np.int64)
        self._order = np.lexsort((scores, own_of))
        self._items, starts = np.unique(own_of[self._order], return_index=True)
        self._starts = np.append(starts, len(own_of))

    def places(self, mine: slice, theirs: slice) -> tuple[Integers, Integers]:
        """The positions of the relevant pairs in a block's table."""
        first, last = np.searchsorted(self._items, [mine.start, mine.stop])
        pairs = self._order[self._starts[first] : self._starts[last]]
        other = self.other_of[pairs]
        inside = (other >= theirs.start) & (other < theirs.stop)
        return self.own_of[pairs[inside]] - mine.start, other[inside] - theirs.start

    def add(self, table: Floats, mine: slice, theirs: slice) -> None:
        """Count the items of one block.

        Args:
            table: float32 [own items, items of the other side], in either memory order, with
                minus infinity at the relevant pairs.
            mine: the block's own items.
            theirs: the block's items of the other side.
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
                # A score that is not ahead of the lowest relevant item is not ahead of higher ones.
                few = few.at_least(low)
                counts, own, other = few.count(high)
            if len(own):
                again = _exact_scores(self.own, self.others, mine.start + own, theirs.start + other)
                ahead = again >= limits[own] - _TIE
                counts += np.bincount(own[ahead], minlength=len(table))
                tied = ahead & (again <= limits[own] + _TIE)
                self.tied[pairs] += np.bincount(own[tied], minlength=len(table))[rows]
            self.ahead[pairs] += counts[rows]

    def _levels(self, part: slice) -> Iterator[Integers]:
        """The lowest pair of each item of a block, then the second lowest, and so on."""
        first, last = np.searchsorted(self._items, [part.start, part.stop])
        starts, ends = self._starts[first:last], self._starts[first + 1 : last + 1]
        while len(starts):
            yield self._order[starts]
            starts, ends = starts[starts + 1 < ends] + 1, ends[starts + 1 < ends]


@dataclass(frozen=True)
class _Few:
    """A few scores of a table, as a sparse matrix.

    Attributes:
        rows: the number of rows of the table.
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
        mask = self.values >= low[self.own]
        return _Few(self.rows, self.own[mask], self.other[mask], self.values[mask])

    def count(self, high: Floats) -> tuple[Integers, Integers, Integers]:
        """See ``_count_all``."""
        above = self.values > high[self.own]
        counts = np.bincount(self.own[above], minlength=self.rows)
        return counts, self.own[~above], self.other[~above]


def _count_all(
    table: Floats, most: NDArray[np.bool_], high: Floats
) -> tuple[Integers, Integers, Integers]:
    """How many scores of each row are above a limit, and the other ones in ``most``."""
    above = table > high[:, None]
    counts = _ones(above)
    doubtful = np.flatnonzero(counts != _ones(most))
    own, other = np.nonzero(above[doubtful] ^ most[doubtful])
    return counts, doubtful[own], other


def _ones(mask: NDArray[np.bool_]) -> Integers:
    """The ones in each row. Across the memory order, bytes add up ten times as fast as integers."""
    if mask.flags.c_contiguous:
        return np.array([np.count_nonzero(row) for row in mask], np.int64)
    counts = np.zeros(len(mask), np.int64)
    for start in range(0, mask.shape[1], _PART):
        part = mask[:, start : start + _PART].view(np.uint8)
        counts += np.add.reduce(part, axis=1, dtype=np.uint8)
    return counts
