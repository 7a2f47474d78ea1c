"""Faster convolutional image towers on a CPU: folded batch norms, fused activations, bf16.

Three steps, each checked on probe images:

1. fold each batch norm into the convolution before it (Jacob et al. 2018, "Quantization and
   Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 3.2,
   equation 14);
2. compute each convolution and its activation in one pass, by the oneDNN operators that
   torch.compile calls (they are private to torch; without them a tower keeps its own modules);
3. round to bf16 all but the first convolutions.

On two cores of an EPYC, photos through an EfficientNet-Lite2 take 1 / 1.9 of open_clip's time in
fp32 and 1 / 2.7 in bf16 (1 / 1.6 of its time in batches of 4), with a worst cosine of 0.9994 for
400 photos; `python -m scripts.benchmarks.encoding.encoder PAIRS.parquet --only images --weights
WEIGHTS`. Public paths are no substitute: on the same tower, folded and channels-last, the private
operators encode 1.9 images a second in fp32 and 1.7 in bf16, plain modules 1.1 and 1.0, a frozen
`torch.jit` trace optimised for inference 1.1 and 1.2 (best of 4, 2026-11-27, busy machine).
"""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from clipkit.models.dual_encoder import DualEncoder

TOLERANCE = 1e-4
"""Largest change of a probe's vector, relative to its length; rounding alone gives 1e-6."""
MIN_COSINE = 0.9995
"""Cosine that the vector of every probe image must keep in bf16. With ImageNet weights of
EfficientNet-Lite0, 1 and 2, the worst of 150 to 400 photos then keeps 0.9994. With all convolutions
rounded, the worst of 48 keeps only 0.996 to 0.988."""
EXACT_STEP = 3
"""Convolutions that are added to the exact ones at a time."""
MAX_EXACT_SHARE = 0.25
"""Largest share of a tower's convolutions that stay exact."""
DISCS = 40
"""Discs in a probe image."""

ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}
"""Activations that oneDNN fuses with a convolution: its name and arguments for each."""
OPERATORS = ("_convolution_pointwise", "_linear_pointwise")


@torch.no_grad()
def fold_batch_norms(visual: Any) -> None:
    """Fold each batch norm into the convolution before it, in place.

    A forward pass of a noise image shows which norm follows which convolution. If the vector of
    that image changes, the tower is left unchanged.

    Args:
        visual: open_clip's image tower in evaluation mode.
    """
    probe = noise_image(visual)
    wanted: Tensor = visual(probe)
    pairs: list[tuple[nn.Conv2d, Any]] = convolutions_before(
        visual, probe, (nn.BatchNorm2d, BatchNormAct2d)
    )
    names = {module: name for name, module in visual.named_modules()}
    before = [(conv.weight, conv.bias) for conv, _ in pairs]
    for conv, norm in pairs:
        conv.weight, conv.bias = _folded(conv, norm)
        activation = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()
        replace_module(visual, names[norm], activation)
    if not same_vector(visual(probe), wanted):
        for (conv, norm), (weight, bias) in zip(pairs, before, strict=True):
            conv.weight, conv.bias = weight, bias
            replace_module(visual, names[norm], norm)


def noise_image(visual: Any) -> Tensor:
    """A noise image of a tower's size on its device, float32 [1, 3, height, width]."""
    size = visual.image_size  # an int for ResNets
    height, width = (size, size) if isinstance(size, int) else size
    probe = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    return probe.to(next(visual.parameters()).device)


def same_vector(vector: Tensor, wanted: Tensor) -> bool:
    """Whether the vectors of a probe differ by rounding only."""
    return bool((vector - wanted).norm() <= TOLERANCE * wanted.norm())


def convolutions_before(
    visual: nn.Module, probe: Tensor, kinds: tuple[type[nn.Module], ...]
) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Pairs of a convolution and the one module that reads its unmodified output.

    Args:
        visual: an image tower.
        probe: an image for it.
        kinds: types of the reading modules.

    Returns:
        pairs in which both modules are used exactly once.
    """
    # Holding the outputs keeps their ids unique; their versions reveal changes in place.
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


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )


class FusedConvolution(nn.Conv2d):
    """A convolution and its activation in one pass, in the precision of its weights.

    Args:
        conv: the convolution, whose weights are shared.
        activation: the activation after it, or None.
    """

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None) -> None:
        of: Any = conv  # torch declares these sizes with types that do not match its constructor
        super().__init__(
            of.in_channels,
            of.out_channels,
            of.kernel_size,
            of.stride,
            of.padding,
            of.dilation,
            of.groups,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.same = isinstance(conv, Conv2dSame)
        self.fused = ("none", []) if activation is None else ACTIVATIONS[type(activation)]
        ones = (conv.kernel_size, conv.stride, conv.groups, conv.padding)
        self.pointwise = ones == ((1, 1), (1, 1), 1, (0, 0))

    def round(self) -> None:
        """Round the weights to bf16, and the bias only where oneDNN requires it."""
        self.weight.data = self.weight.data.bfloat16()
        if self.bias is not None and not self.pointwise:
            self.bias.data = self.bias.data.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, height, width], channels-last, to the same in the dtype of the weights."""
        x = x.to(self.weight.dtype)
        made: Tensor
        if self.pointwise:  # a matrix product, which accepts a float32 bias
            weight = self.weight.flatten(1)
            rows = x.permute(0, 2, 3, 1)
            made = torch.ops.mkldnn._linear_pointwise(rows, weight, self.bias, *self.fused, "")
            return made.permute(0, 3, 1, 2)
        if self.same:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        place = self.padding, self.stride, self.dilation, self.groups
        made = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *place, *self.fused, ""
        )
        return made


@torch.no_grad()
def fuse_activations(visual: nn.Module) -> bool:
    """Replace each convolution of a tower on a CPU by a ``FusedConvolution``, in place.

    Args:
        visual: open_clip's image tower in evaluation mode, with folded batch norms.

    Returns:
        whether it was done. The tower is left unchanged without oneDNN, with a subclass of
        ``Conv2d`` that is unknown here, or if the vector of a probe changes.
    """
    names = {module: name for name, module in visual.named_modules()}
    convs = [module for module in names if isinstance(module, nn.Conv2d)]
    if not has_onednn() or not all(map(_is_plain, convs)):
        return False
    probe = noise_image(visual)
    wanted: Tensor = visual(probe)
    after = dict(convolutions_before(visual, probe, tuple(ACTIVATIONS)))
    for conv in convs:
        replace_module(visual, names[conv], FusedConvolution(conv, after.get(conv)))
    for activation in after.values():
        replace_module(visual, names[activation], nn.Identity())
    if same_vector(visual(probe), wanted):
        return True
    for module in (*convs, *after.values()):
        replace_module(visual, names[module], module)
    return False


def has_onednn() -> bool:
    """Whether torch has the oneDNN operators that the fused modules call."""
    built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    # Other versions of torch may lack these private operators.
    return built and all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)


def _is_plain(conv: nn.Conv2d) -> bool:
    plain = type(conv) in (nn.Conv2d, Conv2dSame) and conv.padding_mode == "zeros"
    return plain and isinstance(conv.padding, tuple)


@torch.no_grad()
def round_tower(network: DualEncoder, *, only_if_close: bool) -> None:
    """Round an image tower to bf16, in place, except for its first convolutions.

    The first layers of a trained network subtract similar values, so rounding them spoils every
    layer after them. The fewest convolutions stay exact that keep the vectors of the probe images:
    6 of 58 in an EfficientNet-Lite2 with ImageNet weights, at a cost of 7 % of the time.

    Args:
        network: its image tower has fused convolutions.
        only_if_close: return to fp32 if even the largest number of exact convolutions is too few;
            otherwise keep that number.
    """
    visual = network.clip.visual
    images = probe_images(visual)
    wanted = network.encode_images(images)
    kinds = nn.Conv2d | nn.Linear | nn.MultiheadAttention
    layers = [module for module in visual.modules() if isinstance(module, kinds)]
    exact = {layer: [(p, p.data) for p in layer.parameters()] for layer in layers}
    for layer in layers:
        if isinstance(layer, FusedConvolution):
            layer.round()
        else:
            layer.to(torch.bfloat16)
    network.precisions["image"] = "bf16"
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    most = int(MAX_EXACT_SHARE * len(convs))
    for number in range(0, most + 1, EXACT_STEP):
        for layer in convs[:number]:
            _restore(exact[layer])
        found = network.encode_images(images)
        if F.cosine_similarity(found, wanted).min() >= MIN_COSINE:
            return
    if only_if_close:
        network.precisions["image"] = "fp32"
        for parameters in exact.values():
            _restore(parameters)


def _restore(parameters: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, data in parameters:
        parameter.data = data


def probe_images(visual: Any) -> Tensor:
    """Overlapping discs, float32 [3, 3, height, width], in the value range of normalised photos.

    They have the edges and the flat areas of photos (Lee, Mumford & Huang 2001, "Occlusion models
    for natural images", section 3); rounding hurts flat areas most.
    """
    height, width = noise_image(visual).shape[2:]
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(3, 3, height, width)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    small, large = height / 50, height / 2
    for image in images:
        # The density of radii falls with their cube; the largest come first.
        share = torch.rand(DISCS, generator=generator)
        radii = (share * (small**-2 - large**-2) + large**-2).rsqrt().sort(descending=True).values
        top, left = torch.rand(2, DISCS, generator=generator)
        grey = 1.4 * torch.rand(DISCS, 1, generator=generator) - 0.7
        colours = (grey + 0.15 * torch.randn(DISCS, 3, generator=generator)).clamp(-1, 1)
        for y, x, radius, colour in zip(top * height, left * width, radii, colours, strict=True):
            image[:, (rows - y) ** 2 + (columns - x) ** 2 < radius**2] = colour[:, None]
    return images.contiguous(memory_format=torch.channels_last)
