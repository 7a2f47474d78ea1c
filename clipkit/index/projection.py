"""Projections: vectors laid out on a plane by t-SNE, and clusters of them with names."""

import faiss
import numpy as np
from numpy.typing import NDArray

from clipkit.errors import DataError, MissingExtraError
from clipkit.progress import progress_bar
from clipkit.store.shards import Vectors

COMPONENTS = 50
"""Principal components that the layout starts from: the rest of CLIP's vectors is mostly noise to
it, and neighbours in 50 dimensions are found several times faster than in 512."""
PERPLEXITY = 30.0
"""How many neighbours count (van der Maaten & Hinton 2008, section 2: 5 to 50)."""
STEPS = (250, 500)
"""Of the descent, with neighbours drawn together more strongly at first (van der Maaten & Hinton
2008, section 3.4), and without."""
REPORT_EVERY = 10
"""Steps between updates of the progress bar."""
FEWEST = 5
"""Fewest items of a projection."""


def principal_components(vectors: Vectors, dims: int = COMPONENTS) -> Vectors:
    """Vectors, float32 [n, dim], in the directions in which they vary most: float32 [n, ≤ dims]."""
    centred = vectors - vectors.mean(axis=0)
    # Of the small covariance matrix instead of the data: one pass, whatever n.
    values, directions = np.linalg.eigh(centred.T @ centred)
    best = np.argsort(values)[::-1][: min(dims, len(vectors))]
    return np.ascontiguousarray(centred @ directions[:, best], np.float32)


def lay_out(vectors: Vectors, seed: int = 0) -> NDArray[np.float32]:
    """Places on the unit square by t-SNE, float32 [n, 2]; x and y on the same scale.

    The t-SNE is openTSNE's (Poličar et al. 2024), whose cost grows with n rather than n²; it
    begins with the first two principal components, so that the same vectors give the same map and
    far parts keep their sides (Kobak & Berens 2019).

    Args:
        vectors: float32 [n, dim].
        seed: of what is left to chance.

    Raises:
        DataError: there are too few.
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
            "a map takes the package openTSNE, which is not installed; "
            "pip install 'clipkit[map]' brings it"
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
        raise DataError(f"a map of {count} items says nothing, expected at least {FEWEST}")


def neighbours(points: Vectors, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The ``count`` nearest other points of each, and their Euclidean distances, [n, count] each.

    Exact: 50,000 points of 50 dimensions take some seconds.
    """
    squared, ids = faiss.knn(points, points, count + 1, metric=faiss.METRIC_L2)
    # The point itself is usually the first, but not where another one lies on the same spot.
    own = ids == np.arange(len(points))[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(points), count)
    return ids[~own].reshape(shape), np.sqrt(np.maximum(squared[~own], 0)).reshape(shape)


def unit_square(places: NDArray[np.floating]) -> NDArray[np.float32]:
    """Places moved and scaled into [0, 1]², x and y alike: [n, 2] to float32 [n, 2]."""
    low, high = places.min(axis=0), places.max(axis=0)
    middle, extent = (low + high) / 2, float((high - low).max()) or 1.0
    return np.asarray((places - middle) / extent + 0.5, np.float32)


def cluster(vectors: Vectors, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Spherical k-means: the cluster of each vector, int64 [n], the largest cluster being 0.

    Args:
        vectors: float32 [n, dim], of unit length.
        count: how many clusters are looked for; empty ones are left out.
        seed: of where they start.
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
    """A name for each cluster: the label that distinguishes it most from the collection.

    The score of a label is its inner product with the cluster's mean vector less the mean of all,
    for some labels are near to every image of a model. Clusters that share their best label are
    distinguished by their second.

    Args:
        vectors: float32 [n, dim].
        clusters: int64 [n], from 0 on.
        labels: the names to choose among, two or more.
        weights: float32 [labels, dim], their class weights.
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
