"""Build the towers of a training run from its ``[model]`` configuration.

New towers are an open_clip model or custom towers with random weights, optionally with pretrained
weights in a timm image tower. Existing towers are loaded with ``model.init_from``. Training options
of the towers are set here too: patch dropout and gradient checkpointing.
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
from clipkit.models.dual_encoder import why_no_vectors, why_unsuitable
from clipkit.models.loading import load_clip, model_config, resolve
from clipkit.models.tokenizer import CONTEXT, VOCAB
from clipkit.training.frozen_towers import lock_towers
from clipkit.training.image_weights import PRETRAINED, load_image_weights, own_preprocessing


def build_towers(config: ModelConfig, temperature: float, seed: int) -> Towers:
    """Build towers with random weights, or load those of ``config.init_from``.

    Args:
        config: the towers.
        temperature: initial temperature of new towers.
        seed: of the random weights.

    Raises:
        ConfigError: none or several of name, custom towers and init_from; unknown or contradictory
            settings; a locked tower without pretrained weights.
        ModelError: the weights cannot be loaded or do not fit.
    """
    custom = bool(config.vision or config.text or config.embed_dim)
    if (custom, bool(config.name), bool(config.init_from)).count(True) != 1:
        raise ConfigError(
            "[model] needs exactly one of: name (an open_clip model name), init_from (a MODEL to "
            "start from), or all of embed_dim, vision and text (custom towers)"
        )
    if config.init_from and (config.mean or config.std):
        raise ConfigError(
            "model.init_from uses the mean and std it was trained with; leave model.mean and "
            "model.std empty"
        )
    if config.init_from and temperature != OptimConfig.temperature:
        raise ConfigError(
            f"optim.temperature is {temperature:g}, but model.init_from starts from its learned "
            "temperature; remove optim.temperature"
        )
    if config.init_from and config.image_weights:
        raise ConfigError(
            "model.init_from has its own image tower; leave model.image_weights empty, or remove "
            "model.init_from"
        )
    if config.init_from:
        towers = _load_towers(config)
    else:
        towers = _new_towers(config, custom, temperature, seed)
    if config.patch_dropout:
        _drop_patches(towers.clip, config.patch_dropout)
    return towers


def checkpoint_gradients(clip: Any) -> None:
    """Store only the input of each block for the backward pass, which recomputes the rest.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".

    Args:
        clip: an open_clip model, changed in place.

    Raises:
        ConfigError: the image tower does not support it, or has batch normalisation, whose running
            statistics would count every batch twice.
    """
    visual = clip.visual
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in visual.modules())
    if normed or not _supports_checkpointing(visual):
        why = "has batch normalisation" if normed else "does not support it"
        raise ConfigError(
            f"train.grad_checkpointing is set, but the image tower ({_class_name(visual)}) {why}; "
            "remove it, and set train.micro_batch_size to fit large batches into memory"
        )
    clip.set_grad_checkpointing(True)


def _supports_checkpointing(visual: Any) -> bool:
    """Whether an image tower can checkpoint. open_clip only logs that a timm tower cannot."""
    if not isinstance(visual, TimmModel):
        return isinstance(visual, VisionTransformer)
    try:
        visual.trunk.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        return False
    return True


def require_compiler(device: torch.device) -> None:
    """Raise ConfigError if ``torch.compile`` needs a C++ compiler and there is none."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise ConfigError(
            "train.compile is set, but no C++ compiler was found (g++, clang++ or the one that the "
            "environment variable CXX names); install one, or remove train.compile"
        )


def _load_towers(config: ModelConfig) -> Towers:
    clip, _ = load_clip(config.init_from)
    name, _ = resolve(config.init_from)
    settings = model_config(name)
    # open_clip loads weights that were trained with QuickGELU with it, whatever the configuration.
    settings["quick_gelu"] = any(type(m).__name__ == "QuickGELU" for m in clip.modules())
    return Towers(clip, settings, dict(clip.visual.preprocess_cfg), lock_towers(config, clip))


def _new_towers(config: ModelConfig, custom: bool, temperature: float, seed: int) -> Towers:
    if custom:
        settings = _custom_settings(config)
    else:
        _require_open_clip_name(config.name)
        settings = model_config(config.name)
    if config.image_weights and not settings["vision_cfg"].get("timm_model_name"):
        raise ConfigError(
            "model.image_weights needs a timm image tower, but this one is open_clip's own; set "
            "vision.timm_model_name, or load a whole model with model.init_from"
        )
    torch.manual_seed(seed)
    clip = _construct(settings, pretrained=config.image_weights == PRETRAINED)
    if reason := why_no_vectors(clip):
        raise ConfigError(f"[model] cannot be used: {reason}")
    clip.logit_scale.data.fill_(math.log(1 / temperature))
    preprocess = _preprocessing(config, clip)
    if config.image_weights not in ("", PRETRAINED):
        load_image_weights(clip.visual.trunk, Path(config.image_weights))
    set_model_preprocess_cfg(clip, preprocess)
    return Towers(clip, settings, preprocess, lock_towers(config, clip))


def _require_open_clip_name(name: str) -> None:
    names = open_clip.list_models()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()"
        raise ConfigError(f"model.name {name!r} is not an open_clip model; {hint}")


def _custom_settings(config: ModelConfig) -> dict[str, Any]:
    """open_clip's model configuration of custom towers, checked."""
    if not (config.vision and config.text and config.embed_dim):
        raise ConfigError("[model] custom towers need all of embed_dim, vision and text")
    _require_known_keys("model.vision", config.vision, CLIPVisionCfg)
    _require_known_keys("model.text", config.text, CLIPTextCfg)
    _refuse_unused(config.vision)
    _require_patches(config.vision)
    _require_layers("model.vision", config.vision)
    _require_layers("model.text", config.text)
    text = {"context_length": CONTEXT, "vocab_size": VOCAB, **config.text}
    if reason := why_unsuitable(text):
        raise ConfigError(f"[model.text] cannot be used: {reason}")
    return {"embed_dim": config.embed_dim, "vision_cfg": dict(config.vision), "text_cfg": text}


def _require_known_keys(section: str, settings: dict[str, Any], schema: type) -> None:
    known = [f.name for f in fields(schema)]
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key {section}.{key}; {hint}")


def _refuse_unused(vision: dict[str, Any]) -> None:
    """Raise ConfigError for settings that open_clip accepts silently and does not use."""
    if "patch_dropout" in vision:
        raise ConfigError(
            "model.vision.patch_dropout is set; write it as model.patch_dropout, which works for "
            "every vision transformer"
        )
    is_timm = "timm_model_name" in vision
    for key in vision:
        if key != "image_size" and key.startswith("timm_") != is_timm:
            towers = "a timm tower has its own" if is_timm else "only a timm tower has one"
            raise ConfigError(f"model.vision.{key} is set, but {towers}; remove it")


def _require_patches(vision: dict[str, Any]) -> None:
    """Raise ConfigError if an image does not hold a single patch."""
    sizes, patch = vision.get("image_size", 224), vision.get("patch_size", 1)
    for size in sizes if isinstance(sizes, list) else [sizes]:
        if not (isinstance(size, int) and isinstance(patch, int) and size >= max(patch, 1)):
            raise ConfigError(
                f"model.vision.image_size is {sizes} and patch_size {patch}, expected whole "
                "numbers of pixels, with patch_size at most image_size"
            )


def _require_layers(section: str, settings: dict[str, Any]) -> None:
    """Raise ConfigError for a tower without layers, which open_clip would build silently."""
    layers = settings.get("layers", 1)
    for count in layers if isinstance(layers, list) else [layers]:
        if not (isinstance(count, int) and count > 0):
            raise ConfigError(
                f"{section}.layers is {layers}, expected a whole number of at least 1, or a list "
                "of four for a ResNet"
            )


def _construct(settings: dict[str, Any], pretrained: bool) -> Any:
    """The open_clip model of a configuration, with timm's weights if ``pretrained``."""
    arguments = {k: v for k, v in settings.items() if k != "custom_text"}
    arguments["vision_cfg"] = {**arguments["vision_cfg"], "timm_model_pretrained": pretrained}
    kind: type[nn.Module] = CustomTextCLIP if settings.get("custom_text") else open_clip.CLIP
    try:
        return kind(**arguments)
    # Impossible settings, such as a width of 0 or a string for a number, raise almost any type.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        name = settings["vision_cfg"].get("timm_model_name")
        if pretrained and timm.is_model(name):
            raise ModelError(
                f"cannot load timm's weights of {name} ({reason}); connect to the network "
                "once, or set model.image_weights to a file"
            ) from None
        raise ConfigError(
            f"[model] open_clip cannot build these towers ({reason}); fix model.vision and "
            "model.text"
        ) from None


def _preprocessing(config: ModelConfig, clip: Any) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg``: that of the weights, overridden by the configuration."""
    own = own_preprocessing(clip.visual.trunk) if config.image_weights == PRETRAINED else {}
    given = {"mean": config.mean, "std": config.std}
    overlay = own | {key: value for key, value in given.items() if value}
    overlay["size"] = clip.visual.image_size
    return dict(merge_preprocess_dict(PreprocessCfg(), overlay))


def _drop_patches(clip: Any, fraction: float) -> None:
    """Drop a random fraction of each image's patches in training, except the class token.

    Li et al. 2023, "Scaling Language-Image Pre-training via Masking" (FLIP), section 3. Evaluation
    uses all patches, and checkpoints do not store the setting.

    Raises:
        ConfigError: the image tower is not a vision transformer.
    """
    visual = clip.visual
    trunk = getattr(visual, "trunk", None)
    if isinstance(visual, VisionTransformer):
        visual.patch_dropout = PatchDropout(fraction)
    elif isinstance(trunk, timm.models.VisionTransformer):
        prefix = trunk.num_prefix_tokens
        trunk.patch_drop = TimmPatchDropout(fraction, num_prefix_tokens=prefix)
    else:
        raise ConfigError(
            f"model.patch_dropout is {fraction:g}, but the image tower ({_class_name(visual)}) has "
            "no patches to drop; remove it, or choose a vision transformer"
        )


def _class_name(visual: Any) -> str:
    return type(getattr(visual, "trunk", visual)).__name__
