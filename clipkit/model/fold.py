"""Batch normalisation at rest, folded into the convolution before it.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2, equation 14.
"""

from collections import Counter
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-4
"""Largest change of a probe's vector, over its length; rounding alone comes to 1e-6."""

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


@torch.no_grad()
def fold_batch_norms(visual: Any) -> None:
    """Fold what follows a convolution into it, in place, and leave out a pass over the pixels.

    Which norm follows which convolution is seen by running a probe of noise, and so is that the
    tower still makes the same vector of it; if not, it is left as it was.

    Args:
        visual: open_clip's image tower in evaluation mode.
    """
    size = visual.image_size  # of a ResNet a single number
    height, width = (size, size) if isinstance(size, int) else size
    probe = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    probe = probe.to(next(visual.parameters()).device)
    wanted: Tensor = visual(probe)
    pairs = _pairs(visual, probe)
    names = {module: name for name, module in visual.named_modules()}
    before = [(conv.weight, conv.bias) for conv, _ in pairs]
    for conv, norm in pairs:
        conv.weight, conv.bias = _folded(conv, norm)
        activation = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        _replace(visual, names[norm], activation)
    if not (visual(probe) - wanted).norm() <= TOLERANCE * wanted.norm():
        for (conv, norm), (weight, bias) in zip(pairs, before, strict=True):
            conv.weight, conv.bias = weight, bias
            _replace(visual, names[norm], norm)


def _pairs(visual: nn.Module, probe: Tensor) -> list[Pair]:
    """The convolutions whose output goes into a norm as it is, and that norm, each used once."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # outputs are kept, so that no id comes twice
    found: list[Pair] = []

    def note_output(module: nn.Module, _: Any, output: Tensor) -> None:
        made[id(output)] = module, output  # type: ignore[assignment]

    def note_input(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if id(given[0]) in made:
            found.append((made[id(given[0])][0], module))  # type: ignore[arg-type]

    handles = []
    for module in visual.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(note_output))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d):
            handles.append(module.register_forward_pre_hook(note_input))
    visual(probe)
    for handle in handles:
        handle.remove()
    uses = Counter(module for pair in found for module in pair)
    return [pair for pair in found if uses[pair[0]] == uses[pair[1]] == 1]


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
