"""What a step of training takes, small and in double precision."""

import torch
import torch.nn.functional as F

from clipkit.config import parse_config
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.tokenizer import tokenize
from clipkit.training.build import build_towers
from tests.helpers.models import tiny_model

RESNET = tiny_model() | {"vision": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}


def network(model):
    towers = build_towers(parse_config({"model": model}).model, 0.07, seed=0)
    return DualEncoder(towers.clip).double().train()


def batch(n=10):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    texts = [f"{'very ' * (number % 4)}small picture {number % 7}" for number in range(n)]
    return images, torch.from_numpy(tokenize(texts))


def prepare(images):
    return images.double() / 255


def pairs(n, dim=16, seed=0, dtype=torch.float64, scale=14.3):
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, n, dim, generator=generator, dtype=dtype)
    return (
        F.normalize(images, dim=1).requires_grad_(),
        F.normalize(texts, dim=1).requires_grad_(),
        torch.tensor(scale, dtype=dtype, requires_grad=True),
    )
