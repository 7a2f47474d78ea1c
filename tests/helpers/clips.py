"""Towers away from their first weights, what they are given, and encoders of them."""

import torch
from torch import nn

from clipkit.artifacts import ModelRef
from clipkit.config import parse_config
from clipkit.data.transforms import Preprocess
from clipkit.models import encoder as encoder_module
from clipkit.models.inference_precision import prepare
from clipkit.training.build import build_towers
from tests.helpers.models import tiny_model

CPU = torch.device("cpu")


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}


TIMM = {"timm_pool": "avg", "timm_proj": "linear", "image_size": 32}


CAPTIONS = [f"{'very ' * (7 * i % 23)}small picture {i % 5}" for i in range(40)]


CAPTIONS += ["", "!€ what", "<end_of_text> said", *CAPTIONS[:10]]


def clip_of(**vision):
    """Towers with weights and running statistics away from their first values."""
    model = tiny_model()
    if vision:
        own = any(key in vision for key in ("layers", "timm_model_name"))
        model["vision"] = vision if own else model["vision"] | vision
    clip = build_towers(parse_config({"model": model}).model, 0.07, seed=0).clip.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in clip.modules():
            if isinstance(module, nn.BatchNorm2d):
                noise = torch.randn(4, module.num_features, generator=generator) / 5
                module.running_mean.copy_(noise[0])
                module.running_var.copy_(noise[1].exp())
                module.weight.copy_(1 + noise[2])
                module.bias.copy_(noise[3])
    return clip


def photos(clip, n=5):
    size, generator = clip.visual.image_size, torch.Generator().manual_seed(2)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(n, 3, height, width, generator=generator)


def as_encoder(clip, precision="fp32"):
    network = prepare(clip, precision, CPU)
    preprocess = Preprocess.of(clip.visual.preprocess_cfg)
    return encoder_module.Encoder(network, ModelRef("tiny", "", "0" * 64, 32), preprocess)
