"""Training on a GPU against the same on a CPU."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from clipkit.data.loader import PairBatch
from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.build import build_towers
from clipkit.training.data import open_training_data, pair_loader
from clipkit.training.distributed import World
from clipkit.training.loss import info_nce
from clipkit.training.step import Trainer
from tests.helpers.models import tiny_model
from tests.helpers.runs import configured
from tests.helpers.steps import batch, pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RESNET = tiny_model() | {"vision": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}


def trainer(model, micro_batch_size, device, folder):
    config = configured(folder, model=model, train={"micro_batch_size": micro_batch_size})
    towers = build_towers(config.model, 0.07, seed=0)
    return Trainer(towers, config, World(torch.device(device)))


@contextmanager
def nobody_waits():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("model", [tiny_model(), RESNET], ids=["transformer", "resnet"])
@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_steps_are_those_of_a_cpu(model, micro_batch_size, tmp_path):
    images, tokens = batch(8)
    given = PairBatch(images, tokens, [f"{number}.png" for number in range(8)])
    here, there = (trainer(model, micro_batch_size, device, tmp_path) for device in ("cpu", "cuda"))
    for step in range(3):
        one, other = (one.take_step(given, step, 0.3) for one in (here, there))
        assert other.loss == pytest.approx(one.loss, abs=2e-3)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_encoding_waits_for_nothing(precision, tmp_path):
    towers = build_towers(configured(tmp_path).model, 0.07, seed=0)
    network = DualEncoder(towers.clip, precision).cuda().train()
    images, tokens = batch(130)
    given = (images.float() / 255).cuda()
    network(given, tokens)  # what is set up once may wait
    with nobody_waits():
        found = network(given, tokens)
    wanted = DualEncoder(towers.clip.cpu(), precision)(given.cpu(), tokens)
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        least = 1 - 1e-4 if precision == "fp32" else 0.99
        assert (ours.cpu() * theirs).sum(dim=1).min() > least


@pytest.mark.parametrize("n", [50, 5000])
def test_the_loss_is_that_of_a_cpu(n):
    here = pairs(n, dtype=torch.float32)
    there = [part.detach().cuda().requires_grad_() for part in here]
    found = info_nce(*there)
    wanted = info_nce(*here)
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=2e-5)
    found.backward()
    wanted.backward()
    for ours, theirs in zip(there, here, strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=0, atol=2e-5)


def test_pictures_are_pinned(colour_folder):
    config = configured(colour_folder)
    source, _ = open_training_data(config.data, seed=0)
    loader = pair_loader(config, source, (32, 32), None, World(torch.device("cuda")))
    assert next(loader.batches(0)).images.is_pinned()
