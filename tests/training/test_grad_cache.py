"""Gradients in micro-batches against the gradient of the whole batch."""

from functools import partial

import pytest
import torch

from clipkit.models.dual_encoder import DualEncoder
from clipkit.training.grad_cache import backward
from clipkit.training.loss import info_nce
from tests.helpers.models import tiny_model
from tests.helpers.steps import RESNET, batch, network, prepare


def in_micro_batches(size, n=10):
    images, tokens = batch(n)
    return list(zip(images.split(size), tokens.split(size), strict=True))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one, other):
    ours, theirs = gradients(one), gradients(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_equals_the_gradient_of_the_whole_batch(size):
    groups = torch.arange(10) % 7
    whole, parts = network(tiny_model()), network(tiny_model())
    images, tokens = batch()
    wanted = info_nce(*whole(prepare(images), tokens), groups)
    wanted.backward()
    loss_of = partial(info_nce, groups=groups)
    found = backward(parts, in_micro_batches(size), prepare, loss_of, seed=0)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-7)
    assert not found.requires_grad
    assert_same_gradients(parts, whole)


TIMM = {"image_size": 32, "timm_proj": "linear"}


@pytest.mark.parametrize(
    "model",
    [
        tiny_model() | {"patch_dropout": 0.5},
        tiny_model() | {"vision": TIMM | {"timm_model_name": "resnet10t", "timm_drop": 0.5}},
        tiny_model()
        | {"vision": TIMM | {"timm_model_name": "efficientnet_lite0", "timm_drop_path": 0.5}},
    ],
    ids=["patches", "dropout", "stochastic depth"],
)
def test_both_passes_draw_the_same_random_numbers(model):
    """Compared with one graph of all micro-batches, with the same seeds."""
    whole, parts = network(model), network(model)
    encoded = []
    for number, (images, tokens) in enumerate(in_micro_batches(4)):
        torch.manual_seed(7 + number)
        encoded.append(whole(prepare(images), tokens)[:2])
    images, texts = (torch.cat(part) for part in zip(*encoded, strict=True))
    wanted = info_nce(images, texts, whole.scale)
    wanted.backward()
    found = backward(parts, in_micro_batches(4), prepare, info_nce, seed=7)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-7)
    assert_same_gradients(parts, whole)
    other = network(model)
    assert backward(other, in_micro_batches(4), prepare, info_nce, seed=8).item() != found.item()


def test_running_statistics_count_each_micro_batch_once():
    once, twice = network(RESNET), network(RESNET)
    for images, _ in in_micro_batches(5):
        once.encode_images(prepare(images))
    backward(twice, in_micro_batches(5), prepare, info_nce, seed=0)
    buffers = dict(once.named_buffers())
    changed = 0
    for name, buffer in twice.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])
        changed += "num_batches_tracked" in name
    assert changed


def test_only_one_micro_batch_at_a_time_has_a_graph(monkeypatch):
    sizes = []
    model = network(tiny_model())
    original = DualEncoder.encode_images

    def watched(self, images):
        vectors = original(self, images)
        if vectors.requires_grad:
            sizes.append(len(images))
        return vectors

    monkeypatch.setattr(DualEncoder, "encode_images", watched)
    backward(model, in_micro_batches(3), prepare, info_nce, seed=0)
    assert sizes == [3, 3, 3, 1]
