"""Gradients across processes: summed, measured, clipped."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from clipkit.model.distributed import World
from clipkit.model.sharding import is_shard, whole

BUCKET = 1 << 24
"""Numbers sent at once: 64 MB in float32."""


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sum the gradients of all processes, which each hold those of their own pairs.

    Not DistributedDataParallel, which overlaps this with the backward pass: it plans for one
    backward pass through all parameters, but here the scale gets its gradient from the loss and the
    towers theirs in chunks, so it could do so in the last chunk only. A step sends each gradient
    once, however many chunks it has.

    Args:
        parameters: those of the network; of shards the sum is taken already, as a mean.
        world: the processes.
    """
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for shard in filter(is_shard, gradients):
        shard.mul_(world.size)
    for bucket in _buckets([g for g in gradients if not is_shard(g)]):
        summed = world.add(torch.cat([gradient.flatten() for gradient in bucket]))
        parts = torch.split(summed, [gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the whole gradient down to a norm of at most ``limit``; its norm before, float []."""
    held = [p for p in parameters if p.grad is not None]
    # Torch measures shards and whole gradients, but not both at once.
    kinds = [p for p in held if is_shard(p)], [p for p in held if not is_shard(p)]
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    norm = whole(norms[0]) if len(norms) == 1 else get_total_norm([whole(n) for n in norms])
    for kind in kinds:
        clip_grads_with_norm_(kind, limit, norm)
    return norm
