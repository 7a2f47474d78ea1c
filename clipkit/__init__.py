"""clipkit: pretrain CLIP-style models, classify images zero-shot, search images by text.

Importing this package loads neither torch nor faiss; each public name is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Answers": "clipkit.model.answers",
    "ClipkitError": "clipkit.errors",
    "EmbeddingStore": "clipkit.store.embeddings",
    "Encoder": "clipkit.model.encoder",
    "Hit": "clipkit.store.vector_index",
    "IndexWriter": "clipkit.store.writer",
    "Manifest": "clipkit.manifest",
    "ModelRef": "clipkit.manifest",
    "Prediction": "clipkit.model.classifier",
    "Searcher": "clipkit.tasks.search",
    "TrainConfig": "clipkit.config",
    "VectorIndex": "clipkit.store.vector_index",
    "ZeroShotClassifier": "clipkit.model.classifier",
    "add_images": "clipkit.tasks.sync",
    "build_index": "clipkit.tasks.index",
    "check_data": "clipkit.tasks.check",
    "check_index": "clipkit.tasks.check_index",
    "classify": "clipkit.tasks.classify",
    "compact_index": "clipkit.tasks.upkeep",
    "draw_map": "clipkit.tasks.map",
    "embed": "clipkit.tasks.embed",
    "evaluate_retrieval": "clipkit.tasks.evaluate",
    "evaluate_zeroshot": "clipkit.tasks.evaluate",
    "find_images": "clipkit.data.images",
    "info_nce": "clipkit.model.loss",
    "load": "clipkit.model.load",
    "merge_indexes": "clipkit.store.merge",
    "open_source": "clipkit.data.sources",
    "plot_confusion": "clipkit.tasks.evaluate",
    "plot_runs": "clipkit.tasks.plot",
    "plot_similarity": "clipkit.tasks.plot",
    "read_image": "clipkit.data.images",
    "remove_items": "clipkit.tasks.upkeep",
    "sync_index": "clipkit.tasks.sync",
    "tokenize": "clipkit.model.tokenizer",
    "train": "clipkit.tasks.train",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from clipkit.config import TrainConfig as TrainConfig
    from clipkit.data.images import find_images as find_images
    from clipkit.data.images import read_image as read_image
    from clipkit.data.sources import open_source as open_source
    from clipkit.errors import ClipkitError as ClipkitError
    from clipkit.manifest import Manifest as Manifest
    from clipkit.manifest import ModelRef as ModelRef
    from clipkit.model.answers import Answers as Answers
    from clipkit.model.classifier import Prediction as Prediction
    from clipkit.model.classifier import ZeroShotClassifier as ZeroShotClassifier
    from clipkit.model.encoder import Encoder as Encoder
    from clipkit.model.load import load as load
    from clipkit.model.loss import info_nce as info_nce
    from clipkit.model.tokenizer import tokenize as tokenize
    from clipkit.store.embeddings import EmbeddingStore as EmbeddingStore
    from clipkit.store.merge import merge_indexes as merge_indexes
    from clipkit.store.vector_index import Hit as Hit
    from clipkit.store.vector_index import VectorIndex as VectorIndex
    from clipkit.store.writer import IndexWriter as IndexWriter
    from clipkit.tasks.check import check_data as check_data
    from clipkit.tasks.check_index import check_index as check_index
    from clipkit.tasks.classify import classify as classify
    from clipkit.tasks.embed import embed as embed
    from clipkit.tasks.evaluate import evaluate_retrieval as evaluate_retrieval
    from clipkit.tasks.evaluate import evaluate_zeroshot as evaluate_zeroshot
    from clipkit.tasks.evaluate import plot_confusion as plot_confusion
    from clipkit.tasks.index import build_index as build_index
    from clipkit.tasks.map import draw_map as draw_map
    from clipkit.tasks.plot import plot_runs as plot_runs
    from clipkit.tasks.plot import plot_similarity as plot_similarity
    from clipkit.tasks.search import Searcher as Searcher
    from clipkit.tasks.sync import add_images as add_images
    from clipkit.tasks.sync import sync_index as sync_index
    from clipkit.tasks.train import train as train
    from clipkit.tasks.upkeep import compact_index as compact_index
    from clipkit.tasks.upkeep import remove_items as remove_items


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
