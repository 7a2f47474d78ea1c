"""clipkit: pretrain CLIP-style models, classify images zero-shot, search images by text.

Importing this package loads neither torch nor faiss nor numpy; each public name is loaded on its
first use. Every command of the command line has a function here, and every type that such a
function returns and every error that it raises is exported, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "clipkit.artifacts": ("Manifest", "ModelRef"),
    "clipkit.classifiers.heads": ("open_classifier", "save_classifier"),
    "clipkit.classifiers.predictions": ("LabelScore", "Prediction", "Predictions"),
    "clipkit.classifiers.zero_shot": ("Classifier", "ZeroShotClassifier"),
    "clipkit.config": ("TrainConfig", "load_config"),
    "clipkit.data.images": ("find_images", "read_image"),
    "clipkit.data.labels": ("Label",),
    "clipkit.data.open_source": ("Source", "open_source"),
    "clipkit.reports.plots": ("Drawing",),
    "clipkit.errors": (
        "ArgumentError",
        "ArtifactError",
        "CaptionError",
        "ClipkitError",
        "ConfigError",
        "DataError",
        "ImageError",
        "MissingExtraError",
        "ModelError",
        "ModelMismatchError",
        "ServeError",
        "SkipLimitError",
        "SpecError",
        "TrainingError",
    ),
    "clipkit.evaluation.bootstrap": ("Estimate",),
    "clipkit.evaluation.report": ("ClassificationOutcome", "Report", "RetrievalOutcome"),
    "clipkit.index.hits": ("Hit", "Hits"),
    "clipkit.index.merge": ("merge_indexes",),
    "clipkit.index.vector_index": ("VectorIndex", "open_index"),
    "clipkit.index.writer": ("IndexWriter",),
    "clipkit.models.encoder": ("Encoder",),
    "clipkit.models.loading": ("load_model",),
    "clipkit.models.tokenizer": ("CaptionTruncationWarning", "tokenize"),
    "clipkit.store.embedding_store": ("EmbeddingStore", "open_store"),
    "clipkit.tasks.check_data": ("DataReport", "check_data"),
    "clipkit.tasks.check_index": ("IndexReport", "check_index"),
    "clipkit.tasks.classify": ("classify",),
    "clipkit.tasks.compare": ("Comparison", "compare"),
    "clipkit.tasks.config": ("ConfigField", "StarterConfig", "config_fields", "init_config"),
    "clipkit.tasks.embed": ("embed",),
    "clipkit.tasks.evaluate": ("evaluate_retrieval", "evaluate_zero_shot", "plot_confusion"),
    "clipkit.tasks.index": (
        "Calibrated",
        "build_index",
        "calibrate_index",
        "compact_index",
        "remove_items",
    ),
    "clipkit.tasks.info": ("Info", "info"),
    "clipkit.tasks.map": ("MapSummary", "draw_map"),
    "clipkit.tasks.plot": ("plot_runs", "plot_similarity"),
    "clipkit.tasks.probe": ("ProbeReport", "ProbeResult", "probe"),
    "clipkit.tasks.search": ("search",),
    "clipkit.tasks.serve": ("serve",),
    "clipkit.tasks.suite": ("SuiteRecord", "SuiteReport", "evaluate_suite"),
    "clipkit.tasks.sync": ("Changes", "add_images", "sync_index"),
    "clipkit.tasks.train": ("TrainResult", "train"),
    "clipkit.training.loss": ("info_nce",),
}
"""The public names by the module that defines them."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:  # the same names for type checkers; a test compares the two lists
    from clipkit.artifacts import Manifest as Manifest
    from clipkit.artifacts import ModelRef as ModelRef
    from clipkit.classifiers.heads import open_classifier as open_classifier
    from clipkit.classifiers.heads import save_classifier as save_classifier
    from clipkit.classifiers.predictions import LabelScore as LabelScore
    from clipkit.classifiers.predictions import Prediction as Prediction
    from clipkit.classifiers.predictions import Predictions as Predictions
    from clipkit.classifiers.zero_shot import Classifier as Classifier
    from clipkit.classifiers.zero_shot import ZeroShotClassifier as ZeroShotClassifier
    from clipkit.config import TrainConfig as TrainConfig
    from clipkit.config import load_config as load_config
    from clipkit.data.images import find_images as find_images
    from clipkit.data.images import read_image as read_image
    from clipkit.data.labels import Label as Label
    from clipkit.data.open_source import Source as Source
    from clipkit.data.open_source import open_source as open_source
    from clipkit.errors import ArgumentError as ArgumentError
    from clipkit.errors import ArtifactError as ArtifactError
    from clipkit.errors import CaptionError as CaptionError
    from clipkit.errors import ClipkitError as ClipkitError
    from clipkit.errors import ConfigError as ConfigError
    from clipkit.errors import DataError as DataError
    from clipkit.errors import ImageError as ImageError
    from clipkit.errors import MissingExtraError as MissingExtraError
    from clipkit.errors import ModelError as ModelError
    from clipkit.errors import ModelMismatchError as ModelMismatchError
    from clipkit.errors import ServeError as ServeError
    from clipkit.errors import SkipLimitError as SkipLimitError
    from clipkit.errors import SpecError as SpecError
    from clipkit.errors import TrainingError as TrainingError
    from clipkit.evaluation.bootstrap import Estimate as Estimate
    from clipkit.evaluation.report import ClassificationOutcome as ClassificationOutcome
    from clipkit.evaluation.report import Report as Report
    from clipkit.evaluation.report import RetrievalOutcome as RetrievalOutcome
    from clipkit.index.hits import Hit as Hit
    from clipkit.index.hits import Hits as Hits
    from clipkit.index.merge import merge_indexes as merge_indexes
    from clipkit.index.vector_index import VectorIndex as VectorIndex
    from clipkit.index.vector_index import open_index as open_index
    from clipkit.index.writer import IndexWriter as IndexWriter
    from clipkit.models.encoder import Encoder as Encoder
    from clipkit.models.loading import load_model as load_model
    from clipkit.models.tokenizer import CaptionTruncationWarning as CaptionTruncationWarning
    from clipkit.models.tokenizer import tokenize as tokenize
    from clipkit.reports.plots import Drawing as Drawing
    from clipkit.store.embedding_store import EmbeddingStore as EmbeddingStore
    from clipkit.store.embedding_store import open_store as open_store
    from clipkit.tasks.check_data import DataReport as DataReport
    from clipkit.tasks.check_data import check_data as check_data
    from clipkit.tasks.check_index import IndexReport as IndexReport
    from clipkit.tasks.check_index import check_index as check_index
    from clipkit.tasks.classify import classify as classify
    from clipkit.tasks.compare import Comparison as Comparison
    from clipkit.tasks.compare import compare as compare
    from clipkit.tasks.config import ConfigField as ConfigField
    from clipkit.tasks.config import StarterConfig as StarterConfig
    from clipkit.tasks.config import config_fields as config_fields
    from clipkit.tasks.config import init_config as init_config
    from clipkit.tasks.embed import embed as embed
    from clipkit.tasks.evaluate import evaluate_retrieval as evaluate_retrieval
    from clipkit.tasks.evaluate import evaluate_zero_shot as evaluate_zero_shot
    from clipkit.tasks.evaluate import plot_confusion as plot_confusion
    from clipkit.tasks.index import Calibrated as Calibrated
    from clipkit.tasks.index import build_index as build_index
    from clipkit.tasks.index import calibrate_index as calibrate_index
    from clipkit.tasks.index import compact_index as compact_index
    from clipkit.tasks.index import remove_items as remove_items
    from clipkit.tasks.info import Info as Info
    from clipkit.tasks.info import info as info
    from clipkit.tasks.map import MapSummary as MapSummary
    from clipkit.tasks.map import draw_map as draw_map
    from clipkit.tasks.plot import plot_runs as plot_runs
    from clipkit.tasks.plot import plot_similarity as plot_similarity
    from clipkit.tasks.probe import ProbeReport as ProbeReport
    from clipkit.tasks.probe import ProbeResult as ProbeResult
    from clipkit.tasks.probe import probe as probe
    from clipkit.tasks.search import search as search
    from clipkit.tasks.serve import serve as serve
    from clipkit.tasks.suite import SuiteRecord as SuiteRecord
    from clipkit.tasks.suite import SuiteReport as SuiteReport
    from clipkit.tasks.suite import evaluate_suite as evaluate_suite
    from clipkit.tasks.sync import Changes as Changes
    from clipkit.tasks.sync import add_images as add_images
    from clipkit.tasks.sync import sync_index as sync_index
    from clipkit.tasks.train import TrainResult as TrainResult
    from clipkit.tasks.train import train as train
    from clipkit.training.loss import info_nce as info_nce


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
