"""Synthetic vectors with CLIP's modality gap, in a size for tests."""

import numpy as np

from scripts.benchmarks.search import gap_vectors


def gap(images, texts, dim=64, topics=40):
    """Unit float32 image vectors and text vectors."""
    world = gap_vectors.GapVectors(dim, topics)
    return np.concatenate([*world.images(images)]), world.texts(texts)
