"""Recall@k, median rank and mean average precision of captions finding images and the reverse."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipkit.metrics.ranks import BLOCK, Floats, Integers, wrong_ahead

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
