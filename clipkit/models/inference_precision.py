"""Choose the precision of an encoder's matrix products, and prepare its towers for it.

``"auto"`` follows a table of hardware and tower, so that a model gives the same vectors on every
run on one machine:

==========================================  ==============================  =========
hardware                                    tower                           precision
==========================================  ==============================  =========
CPU with AVX-512-BF16 or AMX-BF16           width >= 256, float32 sums      bf16
CUDA device, compute capability >= 8.0      width >= 256, float32 sums      bf16
any other                                   any                             fp32
==========================================  ==============================  =========

"Float32 sums" are towers whose sums between layers stay in float32: transformers of open_clip and
timm, and convolutional towers with fused convolutions.

Measured on two cores of an EPYC with AVX-512-BF16 against open_clip in fp32: photos through
ViT-B-32 (width 768) 3.1 times as fast with a worst cosine of 0.99999, captions 17.5 times as fast
(7.9 times in fp32), EfficientNet-Lite2 2.7 times as fast (1.9 times in fp32). Against our own fp32,
a tower of width 512 is twice as fast, of width 256 1.7 times and of width 64 1.2 times, which
decoding the images hides. Without these instructions bf16 products are no faster than float32.
The GPU row follows from the data sheets: an A100 multiplies at 312 TFLOP/s in bf16, 156 in TF32 and
19.5 in float32.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
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
"""The default precision of the matrix products."""

MIN_WIDTH = 256
"""Width of the narrowest tower that "auto" rounds."""
_CPU_FLAGS = ("avx512_bf16", "amx_bf16")


def prepare(clip: Any, setting: Precision, device: torch.device) -> DualEncoder:
    """Prepare an open_clip model for encoding, in place; it cannot be trained any more.

    Args:
        clip: the open_clip model.
        setting: the precision; "auto" follows the table of this module, tower by tower.
        device: where to put it.
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


@cache
def has_bf16(device_type: str) -> bool:
    """Whether devices of a type have instructions for bf16 products."""
    if device_type == "cuda":  # compute capability 8.0 and above
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return device_type == "cpu" and any(flag in flags for flag in _CPU_FLAGS)


def tower_width(network: DualEncoder, tower: str) -> int:
    """Width of a tower, "image" or "text".

    That is the embedding width of a transformer, else the largest number of input channels of a
    convolution or linear layer; 0 for a text tower other than CLIP's.
    """
    if tower == "text":
        text = getattr(network.clip, "text", network.clip)
        return int(text.positional_embedding.shape[-1]) if network.runs_texts else 0
    visual = network.clip.visual
    if isinstance(visual, VisionTransformer):
        return int(visual.positional_embedding.shape[-1])
    if isinstance(visual, TimmModel) and not is_convolutional(network.clip):
        return int(visual.trunk.num_features)
    inputs = [m.in_features for m in visual.modules() if isinstance(m, nn.Linear)]
    inputs += [m.in_channels for m in visual.modules() if isinstance(m, nn.Conv2d)]
    return max(inputs, default=0)


def _gains(network: DualEncoder, tower: str, device: torch.device) -> bool:
    """Whether a tower is faster in bf16 and its vectors stay close to those in fp32.

    Vectors stay close where sums between layers are float32; ``round_tower`` checks towers with
    fused convolutions itself. A convolutional tower that is rounded throughout does not qualify:
    EfficientNet-Lite2 with ImageNet weights then falls to a cosine of 0.991.
    """
    if tower == "text":
        exact_sums = network.runs_texts
    else:
        visual = network.clip.visual
        transformer = network.runs_images or type(visual) is TimmModel
        exact_sums = _is_fused(visual) or (transformer and not is_convolutional(network.clip))
    return exact_sums and tower_width(network, tower) >= MIN_WIDTH and has_bf16(device.type)


def _is_fused(visual: nn.Module) -> bool:
    return any(isinstance(module, FusedConvolution) for module in visual.modules())


def _round(network: DualEncoder, tower: str) -> None:
    """Round the weights that a tower's products read, in place, so that they are stored once."""
    visual, text = network.clip.visual, getattr(network.clip, "text", network.clip)
    own = network.runs_images if tower == "image" else network.runs_texts
    if own:
        for block in (visual if tower == "image" else text).transformer.resblocks:
            block.attn.to(torch.bfloat16)
            block.mlp.to(torch.bfloat16)
        if tower == "image":
            visual.conv1.to(torch.bfloat16)
        return
    # Other towers run under autocast, which rounds the inputs of these modules too.
    for module in (visual if tower == "image" else text.transformer).modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            module.to(torch.bfloat16)
