"""Batch normalisation at rest, folded into the convolution before it.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2, equation 14.

Convolutions of a tower that encodes on a CPU: with their activations, in bf16 where that holds.

Fusing is exact. Rounding is not: the first layers of a trained network take differences of values
that are alike, and rounding those spoils what all the others read. So they are left exact.
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


LEAST = 0.9995
"""Cosine with its vector in fp32 that each probe picture's must keep in bf16. With the weights
of EfficientNet-Lite0, 1 and 2 for ImageNet the worst of 150 to 400 photos then keeps 0.9994, and if
all convolutions are rounded the worst of 48 keeps 0.996 to 0.988."""
STEP = 3
"""Convolutions that are left exact more at a time, where that was not enough."""
FIRST = 0.25
"""Share of a tower's convolutions that may be left exact."""

DISCS = 40
"""In a probe picture."""

ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}
"""What oneDNN computes while it has a convolution's output at hand, and its arguments."""


OPERATIONS = ("_convolution_pointwise", "_linear_pointwise")


class FusedConvolution(nn.Conv2d):
    """A convolution and the activation behind it in one pass, in the precision of its weights.

    Args:
        conv: whose weights are taken.
        activation: what follows it; None: nothing.
    """

    def __init__(self, conv: nn.Conv2d, activation: nn.Module | None) -> None:
        of: Any = conv  # torch's own types of sizes do not fit one another
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
        """Round the weights to bf16; of the bias only where oneDNN takes no other."""
        self.weight.data = self.weight.data.bfloat16()
        if self.bias is not None and not self.pointwise:
            self.bias.data = self.bias.data.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, height, width], best channels-last, to the same of the weights' type."""
        x = x.to(self.weight.dtype)
        made: Tensor
        if self.pointwise:  # a product of matrices, to which a bias may be added in float32
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
    """Put a ``FusedConvolution`` in the place of each convolution of a tower on a CPU, in place.

    Args:
        visual: open_clip's image tower in evaluation mode, its batch norms folded.

    Returns:
        whether it was done. Where the machine has no oneDNN, a convolution is of a kind of its
        own, or a probe's vector is another, the tower is left as it was.
    """
    names = {module: name for name, module in visual.named_modules()}
    convs = [module for module in names if isinstance(module, nn.Conv2d)]
    if not has_onednn() or not all(map(_is_plain, convs)):
        return False
    probe = noise(visual)
    wanted: Tensor = visual(probe)
    after = dict(followed(visual, probe, tuple(ACTIVATIONS)))
    for conv in convs:
        replace(visual, names[conv], FusedConvolution(conv, after.get(conv)))
    for activation in after.values():
        replace(visual, names[activation], nn.Identity())
    if same(visual(probe), wanted):
        return True
    for module in (*convs, *after.values()):
        replace(visual, names[module], module)
    return False


def has_onednn() -> bool:
    """Whether torch was built with the library whose operations the fused modules call."""
    built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    # They are torch's own affair, made for its compiler: another version may have others.
    return built and all(hasattr(torch.ops.mkldnn, name) for name in OPERATIONS)


def _is_plain(conv: nn.Conv2d) -> bool:
    plain = type(conv) in (nn.Conv2d, Conv2dSame) and conv.padding_mode == "zeros"
    return plain and isinstance(conv.padding, tuple)


@torch.no_grad()
def round_tower(network: DualEncoder, *, only_if_close: bool) -> None:
    """Round what an image tower's products read, in place, but for its first convolutions.

    How many of those stay exact is the least with which the vectors of probe pictures stay what
    they are: of an EfficientNet-Lite2 with ImageNet's weights six of 58, for 7 % of the time.

    Args:
        network: whose image tower's convolutions are fused.
        only_if_close: leave it in fp32 where no number is enough; else it is the largest.
    """
    visual = network.clip.visual
    pictures = probe_pictures(visual)
    wanted = network.encode_images(pictures)
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
    most = int(FIRST * len(convs))
    for number in range(0, most + 1, STEP):
        for layer in convs[:number]:
            _restore(exact[layer])
        found = network.encode_images(pictures)
        if F.cosine_similarity(found, wanted).min() >= LEAST:
            return
    if only_if_close:
        network.precisions["image"] = "fp32"
        for parameters in exact.values():
            _restore(parameters)


def _restore(parameters: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, data in parameters:
        parameter.data = data


def probe_pictures(visual: Any) -> Tensor:
    """Discs that cover one another, float32 [3, 3, height, width], about as photos are normalised.

    Such pictures have the edges and the plain areas of photos (Lee, Mumford & Huang 2001,
    "Occlusion models for natural images", section 3); of plain areas rounding leaves least.
    """
    height, width = noise(visual).shape[2:]
    generator = torch.Generator().manual_seed(0)
    pictures = torch.zeros(3, 3, height, width)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    small, large = height / 50, height / 2
    for picture in pictures:
        # Radii whose density falls with their cube, the largest first.
        share = torch.rand(DISCS, generator=generator)
        radii = (share * (small**-2 - large**-2) + large**-2).rsqrt().sort(descending=True).values
        top, left = torch.rand(2, DISCS, generator=generator)
        grey = 1.4 * torch.rand(DISCS, 1, generator=generator) - 0.7
        colours = (grey + 0.15 * torch.randn(DISCS, 3, generator=generator)).clamp(-1, 1)
        for y, x, radius, colour in zip(top * height, left * width, radii, colours, strict=True):
            picture[:, (rows - y) ** 2 + (columns - x) ** 2 < radius**2] = colour[:, None]
    return pictures.contiguous(memory_format=torch.channels_last)
