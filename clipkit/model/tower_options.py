"""What training may do to towers that are built: drop patches, keep less, be compiled."""

import os
import shutil
from typing import Any

import timm.models
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import PatchDropout, VisionTransformer
from timm.layers.patch_dropout import PatchDropout as TimmPatchDropout
from torch import nn

from clipkit.errors import ConfigError


def drop_patches(clip: Any, share: float) -> None:
    """Let the image tower see a random part of each picture's patches while it trains.

    Li et al. 2023, "Scaling Language-Image Pre-training via Masking" (FLIP), section 3. Nothing is
    dropped in evaluation, and a checkpoint knows nothing of it.

    Args:
        clip: an open_clip model.
        share: of the patches that are dropped, in (0, 1); the class token stays.

    Raises:
        ConfigError: the image tower is not a vision transformer.
    """
    visual = clip.visual
    trunk = getattr(visual, "trunk", None)
    if isinstance(visual, VisionTransformer):
        visual.patch_dropout = PatchDropout(share)
    elif isinstance(trunk, timm.models.VisionTransformer):
        prefix = trunk.num_prefix_tokens
        trunk.patch_drop = TimmPatchDropout(share, num_prefix_tokens=prefix)
    else:
        raise ConfigError(
            f"model.patch_dropout is {share:g}, but the image tower ({_kind(visual)}) has no "
            "patches to drop; leave it out, or choose a vision transformer"
        )


def checkpoint_gradients(clip: Any) -> None:
    """Keep only each block's input for the backward pass, and compute the rest again there.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".

    Args:
        clip: an open_clip model.

    Raises:
        ConfigError: the image tower cannot do so, or has batch normalisation, whose running
            statistics would count every batch twice.
    """
    visual = clip.visual
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in visual.modules())
    if normed or not (_can_checkpoint(visual)):
        why = "has batch normalisation" if normed else "cannot compute its blocks again"
        raise ConfigError(
            f"train.grad_checkpointing is set, but the image tower ({_kind(visual)}) {why}; leave "
            "it out, and set train.chunk_size to fit large batches into memory"
        )
    clip.set_grad_checkpointing(True)


def _can_checkpoint(visual: Any) -> bool:
    """Whether it does as told: open_clip only logs where a timm tower does not."""
    if not isinstance(visual, TimmModel):
        return isinstance(visual, VisionTransformer)
    try:
        visual.trunk.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        return False
    return True


def _kind(visual: Any) -> str:
    return type(getattr(visual, "trunk", visual)).__name__


def require_compiler(device: torch.device) -> None:
    """Raise ConfigError where ``torch.compile`` finds no C++ compiler to hand its code to."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise ConfigError(
            "train.compile is set, but no C++ compiler is found (g++ or clang++, or another in "
            "CXX); install one, or leave train.compile out"
        )
