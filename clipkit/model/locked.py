"""Locked towers: which of their parts are frozen, and which are trained on top.

Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image Text Tuning".
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from clipkit.config import ModelConfig
from clipkit.errors import ConfigError


@dataclass(frozen=True)
class LockedTower:
    """A tower that is not trained.

    Attributes:
        body: the frozen part; its outputs can be stored.
        head: its projection into the shared space where that is trained, else the identity.
    """

    body: nn.Module
    head: nn.Module


def lock_towers(config: ModelConfig, clip: Any) -> dict[str, LockedTower]:
    """Freeze the towers that ``config.lock`` names: those parts whose weights were loaded.

    Args:
        config: which towers, and where their weights came from.
        clip: the open_clip model.

    Raises:
        ConfigError: a tower with random weights is to be locked, or nothing is left to train.
    """
    if set(config.lock) == {"image", "text"}:
        raise ConfigError("model.lock names both towers, which leaves nothing to train; name one")
    locked = {}
    if "text" in config.lock:
        locked["text"] = LockedTower(_text_tower(config, clip), nn.Identity())
    if "image" in config.lock:
        locked["image"] = _image_tower(config, clip.visual)
    for tower in locked.values():
        tower.body.requires_grad_(False).eval()
    return locked


def _image_tower(config: ModelConfig, visual: Any) -> LockedTower:
    if config.start:
        return LockedTower(visual, nn.Identity())
    if not config.image_weights:
        raise _random_weights("image", "model.start or model.image_weights")
    if visual.trunk.num_classes:  # its last layer stands for the projection
        raise ConfigError(
            "model.lock cannot part this image tower from its projection; set vision.timm_proj to "
            '"linear" or "mlp"'
        )
    return LockedTower(visual.trunk, visual.head)


def _text_tower(config: ModelConfig, clip: Any) -> nn.Module:
    if not config.start:
        raise _random_weights("text", "model.start")
    if hasattr(clip, "text"):
        return clip.text  # type: ignore[no-any-return]
    # open_clip's CLIP holds the parts of its text tower itself.
    tower = nn.Module()
    for name in ("token_embedding", "positional_embedding", "transformer", "ln_final"):
        setattr(tower, name, getattr(clip, name))
    tower.text_projection = clip.text_projection
    return tower


def _random_weights(tower: str, fields: str) -> ConfigError:
    return ConfigError(
        f'model.lock names "{tower}", whose weights would stay random; set {fields}, or leave it '
        "out"
    )
