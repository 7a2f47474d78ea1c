"""The optimizer of a training run, its parameter groups and its learning-rate schedule.

Optimizers come from timm and are selected by name. Each parameter group has its own weight decay
and a factor on the learning rate, which implements layer-wise learning-rate decay.
"""

import difflib
import inspect
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import timm.optim
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.models import group_parameters

from clipkit.config import OptimConfig
from clipkit.errors import ConfigError

MAX_LOGIT_SCALE = math.log(100)
"""Clamp of the learned log scale (Radford et al. 2021, section 2.5)."""

_CLIP_DEFAULTS = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
"""AdamW settings for vision transformers (Radford et al. 2021, table 18)."""
_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""Optimizers with a fused implementation for both CPUs and GPUs."""
# bnb and fused need other packages, adahessian second derivatives; kron cannot be resumed.
_EXCLUDED = ["bnb*", "fused*", "adahessian", "kron*"]
_TIMM: Any = timm.optim  # typed, but it does not export its names explicitly


def optimizer_names() -> list[str]:
    """Valid values of ``optim.name``."""
    names: list[str] = _TIMM.list_optimizers(exclude_filters=_EXCLUDED)
    return names


def build_optimizer(clip: Any, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the parameters that require gradients.

    Each parameter group has a ``scale``: its learning rate is the run's, times ``scale``.

    Args:
        clip: an open_clip model.
        config: name and settings of the optimizer.

    Raises:
        ConfigError: an unknown optimizer, a field that it does not have, or an invalid value.
    """
    names = optimizer_names()
    if config.name not in names:
        close = difflib.get_close_matches(config.name, names, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"known names: {', '.join(names)}"
        raise ConfigError(f"optim.name {config.name!r} is not an optimizer; {hint}")
    settings = _settings(config)
    groups = param_groups(clip, config.weight_decay, config.layer_decay)
    try:
        optimizer: torch.optim.Optimizer = _TIMM.create_optimizer_v2(
            groups, config.name, lr=config.lr, **settings
        )
    except ValueError as error:
        raise ConfigError(f"[optim] {config.name} cannot be built: {error}") from None
    return optimizer


def _settings(config: OptimConfig) -> dict[str, Any]:
    """Arguments of the optimizer other than learning rate and weight decay.

    Raises:
        ConfigError: a field is set that the optimizer does not have.
    """
    kind = _TIMM.get_optimizer_class(config.name, bind_defaults=False)
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    given = {
        name: value
        for name in ("momentum", "beta1", "beta2", "eps")
        if (value := getattr(config, name)) != "auto"
    }
    if config.name == "adamw":
        given = _CLIP_DEFAULTS | given
    betas = defaults.pop("betas", None) or ()
    defaults |= dict(zip(("beta1", "beta2"), betas, strict=False))
    for name in given:
        if name not in defaults:
            raise ConfigError(f"optim.{name} is set, but {config.name} has none; remove it")
    settings = {name: value for name, value in given.items() if name in ("momentum", "eps")}
    if given.keys() & {"beta1", "beta2"}:
        first, second = (given.get(name, defaults[name]) for name in ("beta1", "beta2"))
        settings["betas"] = (first, second, *betas[2:])
    if issubclass(kind, _FUSED):
        settings["fused"] = True
    if "max_grad_norm" in defaults:
        settings["max_grad_norm"] = None  # gradients are clipped by optim.clip_norm
    return settings


TABLES = ("token_embedding.weight", "positional_embedding", "pos_embed", "cls_token")
"""Suffixes of the names of embedding tables, which are 2-D but not matrices."""

# timm group matchers: one group per layer, from the bottom; 99999 joins the previous group.
_TRANSFORMER_LAYERS = {
    "stem": r"^(?:conv1|ln_pre|class_embedding|token_embedding|positional_embedding|cls_emb)",
    "blocks": [(r"^transformer\.resblocks\.(\d+)", None), (r"^ln_(?:post|final)", (99999,))],
}
_RESNET_LAYERS = {"stem": r"^(?:conv|bn)\d", "blocks": r"^layer(\d+)\.(\d+)"}
_TOP = "a name that no pattern matches"


def param_groups(clip: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group the parameters that require gradients, in the order of the network.

    Weight decay applies to matrices and convolution kernels, not to gains, biases and the
    temperature. The learning rate decreases by ``layer_decay`` per layer from the top of each tower
    to the bottom (Clark et al. 2020, "ELECTRA", appendix A; Bao et al. 2021, "BEiT", appendix): its
    factor is 1 for the projection, ``layer_decay`` for the last block and the norm after it, and
    ``layer_decay ** (blocks + 1)`` for the embeddings.

    Args:
        clip: an open_clip model.
        weight_decay: of matrices and convolution kernels.
        layer_decay: factor per layer, in (0, 1].

    Returns:
        parameter groups for a torch optimizer, with ``scale``, the factor on the learning rate, and
        ``use_fallback``, true for embedding tables, for which timm's Muon falls back to AdamW.
    """
    depths = {} if layer_decay == 1 else dict(_depths(clip))
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in clip.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim >= 2
        scale = layer_decay ** depths.get(name, 0)
        table = name.endswith(TABLES)
        group = groups.setdefault(
            (decayed, scale, table),
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "scale": scale,
                "use_fallback": table,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _depths(clip: Any) -> Iterator[tuple[str, int]]:
    """Name of each tower parameter, and the number of layers between it and the top."""
    timm_trunk = isinstance(clip.visual, TimmModel)
    image = ("visual.trunk.", clip.visual.trunk) if timm_trunk else ("visual.", clip.visual)
    text = ("text.", clip.text) if hasattr(clip, "text") else ("", clip)
    for prefix, tower in (image, text):
        names = [name for name, _ in tower.named_parameters()]
        if tower is clip:  # its text tower has no module of its own
            names = [name for name in names if not name.startswith("visual.")]
        # Unmatched names are at the top. _TOP marks it for towers without a projection.
        pairs = [(name, name) for name in (*names, _TOP)]
        named: Any = SimpleNamespace(named_parameters=lambda pairs=pairs: pairs)
        layers = group_parameters(named, _layer_patterns(tower), reverse=True)
        for name in names:
            yield prefix + name, layers[_TOP] - layers[name]


def _layer_patterns(tower: Any) -> Any:
    """timm's ``group_matcher`` of a tower."""
    if isinstance(tower, ModifiedResNet):
        return _RESNET_LAYERS
    return tower.group_matcher() if hasattr(tower, "group_matcher") else _TRANSFORMER_LAYERS


def learning_rate(progress: float, config: OptimConfig) -> float:
    """The learning rate after a fraction ``progress`` in [0, 1] of the run.

    Linear warm-up from zero over ``warmup``, then cosine decay to ``min_lr_ratio`` or a constant
    rate, then linear decay to zero over ``cooldown`` (Hägele et al. 2024, "Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations", section 3).
    """
    progress, end = min(progress, 1.0), 1 - config.cooldown
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    between = min((progress - config.warmup) / max(end - config.warmup, 1e-12), 1.0)
    factor = 1.0
    if config.schedule == "cosine":
        low = config.min_lr_ratio
        factor = low + (1 - low) * (1 + math.cos(math.pi * between)) / 2
    if progress > end:
        factor *= (1 - progress) / config.cooldown
    return config.lr * factor
