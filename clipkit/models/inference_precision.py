"""Towers made ready to encode: matrices rounded once, convolutions with all that follows them."""

import time
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from torch import nn

from clipkit.models.cpu_kernels import (
    FusedConvolution,
    fold_batch_norms,
    fuse_activations,
    round_tower,
)
from clipkit.models.dual_encoder import DualEncoder, is_convolutional

Precision = Literal["auto", "fp32", "bf16"]
DEFAULT_PRECISION: Precision = "auto"
"""The precision of the matrix products where none is named."""

FASTER = 1.5
"""How many times as fast a product in bf16 must be: 3 to 5 with instructions of its own, else 1."""
NARROWEST = 256
"""Width of the narrowest tower that is worth rounding: on an EPYC such a one is encoded 1.7 times
as fast, one of 512 twice, one of 64 1.2 times, and reading the pictures takes longer than that."""
ROUNDS = 5
"""Products of each kind that are timed, of which the fastest counts."""


def prepare(clip: Any, setting: Precision, device: torch.device) -> DualEncoder:
    """Towers that encode, made of an open_clip model in place: it cannot be trained any more.

    Args:
        clip: open_clip's model.
        setting: "auto" takes bf16 for a tower where the machine gains by it and the vectors stay
            what they are, else fp32. It goes by machine and tower alone, so that vectors are the
            same from one run to the next.
        device: where.
    """
    network = DualEncoder(clip).to(device).eval()
    if is_convolutional(clip):
        network.to(memory_format=torch.channels_last)
        fold_batch_norms(clip.visual)
        if device.type == "cpu":
            fuse_activations(clip.visual)
    for tower in network.precisions:
        if setting == "bf16" or (setting == "auto" and _gains(network, tower, device)):
            if tower == "image" and _is_fused(clip.visual):
                round_tower(network, only_if_close=setting == "auto")
            else:
                network.precisions[tower] = "bf16"
                _round(network, tower)
    return network


def _is_fused(visual: nn.Module) -> bool:
    return any(isinstance(module, FusedConvolution) for module in visual.modules())


def _gains(network: DualEncoder, tower: str, device: torch.device) -> bool:
    """Whether a tower is encoded faster in bf16, and its vectors can stay what they are.

    They do where the sums between layers stay in float32; with fused convolutions rounding them
    tells. Where a convolutional network is rounded throughout, they do not: vectors of an
    EfficientNet-Lite2 with ImageNet's weights came to a cosine of 0.991 with those of fp32.
    """
    if tower == "text":
        kept, module = network.runs_texts, getattr(network.clip, "text", network.clip)
        width = module.positional_embedding.shape[-1] if kept else 0
    else:
        visual = network.clip.visual
        kept = network.runs_images or type(visual) is TimmModel
        kept = _is_fused(visual) or (kept and not is_convolutional(network.clip))
        width = max((_inputs(module) for module in visual.modules()), default=0)
    return kept and width >= NARROWEST and _computes_bf16(device.type)


def _inputs(layer: nn.Module) -> int:
    """Channels that a layer's products read, 0 if it has none."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.in_channels if isinstance(layer, nn.Conv2d) else 0


def _round(network: DualEncoder, tower: str) -> None:
    """Round what a tower's products read, in place: no second copy of the weights is held."""
    visual, text = network.clip.visual, getattr(network.clip, "text", network.clip)
    own = network.runs_images if tower == "image" else network.runs_texts
    if own:
        for block in (visual if tower == "image" else text).transformer.resblocks:
            block.attn.to(torch.bfloat16)
            block.mlp.to(torch.bfloat16)
        if tower == "image":
            visual.conv1.to(torch.bfloat16)
        return
    # What else there is runs under autocast, which rounds what these read beside their weights.
    for module in (visual if tower == "image" else text.transformer).modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            module.to(torch.bfloat16)


@cache
def _computes_bf16(kind: str) -> bool:
    """Whether devices of a kind have instructions for products of bf16, by timing one on a CPU."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    least = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    pairs = {dtype: torch.ones(256, 768, dtype=dtype) for dtype in least}
    for _ in range(ROUNDS):
        for dtype, x in pairs.items():
            start = time.perf_counter()
            F.linear(x, x)
            least[dtype] = min(least[dtype], time.perf_counter() - start)
    return least[torch.float32] > FASTER * least[torch.bfloat16]
