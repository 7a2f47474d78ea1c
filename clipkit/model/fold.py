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


@torch.no_grad()
def fold_batch_norms(visual: Any) -> None:
    """Fold what follows a convolution into it, in place, and leave out a pass over the pixels.

    Which norm follows which convolution is seen by running a probe of noise, and so is that the
    tower still makes the same vector of it; if not, it is left as it was.

    Args:
        visual: open_clip's image tower in evaluation mode.
    """
    probe = noise(visual)
    wanted: Tensor = visual(probe)
    pairs: list[tuple[nn.Conv2d, Any]] = followed(visual, probe, (nn.BatchNorm2d, BatchNormAct2d))
    names = {module: name for name, module in visual.named_modules()}
    before = [(conv.weight, conv.bias) for conv, _ in pairs]
    for conv, norm in pairs:
        conv.weight, conv.bias = _folded(conv, norm)
        activation = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        replace(visual, names[norm], activation)
    if not same(visual(probe), wanted):
        for (conv, norm), (weight, bias) in zip(pairs, before, strict=True):
            conv.weight, conv.bias = weight, bias
            replace(visual, names[norm], norm)


def noise(visual: Any) -> Tensor:
    """One picture of a tower's size, float32 [1, 3, height, width], beside its weights."""
    size = visual.image_size  # of a ResNet a single number
    height, width = (size, size) if isinstance(size, int) else size
    probe = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return probe.to(next(visual.parameters()).device)


def same(vector: Tensor, wanted: Tensor) -> bool:
    """Whether a probe's vector differs by rounding alone."""
    return bool((vector - wanted).norm() <= TOLERANCE * wanted.norm())


def followed(
    visual: nn.Module, probe: Tensor, kinds: tuple[type[nn.Module], ...]
) -> list[tuple[nn.Conv2d, nn.Module]]:
    """The convolutions whose output goes into one of some modules as it is, and that module.

    Args:
        visual: an image tower.
        probe: an image for it.
        kinds: of the modules; each that is found is used once, as its convolution is.
    """
    # Outputs are kept, so that no id comes twice; their versions show what is added in place.
    made: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}
    found: list[tuple[nn.Conv2d, nn.Module]] = []
    uses: Counter[nn.Module] = Counter()

    def note_output(module: nn.Module, _: Any, output: Tensor) -> None:
        uses[module] += 1
        made[id(output)] = module, output, output._version  # type: ignore[assignment]

    def note_input(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        uses[module] += 1
        conv, _, version = made.get(id(given[0]), (None, None, 0))
        if conv is not None and version == given[0]._version:
            found.append((conv, module))

    handles = []
    for module in visual.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(note_output))
        elif type(module) in kinds:
            handles.append(module.register_forward_pre_hook(note_input))
    visual(probe)
    for handle in handles:
        handle.remove()
    readers = Counter(conv for conv, _ in found)
    return [pair for pair in found if uses[pair[0]] == uses[pair[1]] == readers[pair[0]] == 1]


def replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )
