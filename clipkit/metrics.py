"""Recall and accuracy: pure functions on arrays."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


def retrieval_ranks(
    queries: Floats,
    gallery: Floats,
    query_groups: Integers,
    gallery_groups: Integers,
    block: int = 1024,
) -> Integers:
    """For each query, how many wrong items score at least as high as its best right one.

    0 means that the query found a right item first. Ties count against the query, so that vectors
    which are all equal do not look perfect.

    Args:
        queries: float32 [m, dim].
        gallery: float32 [n, dim].
        query_groups: int64 [m]; an item is right for a query if their groups are equal.
        gallery_groups: int64 [n].
        block: queries per matrix product; bounds the memory, not the result.

    Returns:
        int64 [m]; n for a query without a right item.
    """
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        scores = queries[part] @ gallery.T
        right = query_groups[part, None] == gallery_groups[None, :]
        best = np.where(right, scores, -np.inf).max(axis=1, initial=-np.inf)
        ahead = ((scores >= best[:, None]) & ~right).sum(axis=1)
        ranks[part] = np.where(np.isfinite(best), ahead, len(gallery))
    return ranks


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
    """
    numbers = np.arange(len(images), dtype=np.int64)
    to_image = retrieval_ranks(captions, images, owners, numbers)
    with_captions = np.unique(owners)
    to_text = retrieval_ranks(images[with_captions], captions, with_captions, owners)
    result = {}
    for name, ranks in (("text_to_image", to_image), ("image_to_text", to_text)):
        for k in ks:
            result[f"{name}_r{k}"] = float((ranks < k).mean())
    return result


def accuracy(
    probabilities: Floats, targets: Integers, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Top-k accuracy and the mean of the classes' own accuracies.

    Args:
        probabilities: float32 [n, classes], or any scores, higher is better.
        targets: int64 [n], the right class of each.
        ks: how many of the best count; those larger than the number of classes are left out.
    """
    right = probabilities[np.arange(len(targets)), targets]
    others = np.arange(probabilities.shape[1])[None, :] != targets[:, None]
    ranks = ((probabilities >= right[:, None]) & others).sum(axis=1)
    result = {f"top{k}": float((ranks < k).mean()) for k in ks if k <= probabilities.shape[1]}
    classes = np.unique(targets)
    result["mean_per_class"] = float(np.mean([(ranks[targets == c] < 1).mean() for c in classes]))
    return result
