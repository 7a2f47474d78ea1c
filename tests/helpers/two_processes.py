"""Values of two processes against those of one; the test of it has torchrun start this."""

import math
from functools import partial
from pathlib import Path

import torch

from clipkit.training.distributed import World, join_world
from clipkit.training.grad_cache import backward
from clipkit.training.loss import chance_loss, info_nce
from clipkit.training.step import sum_gradients
from tests.helpers.models import tiny_model
from tests.helpers.steps import batch, network, pairs, prepare
from tests.helpers.two_norms import check_norms
from tests.helpers.two_shards import check_shards

CLOSE = {"rtol": 0, "atol": 1e-10}
GROUPS = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 2], [3, 3], [3, 3], [4, 0]])
WEIGHTS = torch.tensor([0.5, 3.0, 0.0, 1.0, 0.25, 7.0, 1.5])


def check_loss(world: World, first: int, tile: int, **choice) -> None:
    """Shares of ``first`` pairs and the rest, against all seven at once."""
    own = slice(0, first) if world.rank == 0 else slice(first, 7)
    whole, (images, texts, scale) = pairs(7), pairs(7)
    parts = [part.detach()[own].clone().requires_grad_() for part in (images, texts)]
    given = {
        name: value[own] if torch.is_tensor(value) else value for name, value in choice.items()
    }
    wanted = info_nce(*whole, **choice)
    found = info_nce(*parts, scale, tile=tile, world=world, **given)
    torch.testing.assert_close(found, wanted, **CLOSE)
    (3 * wanted).backward()
    (3 * found).backward()
    for part, one in zip(parts, whole[:2], strict=True):
        torch.testing.assert_close(part.grad, one.grad[own], **CLOSE)
    torch.testing.assert_close(world.add(scale.grad), whole[2].grad, **CLOSE)


def check_guess(world: World, first: int) -> None:
    """The same for the chance loss."""
    own = slice(0, first) if world.rank == 0 else slice(first, 7)
    wanted = chance_loss(GROUPS, weights=WEIGHTS)
    found = chance_loss(GROUPS[own], weights=WEIGHTS[own], world=world)
    assert abs(found - wanted) < 1e-6
    assert chance_loss(GROUPS[own], duplicates="ignore", world=world) == math.log(7)


def check_gradients(world: World, chunk: int, **choice) -> None:
    """Gradients of the weights, summed, against those of one process with the whole batch."""
    images, tokens = batch(8)
    groups = torch.arange(8) % 5
    whole, part = network(tiny_model()), network(tiny_model())
    wanted = info_nce(*whole(prepare(images), tokens), groups, **choice)
    wanted.backward()
    own = slice(world.rank, None, world.size)
    chunks = list(zip(images[own].split(chunk), tokens[own].split(chunk), strict=True))
    loss_of = partial(info_nce, groups=groups[own], world=world, **choice)
    found = backward(part, chunks, prepare, loss_of, seed=0)
    sum_gradients(part.parameters(), world)
    # The towers normalise in float32 wherever open_clip does.
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-6)
    for (name, one), other in zip(whole.named_parameters(), part.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-6, msg=name)


def main() -> None:
    with join_world() as world:
        assert world.size == 2
        assert world.all_gather_object({"rank": world.rank, "text": "ü"})[1] == {
            "rank": 1,
            "text": "ü",
        }
        assert world.broadcast(world.rank) == 0
        for first in (4, 3, 6, 7, 0):
            check_guess(world, first)
            for tile in (1, 3, 100):
                check_loss(world, first, tile)
                for duplicates in ("mask", "positive", "ignore"):
                    check_loss(world, first, tile, groups=GROUPS, duplicates=duplicates)
                    choice = {"groups": GROUPS[:, 0], "duplicates": duplicates}
                    check_loss(world, first, tile, weights=WEIGHTS, **choice)
        for chunk in (4, 3, 1):
            check_gradients(world, chunk)
            check_gradients(world, chunk, duplicates="positive")
        check_norms(world)
        check_shards(world)
    tasks = Path("/proc/self/task")
    if tasks.exists():
        # A thread of the group that outlives it may take the process down at its end.
        names = [(task / "comm").read_text() for task in tasks.iterdir()]
        assert not [name for name in names if "gloo" in name], names


if __name__ == "__main__":
    main()
