"""Which parameters share a learning rate and a weight decay.

The optimiser, by name, and the schedule of its learning rate.
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
from torch import nn

from clipkit.config import OptimConfig
from clipkit.errors import ConfigError

TABLES = ("token_embedding.weight", "positional_embedding", "pos_embed", "cls_token")
"""Ends of the names of parameters that are added or looked up, though they look like matrices."""

# In timm's terms: one group a layer, numbered from the bottom; 99999 joins the group before.
_LAYERS_OF_TRANSFORMER = {
    "stem": r"^(?:conv1|ln_pre|class_embedding|token_embedding|positional_embedding|cls_emb)",
    "blocks": [(r"^transformer\.resblocks\.(\d+)", None), (r"^ln_(?:post|final)", (99999,))],
}
_LAYERS_OF_RESNET = {"stem": r"^(?:conv|bn)\d", "blocks": r"^layer(\d+)\.(\d+)"}
_TOP = "what no pattern matches"


def param_groups(clip: Any, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Group the parameters that want gradients, in the order in which they stand in the network.

    Matrices and kernels are decayed; gains, biases and the temperature never. The rate falls by
    ``layer_decay`` from layer to layer down each tower (Clark et al. 2020, "ELECTRA", appendix A;
    Bao et al. 2021, "BEiT", appendix): full at the projection, ``layer_decay`` at the last block
    and its norm, ``layer_decay ** (blocks + 1)`` at the embeddings.

    Args:
        clip: an open_clip model.
        weight_decay: of matrices and kernels.
        layer_decay: in (0, 1].

    Returns:
        groups as torch's optimisers take them, with ``scale``, the factor on the learning rate, and
        ``use_fallback``, true for tables, which timm's Muon leaves to AdamW.
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
    """Names of the towers' parameters, and how many layers they lie below the top."""
    for prefix, tower in _towers(clip):
        names = [name for name, _ in tower.named_parameters() if _is_of(tower, name)]
        # A name that matches nothing stands at the top, even of a tower without a projection.
        pairs = [(name, name) for name in (*names, _TOP)]
        named: Any = SimpleNamespace(named_parameters=lambda pairs=pairs: pairs)
        layers = group_parameters(named, _matcher(tower), reverse=True)
        for name in names:
            yield prefix + name, layers[_TOP] - layers[name]


def _towers(clip: Any) -> Iterator[tuple[str, nn.Module]]:
    """The image tower and the text tower, which may be ``clip`` itself, with their names."""
    visual = clip.visual
    yield ("visual.trunk.", visual.trunk) if isinstance(visual, TimmModel) else ("visual.", visual)
    yield ("text.", clip.text) if hasattr(clip, "text") else ("", clip)


def _is_of(tower: nn.Module, name: str) -> bool:
    return not (hasattr(tower, "visual") and name.startswith("visual."))


def _matcher(tower: Any) -> Any:
    if isinstance(tower, ModifiedResNet):
        return _LAYERS_OF_RESNET
    return tower.group_matcher() if hasattr(tower, "group_matcher") else _LAYERS_OF_TRANSFORMER


MAX_LOGIT_SCALE = math.log(100)
"""Clamp of the learned log scale (Radford et al. 2021, section 2.5)."""

_OF_CLIP = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
"""AdamW's settings for vision transformers (Radford et al. 2021, table 18)."""
_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""Optimisers whose fused form runs on CPUs and GPUs alike."""
# Parts of other packages; one that needs second derivatives; one that cannot be resumed.
_LEFT_OUT = ["bnb*", "fused*", "adahessian", "kron*"]
_TIMM: Any = timm.optim  # it has types, but no names for a type checker


def optimizer_names() -> list[str]:
    """Names of the optimisers that ``optim.name`` may be."""
    names: list[str] = _TIMM.list_optimizers(exclude_filters=_LEFT_OUT)
    return names


def build_optimizer(clip: Any, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimiser over the parameters that want gradients.

    Each of its groups has a ``scale``, by which the learning rate is to be multiplied there.

    Args:
        clip: an open_clip model.
        config: which optimiser, and its settings.

    Raises:
        ConfigError: there is no such optimiser, it has no use for a field that is set, or a value
            is impossible.
    """
    names = optimizer_names()
    if config.name not in names:
        close = difflib.get_close_matches(config.name, names, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"known are: {', '.join(names)}"
        raise ConfigError(f"optim.name {config.name!r} is no optimiser; {hint}")
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
    """What the optimiser takes beside rate and decay; ConfigError for a field it does not take."""
    kind = _TIMM.get_optimizer_class(config.name, bind_defaults=False)
    taken = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    given = {
        name: value
        for name in ("momentum", "beta1", "beta2", "eps")
        if (value := getattr(config, name)) != "auto"
    }
    if config.name == "adamw":
        given = _OF_CLIP | given
    betas = taken.pop("betas", None) or ()
    taken |= dict(zip(("beta1", "beta2"), betas, strict=False))
    for name in given:
        if name not in taken:
            raise ConfigError(f"optim.{name} is set, but {config.name} has none; leave it out")
    settings = {name: value for name, value in given.items() if name in ("momentum", "eps")}
    if given.keys() & {"beta1", "beta2"}:
        first, second = (given.get(name, taken[name]) for name in ("beta1", "beta2"))
        settings["betas"] = (first, second, *betas[2:])
    if issubclass(kind, _FUSED):
        settings["fused"] = True
    if "max_grad_norm" in taken:
        settings["max_grad_norm"] = None  # optim.clip_norm is the one place for that
    return settings


def learning_rate(progress: float, config: OptimConfig) -> float:
    """The learning rate at a fraction ``progress`` in [0, 1] of the run.

    Linear warm-up from zero over ``warmup``; cosine decay to ``min_lr_ratio``, or constant; linear
    decay to zero over ``cooldown`` (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations", section 3).
    """
    progress, end = min(progress, 1.0), 1 - config.cooldown
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    between = min((progress - config.warmup) / max(end - config.warmup, 1e-12), 1.0)
    level = 1.0
    if config.schedule == "cosine":
        level = (
            config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * between)) / 2
        )
    if progress > end:
        level *= (1 - progress) / config.cooldown
    return config.lr * level
