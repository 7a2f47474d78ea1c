"""clipkit: pretrain CLIP-style models, classify images zero-shot, search images by text.

Importing this package loads neither torch nor faiss; each public name is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ClipkitError": "clipkit.errors",
    "Comparison": "clipkit.tasks.compare",
    "EmbeddingStore": "clipkit.store.embedding_store",
    "Encoder": "clipkit.models.encoder",
    "Hit": "clipkit.index.hits",
    "Hits": "clipkit.index.hits",
    "IndexWriter": "clipkit.index.writer",
    "Manifest": "clipkit.artifacts",
    "ModelRef": "clipkit.artifacts",
    "Prediction": "clipkit.classifiers.predictions",
    "Predictions": "clipkit.classifiers.predictions",
    "ProbeReport": "clipkit.tasks.probe",
    "Report": "clipkit.evaluation.report",
    "SuiteReport": "clipkit.tasks.suite",
    "TrainConfig": "clipkit.config",
    "VectorIndex": "clipkit.index.vector_index",
    "ZeroShotClassifier": "clipkit.classifiers.zero_shot",
    "add_images": "clipkit.tasks.sync",
    "build_index": "clipkit.tasks.index",
    "calibrate_index": "clipkit.tasks.index",
    "check_data": "clipkit.tasks.check_data",
    "check_index": "clipkit.tasks.check_index",
    "classify": "clipkit.tasks.classify",
    "compact_index": "clipkit.tasks.index",
    "compare": "clipkit.tasks.compare",
    "config_fields": "clipkit.tasks.config",
    "draw_map": "clipkit.tasks.map",
    "embed": "clipkit.tasks.embed",
    "evaluate_retrieval": "clipkit.tasks.evaluate",
    "evaluate_suite": "clipkit.tasks.suite",
    "evaluate_zero_shot": "clipkit.tasks.evaluate",
    "find_images": "clipkit.data.images",
    "info_nce": "clipkit.training.loss",
    "init_config": "clipkit.tasks.config",
    "load_model": "clipkit.models.loading",
    "merge_indexes": "clipkit.index.merge",
    "open_index": "clipkit.index.vector_index",
    "open_source": "clipkit.data.open_source",
    "open_store": "clipkit.store.embedding_store",
    "plot_confusion": "clipkit.tasks.evaluate",
    "plot_runs": "clipkit.tasks.plot",
    "plot_similarity": "clipkit.tasks.plot",
    "probe": "clipkit.tasks.probe",
    "read_image": "clipkit.data.images",
    "remove_items": "clipkit.tasks.index",
    "search": "clipkit.tasks.search",
    "sync_index": "clipkit.tasks.sync",
    "tokenize": "clipkit.models.tokenizer",
    "train": "clipkit.tasks.train",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from clipkit.artifacts import Manifest as Manifest
    from clipkit.artifacts import ModelRef as ModelRef
    from clipkit.classifiers.predictions import Prediction as Prediction
    from clipkit.classifiers.predictions import Predictions as Predictions
    from clipkit.classifiers.zero_shot import ZeroShotClassifier as ZeroShotClassifier
    from clipkit.config import TrainConfig as TrainConfig
    from clipkit.data.images import find_images as find_images
    from clipkit.data.images import read_image as read_image
    from clipkit.data.open_source import open_source as open_source
    from clipkit.errors import ClipkitError as ClipkitError
    from clipkit.evaluation.report import Report as Report
    from clipkit.index.hits import Hit as Hit
    from clipkit.index.hits import Hits as Hits
    from clipkit.index.merge import merge_indexes as merge_indexes
    from clipkit.index.vector_index import VectorIndex as VectorIndex
    from clipkit.index.vector_index import open_index as open_index
    from clipkit.index.writer import IndexWriter as IndexWriter
    from clipkit.models.encoder import Encoder as Encoder
    from clipkit.models.loading import load_model as load_model
    from clipkit.models.tokenizer import tokenize as tokenize
    from clipkit.store.embedding_store import EmbeddingStore as EmbeddingStore
    from clipkit.store.embedding_store import open_store as open_store
    from clipkit.tasks.check_data import check_data as check_data
    from clipkit.tasks.check_index import check_index as check_index
    from clipkit.tasks.classify import classify as classify
    from clipkit.tasks.compare import Comparison as Comparison
    from clipkit.tasks.compare import compare as compare
    from clipkit.tasks.config import config_fields as config_fields
    from clipkit.tasks.config import init_config as init_config
    from clipkit.tasks.embed import embed as embed
    from clipkit.tasks.evaluate import evaluate_retrieval as evaluate_retrieval
    from clipkit.tasks.evaluate import evaluate_zero_shot as evaluate_zero_shot
    from clipkit.tasks.evaluate import plot_confusion as plot_confusion
    from clipkit.tasks.index import build_index as build_index
    from clipkit.tasks.index import calibrate_index as calibrate_index
    from clipkit.tasks.index import compact_index as compact_index
    from clipkit.tasks.index import remove_items as remove_items
    from clipkit.tasks.map import draw_map as draw_map
    from clipkit.tasks.plot import plot_runs as plot_runs
    from clipkit.tasks.plot import plot_similarity as plot_similarity
    from clipkit.tasks.probe import ProbeReport as ProbeReport
    from clipkit.tasks.probe import probe as probe
    from clipkit.tasks.search import search as search
    from clipkit.tasks.suite import SuiteReport as SuiteReport
    from clipkit.tasks.suite import evaluate_suite as evaluate_suite
    from clipkit.tasks.sync import add_images as add_images
    from clipkit.tasks.sync import sync_index as sync_index
    from clipkit.tasks.train import train as train
    from clipkit.training.loss import info_nce as info_nce


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
