"""Batch normalisation of two processes against that of one; two_processes.py calls it."""

import torch
from torch import nn

from clipkit.config import LoopConfig
from clipkit.data.loader import PairBatch
from clipkit.training.distributed import World
from clipkit.training.grad_cache import backward
from clipkit.training.loss import info_nce
from clipkit.training.step import pad_batch, sum_gradients
from clipkit.training.sync_batchnorm import SharedNorm, count_rows, share_statistics
from tests.helpers.models import tiny_model
from tests.helpers.steps import RESNET, batch, network

TIMM = tiny_model() | {
    "vision": {"image_size": 32, "timm_model_name": "resnet10t", "timm_proj": "linear"}
}
CLOSE = {torch.float64: 1e-10, torch.float32: 3e-4}
SIZES = 6, 2


def check_layer(world: World, norm: nn.Module, shape: tuple[int, ...], first: int) -> None:
    """One layer, its input far from zero: output, gradients and statistics, twice in a row."""
    own = slice(0, first) if world.rank == 0 else slice(first, None)
    generator = torch.Generator().manual_seed(0)
    shared = nn.Sequential(norm)
    share_statistics(shared, world)
    assert isinstance(shared[0], SharedNorm)
    whole = type(norm)(7, momentum=norm.momentum, affine=norm.affine).double().train()
    for _ in range(2):
        x = 1e4 + torch.randn(8, *shape, generator=generator, dtype=torch.float64)
        x.requires_grad_()
        upstream = torch.randn(8, *shape, generator=generator, dtype=torch.float64)
        part = x.detach()[own].clone().requires_grad_()
        wanted, found = whole(x), shared(part)
        wanted.backward(upstream)
        found.backward(upstream[own])
        assert_close(found, wanted[own].detach(), 1e-10)
        assert_close(part.grad, x.grad[own], 1e-10)
    sum_gradients(shared.parameters(), world)
    for one, other in zip(shared.parameters(), whole.parameters(), strict=True):
        assert_close(one.grad, other.grad, 1e-10)
    for one, other in zip(shared.buffers(), whole.buffers(), strict=True):
        assert_close(one, other, 1e-10)


def assert_close(found, wanted, tolerance, name=""):
    torch.testing.assert_close(
        found, wanted, rtol=tolerance, atol=tolerance, msg=lambda said: f"{name}: {said}"
    )


def check_blank_rows(world: World) -> None:
    """Rows that do not count change nothing, whatever is in them."""
    shared = nn.Sequential(nn.BatchNorm2d(3)).double()
    share_statistics(shared, world)
    whole = nn.BatchNorm2d(3).double()
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = [slice(0, 4), slice(4, 5)][world.rank]
    padded = torch.cat([x[own], torch.full((2, 3, 2, 2), 99.0, dtype=torch.float64)])
    count_rows(shared, len(x[own]))
    assert_close(shared(padded)[:-2], whole(x)[own], 1e-10)
    assert_close(shared[0].running_var, whole.running_var, 1e-10)


def check_networks(world: World, model: dict, dtype: torch.dtype, chunk: int, first: int) -> None:
    """Loss, gradients and running statistics of a whole step.

    Args:
        chunk: pairs that each of the two encodes at once, as one does twice as many; 0: all.
        first: pairs of the first process; 0: they take them in turn.
    """
    images, tokens = batch(8)
    whole, part = (network(model).to(dtype) for _ in range(2))
    share_statistics(part, world)
    assert list(part.state_dict()) == list(whole.state_dict())
    wanted = backward(whole, chunked(images, tokens, 2 * chunk), as_input(dtype), info_nce, seed=0)
    own = slice(world.rank, None, 2)
    if first:
        own = slice(0, first) if world.rank == 0 else slice(first, None)
    pairs = PairBatch(images[own], tokens[own], [""] * len(images[own]))
    filled = pad_batch(pairs, LoopConfig(batch_size=8, micro_batch_size=chunk), world, (32, 32))
    assert len(filled[0]) == max(1, len(pairs))

    def loss_of(images, texts, scale):
        return info_nce(images[: len(pairs)], texts[: len(pairs)], scale, world=world)

    chunks = chunked(*filled, chunk)
    found = backward(part, chunks, as_input(dtype), loss_of, seed=0, pairs=len(pairs))
    sum_gradients(part.parameters(), world)
    assert_close(found, wanted, CLOSE[dtype])
    for (name, one), other in zip(whole.named_parameters(), part.parameters(), strict=True):
        assert_close(other.grad, one.grad, CLOSE[dtype], name)
    for (name, one), other in zip(whole.named_buffers(), part.buffers(), strict=True):
        assert_close(other, one, CLOSE[dtype], name)
    if world.is_main_process:  # in evaluation nobody else is asked
        given = as_input(dtype)(images)
        assert_close(
            part.eval().encode_images(given), whole.eval().encode_images(given), CLOSE[dtype]
        )


def chunked(images, tokens, size):
    size = size or len(images)
    return list(zip(images.split(size), tokens.split(size), strict=True))


def as_input(dtype):
    return lambda images: images.to(dtype) / 255


def check_norms(world: World) -> None:
    for first in SIZES:
        check_layer(world, nn.BatchNorm2d(7).double(), (7, 3, 2), first)
        check_layer(world, nn.BatchNorm1d(7, momentum=None).double(), (7,), first)
        check_layer(world, nn.BatchNorm2d(7, affine=False).double(), (7, 1, 5), first)
    check_blank_rows(world)
    for model in (TIMM, RESNET):
        check_networks(world, model, torch.float32, 0, 0)
        for chunk, first in ((0, 0), (2, 0), (0, 5), (0, 8)):
            check_networks(world, model, torch.float64, chunk, first)
