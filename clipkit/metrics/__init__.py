"""Recall, accuracy, calibration and their error bars: pure functions on arrays."""

from clipkit.metrics.classification import Classified, classification_figures, classified
from clipkit.metrics.intervals import Estimate, estimate
from clipkit.metrics.ranks import Floats, Integers
from clipkit.metrics.retrieval import Retrieved, retrieval_figures, retrieval_recall, retrieved

__all__ = [
    "Classified",
    "Estimate",
    "Floats",
    "Integers",
    "Retrieved",
    "classification_figures",
    "classified",
    "estimate",
    "retrieval_figures",
    "retrieval_recall",
    "retrieved",
]
