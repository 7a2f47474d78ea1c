"""Which parameters share a learning rate and a weight decay."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn

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
