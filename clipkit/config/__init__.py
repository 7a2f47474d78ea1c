"""The configuration of a training run: frozen dataclasses, TOML in, resolved TOML out."""

from clipkit.config.sections import (
    AugmentConfig,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from clipkit.config.toml import dump_config, load_config, parse_config

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "LoopConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
