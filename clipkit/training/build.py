"""Build the towers of a training run from its configuration.

What training may do to towers that are built: drop patches, keep less, be compiled.
"""

import difflib
import math
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import timm
import timm.models
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import PatchDropout, VisionTransformer
from timm.layers.patch_dropout import PatchDropout as TimmPatchDropout
from torch import nn

from clipkit.config import ModelConfig, OptimConfig
from clipkit.errors import ConfigError, ModelError
from clipkit.models.checkpoint import Towers
from clipkit.models.dual_encoder import why_unsuitable
from clipkit.models.loading import load_clip, model_config, resolve
from clipkit.models.tokenizer import CONTEXT, VOCAB
from clipkit.training.frozen_towers import lock_towers
from clipkit.training.image_weights import PRETRAINED, load_image_weights, own_preprocessing


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
            "it out, and set train.micro_batch_size to fit large batches into memory"
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


def build_towers(config: ModelConfig, temperature: float, seed: int) -> Towers:
    """Build towers with random weights, or take over those of ``config.init_from``.

    Args:
        config: which towers.
        temperature: initial temperature of new towers.
        seed: of the random weights.

    Raises:
        ConfigError: neither or several of name, own towers and start; unknown tower settings; a
            tower to lock that has no weights to keep.
        ModelError: weights that cannot be reached or do not fit.
    """
    own = bool(config.vision or config.text or config.embed_dim)
    if (own, bool(config.name), bool(config.init_from)).count(True) != 1:
        raise ConfigError(
            "[model] needs exactly one of: name (an open_clip model name), start (a MODEL to go on "
            "from), or all of embed_dim, vision and text (own towers)"
        )
    if config.init_from and (config.mean or config.std):
        raise ConfigError(
            "model.init_from brings the mean and std it was trained with; leave model.mean and "
            "model.std empty"
        )
    if config.init_from and temperature != OptimConfig.temperature:
        raise ConfigError(
            f"model.init_from brings the temperature it was trained to, so that optim.temperature "
            f"({temperature:g}) does nothing; leave it out"
        )
    if config.init_from and config.image_weights:
        raise ConfigError(
            "model.init_from brings its own image tower; leave model.image_weights empty, or build "
            "new towers"
        )
    towers = _from_weights(config) if config.init_from else _new(config, own, temperature, seed)
    if config.patch_dropout:
        drop_patches(towers.clip, config.patch_dropout)
    return towers


def _new(config: ModelConfig, own: bool, temperature: float, seed: int) -> Towers:
    settings = _own(config) if own else model_config(_known(config.name))
    if config.image_weights and not settings["vision_cfg"].get("timm_model_name"):
        raise ConfigError(
            "model.image_weights is for image towers of timm, and this one is open_clip's own; set "
            "vision.timm_model_name, or take whole weights through model.init_from"
        )
    torch.manual_seed(seed)
    clip = _construct(settings, pretrained=config.image_weights == PRETRAINED)
    clip.logit_scale.data.fill_(math.log(1 / temperature))
    preprocess = _preprocessing(config, clip)
    if config.image_weights not in ("", PRETRAINED):
        load_image_weights(clip.visual.trunk, Path(config.image_weights))
    set_model_preprocess_cfg(clip, preprocess)
    return Towers(clip, settings, preprocess, lock_towers(config, clip))


def _known(name: str) -> str:
    if name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()"
        raise ConfigError(f"model.name {name!r} is no open_clip model; {hint}")
    return name


def _preprocessing(config: ModelConfig, clip: Any) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg``: as the weights were trained, but for what a person sets."""
    own = own_preprocessing(clip.visual.trunk) if config.image_weights == PRETRAINED else {}
    given = {"mean": config.mean, "std": config.std}
    overlay = own | {key: value for key, value in given.items() if value}
    overlay["size"] = clip.visual.image_size
    return dict(merge_preprocess_dict(PreprocessCfg(), overlay))


def _from_weights(config: ModelConfig) -> Towers:
    clip, _ = load_clip(config.init_from)
    name, _ = resolve(config.init_from)
    settings = model_config(name)
    # Tags trained with QuickGELU are loaded with it whatever the name's configuration says.
    settings["quick_gelu"] = any(type(m).__name__ == "QuickGELU" for m in clip.modules())
    return Towers(clip, settings, dict(clip.visual.preprocess_cfg), lock_towers(config, clip))


def _own(config: ModelConfig) -> dict[str, Any]:
    if not (config.vision and config.text and config.embed_dim):
        raise ConfigError("[model] own towers need all of embed_dim, vision and text")
    _check_keys("model.vision", config.vision, CLIPVisionCfg)
    _check_keys("model.text", config.text, CLIPTextCfg)
    _refuse_idle(config.vision)
    _require_patches(config.vision)
    _require_layers("model.vision", config.vision)
    _require_layers("model.text", config.text)
    text = {"context_length": CONTEXT, "vocab_size": VOCAB, **config.text}
    if reason := why_unsuitable(text):
        raise ConfigError(f"[model.text] cannot be used: {reason}")
    return {"embed_dim": config.embed_dim, "vision_cfg": dict(config.vision), "text_cfg": text}


def _refuse_idle(vision: dict[str, Any]) -> None:
    """Raise ConfigError for what open_clip would take without a word and not use."""
    if "patch_dropout" in vision:
        raise ConfigError(
            "model.vision.patch_dropout is set; write it as model.patch_dropout, which works for "
            "every vision transformer"
        )
    timm = "timm_model_name" in vision
    for key in vision:
        if key != "image_size" and key.startswith("timm_") != timm:
            towers = "a timm tower has its own" if timm else "only a timm tower has one"
            raise ConfigError(f"model.vision.{key} is set, but {towers}; leave it out")


def _require_patches(vision: dict[str, Any]) -> None:
    """Raise ConfigError for images of no size, and of none that a patch fits into."""
    sizes, patch = vision.get("image_size", 224), vision.get("patch_size", 1)
    for size in sizes if isinstance(sizes, list) else [sizes]:
        if not (isinstance(size, int) and isinstance(patch, int) and size >= max(patch, 1)):
            raise ConfigError(
                f"model.vision.image_size is {sizes} and patch_size {patch}, expected whole "
                "numbers of pixels and room for at least one patch; mend them"
            )


def _require_layers(section: str, given: dict[str, Any]) -> None:
    """Raise ConfigError for a tower of no layers, which open_clip would build without a word."""
    layers = given.get("layers", 1)
    for count in layers if isinstance(layers, list) else [layers]:
        if not (isinstance(count, int) and count > 0):
            raise ConfigError(
                f"{section}.layers is {layers}, expected a whole number of at least 1, or for a "
                "ResNet a list of four; mend it"
            )


def _check_keys(section: str, given: dict[str, Any], known_by: type) -> None:
    known = [f.name for f in fields(known_by)]
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}?" if close else f"known are: {', '.join(known)}"
            raise ConfigError(f"unknown key {section}.{key}; {hint}")


def _construct(settings: dict[str, Any], pretrained: bool) -> Any:
    arguments = {k: v for k, v in settings.items() if k != "custom_text"}
    arguments["vision_cfg"] = {**arguments["vision_cfg"], "timm_model_pretrained": pretrained}
    kind: type[nn.Module] = CustomTextCLIP if settings.get("custom_text") else open_clip.CLIP
    try:
        return kind(**arguments)
    # A width of 0, three layers of a ResNet, a text for a number: it fails in any way.
    except Exception as error:
        name = settings["vision_cfg"].get("timm_model_name")
        if pretrained and timm.is_model(name):
            raise ModelError(
                f"timm's weights of {name} cannot be had ({' '.join(str(error).split())[:200]}); "
                "connect to the network once, or name a file in model.image_weights"
            ) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"[model] open_clip cannot build these towers ({reason}); mend model.vision and "
            "model.text"
        ) from None
