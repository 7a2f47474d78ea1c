"""Towers dealt out over two processes against those of one; two_processes.py calls it."""

from functools import partial

import torch

from clipkit.training.build import checkpoint_gradients
from clipkit.training.distributed import World
from clipkit.training.fsdp import is_shard, shard, whole
from clipkit.training.grad_cache import backward
from clipkit.training.loss import info_nce
from clipkit.training.step import sum_gradients
from tests.helpers.models import tiny_model
from tests.helpers.steps import batch, network, prepare

THREE_LAYERS = {
    part: settings | {"layers": 3} if isinstance(settings, dict) else settings
    for part, settings in tiny_model().items()
}


def refuse(*_):
    raise AssertionError("open_clip's own forward pass was run")


def check_shards(world: World) -> None:
    images, tokens = batch(8)
    own = slice(world.rank, None, world.size)
    one = network(THREE_LAYERS)
    wanted = info_nce(*one(prepare(images), tokens))
    wanted.backward()
    for chunk, again in ((4, False), (4, True), (3, True), (1, False)):
        dealt = network(THREE_LAYERS)
        if again:
            checkpoint_gradients(dealt.clip)
        shard(dealt, world)
        assert dealt.runs_images
        assert dealt.runs_texts
        for block in (*dealt.clip.visual.transformer.resblocks, *dealt.clip.transformer.resblocks):
            assert all(is_shard(parameter) for parameter in block.parameters())
            block.forward = refuse
        chunks = list(zip(images[own].split(chunk), tokens[own].split(chunk), strict=True))
        found = backward(dealt, chunks, prepare, partial(info_nce, world=world), seed=0)
        sum_gradients(dealt.parameters(), world)
        torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-10)
        for (name, parameter), other in zip(
            one.named_parameters(), dealt.parameters(), strict=True
        ):
            torch.testing.assert_close(
                whole(other.grad), parameter.grad, rtol=0, atol=1e-10, msg=name
            )
