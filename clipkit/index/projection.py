"""Projections: a 2-D t-SNE layout of vectors, and named clusters."""

import faiss
import numpy as np
from numpy.typing import NDArray

from clipkit.errors import DataError, MissingExtraError
from clipkit.progress import progress_bar
from clipkit.store.shards import Vectors

COMPONENTS = 50
"""Principal components that t-SNE sees. The remaining components of CLIP vectors are mostly noise
for it, and a neighbour search in 50 dimensions is several times faster than in 512."""
PERPLEXITY = 30.0
"""Effective number of neighbours (van der Maaten & Hinton 2008, section 2: 5 to 50)."""
STEPS = (250, 500)
"""Gradient descent steps with early exaggeration (van der Maaten & Hinton 2008, section 3.4), and
without."""
REPORT_EVERY = 10
"""Steps between updates of the progress bar."""
FEWEST = 5
"""Minimum number of items of a projection."""


def principal_components(vectors: Vectors, dims: int = COMPONENTS) -> Vectors:
    """Project vectors, float32 [n, dim], onto their principal components: float32 [n, ≤ dims]."""
    centred = vectors - vectors.mean(axis=0)
    # Decompose the dim × dim covariance matrix instead of the data: one pass for any n.
    values, directions = np.linalg.eigh(centred.T @ centred)
    best = np.argsort(values)[::-1][: min(dims, len(vectors))]
    return np.ascontiguousarray(centred @ directions[:, best], np.float32)


def project(vectors: Vectors, seed: int = 0) -> NDArray[np.float32]:
    """Lay vectors out on the unit square by t-SNE, float32 [n, 2], x and y on the same scale.

    This uses openTSNE (Poličar et al. 2024), whose cost is linear in n rather than quadratic. It
    is initialised with the first two principal components, which makes the map reproducible and
    preserves its global structure (Kobak & Berens 2019).

    Args:
        vectors: float32 [n, dim].
        seed: random seed.

    Raises:
        DataError: there are too few vectors.
        MissingExtraError: openTSNE is not installed.
    """
    require_enough(len(vectors))
    try:
        from openTSNE import TSNE
        from openTSNE.affinity import PerplexityBasedNN
        from openTSNE.initialization import rescale
        from openTSNE.nearest_neighbors import PrecomputedNeighbors
    except ImportError:
        raise MissingExtraError(
            "a map needs openTSNE, which is not installed; pip install 'clipkit[map]'"
        ) from None
    reduced = principal_components(vectors)
    perplexity = min(PERPLEXITY, (len(reduced) - 1) / 3)
    count = min(int(3 * perplexity), len(reduced) - 1)
    near = PrecomputedNeighbors(*neighbours(reduced, count))
    affinities = PerplexityBasedNN(knn_index=near, perplexity=perplexity, random_state=seed)
    start = rescale(reduced[:, :2].astype(np.float64))
    with progress_bar(total=sum(STEPS), unit="step", desc="laying out") as bar:

        def report(*_: object) -> None:
            bar.update(REPORT_EVERY)

        tsne = TSNE(
            early_exaggeration_iter=STEPS[0],
            n_iter=STEPS[1],
            callbacks=report,
            callbacks_every_iters=REPORT_EVERY,
            random_state=seed,
            n_jobs=-1,
        )
        places = np.asarray(tsne.fit(affinities=affinities, initialization=start))
    return unit_square(places)


def require_enough(count: int) -> None:
    """Raise DataError if there are too few items for a projection."""
    if count < FEWEST:
        raise DataError(f"cannot draw a map of {count} items, expected at least {FEWEST}")


def neighbours(points: Vectors, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The ``count`` nearest neighbours of each point and their L2 distances, [n, count] each.

    The search is exact: 50,000 points of 50 dimensions take a few seconds.
    """
    squared, ids = faiss.knn(points, points, count + 1, metric=faiss.METRIC_L2)
    # A point is usually its own first neighbour, but not if it has a duplicate.
    own = ids == np.arange(len(points))[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(points), count)
    return ids[~own].reshape(shape), np.sqrt(np.maximum(squared[~own], 0)).reshape(shape)


def unit_square(places: NDArray[np.floating]) -> NDArray[np.float32]:
    """Shift and scale places, [n, 2], into [0, 1]² with one scale for x and y: float32 [n, 2]."""
    low, high = places.min(axis=0), places.max(axis=0)
    middle, extent = (low + high) / 2, float((high - low).max()) or 1.0
    return np.asarray((places - middle) / extent + 0.5, np.float32)


def cluster(vectors: Vectors, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Spherical k-means: the cluster of each vector, int64 [n], ordered by size, largest first.

    Args:
        vectors: float32 [n, dim], of unit length.
        count: number of clusters; empty clusters are dropped.
        seed: random seed of the initial centroids.
    """
    kmeans = faiss.Kmeans(
        vectors.shape[1], count, spherical=True, seed=seed, min_points_per_centroid=1, niter=20
    )
    kmeans.train(vectors)
    found = kmeans.index.search(vectors, 1)[1][:, 0]
    _, numbers, sizes = np.unique(found, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    return np.asarray(rank[numbers], np.int64)


def name_clusters(
    vectors: Vectors, clusters: NDArray[np.int64], labels: list[str], weights: Vectors
) -> list[str]:
    """Name each cluster by the label that best distinguishes it from the whole collection.

    The score of a label is its inner product with the cluster's mean vector minus the mean of all
    vectors, because some labels are close to every image. Clusters that share their best label
    also get their second-best label.

    Args:
        vectors: float32 [n, dim].
        clusters: int64 [n], numbered from 0.
        labels: the candidate names, at least two.
        weights: float32 [labels, dim], the class weights of the labels.
    """
    count = int(clusters.max()) + 1
    sums = np.zeros((count, vectors.shape[1]), np.float64)
    np.add.at(sums, clusters, vectors)
    means = sums / np.bincount(clusters, minlength=count)[:, None]
    best = np.argsort(-((means - vectors.mean(axis=0)) @ weights.T), axis=1, kind="stable")
    first = [labels[row[0]] for row in best]
    return [
        name if first.count(name) == 1 else f"{name}, {labels[row[1]]}"
        for name, row in zip(first, best, strict=True)
    ]
