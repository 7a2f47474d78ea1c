"""Made-up vectors with CLIP's gap, from scripts/gap_vectors.py, in a size for tests."""

import importlib.util
from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[1] / "scripts" / "gap_vectors.py"
_spec = importlib.util.spec_from_file_location("gap_vectors", FILE)
gap_vectors = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gap_vectors)


def gap(images, texts, dim=64, topics=40):
    """Unit float32 image vectors and text vectors."""
    world = gap_vectors.GapVectors(dim, topics)
    return np.concatenate([*world.images(images)]), world.texts(texts)
