"""Convolutions of a tower that encodes on a CPU: with their activations, in bf16 where that holds.

Fusing is exact. Rounding is not: the first layers of a trained network take differences of values
that are alike, and rounding those spoils what all the others read. So they are left exact.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from clipkit.model.fold import followed, noise, replace, same
from clipkit.model.network import DualEncoder

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
