"""Symmetric InfoNCE, the contrastive loss of CLIP, without a matrix of all pairs in memory."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipkit.model.distributed import ALONE, World
from clipkit.model.tiles import Sweep, is_narrow
from clipkit.model.transfer import send

TILES = {"cpu": 1024, "cuda": 4096}
"""Rows and columns of the logits held at a time: 4 MB in float32 fit a CPU's cache; on a GPU, which
walks over tiles as fast as it is told to, 64 MB."""


def info_nce(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    groups: Tensor | None = None,
    tile: int | None = None,
    *,
    weights: Tensor | None = None,
    duplicates: Literal["mask", "positive", "ignore"] = "mask",
    world: World = ALONE,
) -> Tensor:
    """Symmetric InfoNCE: the mean cross-entropy of each image finding its caption, and back.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
    figure 3; without ``groups`` it equals open_clip's ``ClipLoss``. The logits are computed tile by
    tile, and again in the backward pass, so that memory grows with n, not with its square.

    Several processes share one batch of N pairs: each holds the logits of its own images, walks
    over all captions, and takes the captions' normalisers from all (the division of Chen et al.
    2023, "DisCo-CLIP", section 3, with one product of n × N instead of two). Every process gets the
    loss of the whole batch, and that loss's gradient with respect to its own vectors; of the
    scale's gradient each gets a part, to be summed.

    Args:
        images: float [n, dim], rows of unit length.
        texts: float [n, dim], rows of unit length; row i belongs to image i.
        scale: float [], the inverse temperature.
        groups: int [n] or [n, 2]; pairs that agree in any column are duplicates: the caption of one
            is right for the image of the other. None: there are no duplicates.
        tile: rows and columns of the logits held at a time, None: ``TILES``; it bounds the memory,
            not the result.
        weights: float [n], at least 0; the loss is the weighted mean of the pairs' own losses.
        duplicates: ``"mask"``: duplicates are not each other's negatives. ``"positive"``: each pair
            has itself and all its duplicates as targets, of equal share (Khosla et al. 2020,
            "Supervised Contrastive Learning", equation 2; in both directions Yang et al. 2022,
            "Unified Contrastive Learning in Image-Text-Label Space", equations 2 to 4).
            ``"ignore"``: all other pairs are negatives, whatever the groups.
        world: the processes that share the batch, each with any number n of its pairs.

    Returns:
        float []; differentiable once, with respect to images, texts and scale.
    """
    shares = world.shares(len(images))
    if groups is not None:
        groups = None if duplicates == "ignore" else _repeated(groups, world, shares)
    mass = _mass(weights, world, shares, images)
    targets = None
    if groups is not None:
        groups = send(groups, images.device)
        targets = mass / _counts(groups) if duplicates == "positive" else None
    tile = tile or TILES.get(images.device.type, TILES["cpu"])
    batch = _Batch(mass, groups, targets, tile, world, shares)
    loss: Tensor = _TiledInfoNCE.apply(images, texts, scale, batch)
    return loss


def guessing_loss(
    groups: Tensor,
    *,
    weights: Tensor | None = None,
    duplicates: Literal["mask", "positive", "ignore"] = "mask",
    world: World = ALONE,
) -> float:
    """``info_nce`` of a model that tells no pair from another: all logits are equal.

    Each pair chooses among as many as are not masked for it. Targets, however many, change nothing:
    the mean of equal logarithms is the same. Arguments as of ``info_nce``, on the CPU.
    """
    shares = world.shares(len(groups))
    repeated = _repeated(groups, world, shares) if duplicates == "mask" else None
    if repeated is None:
        return math.log(sum(shares))
    choices = len(repeated) + 1 - _counts(repeated).double()
    return float((_mass(weights, world, shares, choices) * choices.log()).mean())


@dataclass(frozen=True)
class _Batch:
    """What is known of a whole batch beside its vectors; the tensors are those of ``Sweep``."""

    mass: Tensor
    groups: Tensor | None
    targets: Tensor | None
    tile: int
    world: World
    shares: list[int]

    def sweep(self, images: Tensor, texts: Tensor, scale: Tensor) -> Sweep:
        """The logits of this process's images and the captions of all."""
        first = sum(self.shares[: self.world.rank])
        return Sweep(images, texts, scale, first, self.mass, self.groups, self.targets, self.tile)


class _TiledInfoNCE(torch.autograd.Function):
    """Two passes over the tiles: one for the normalisers, one for the gradients."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, batch: _Batch) -> Tensor:
        texts = batch.world.gather(texts, batch.shares)
        sweep = batch.sweep(images, texts, scale)
        rows, columns, matches, highest = sweep.normalisers()
        columns = batch.world.log_add(columns)
        ctx.save_for_backward(images, texts, scale, rows, columns)
        ctx.batch, ctx.narrow = batch, is_narrow(highest, rows, columns)
        both_ways = sweep.mass[sweep.own] * (rows + columns[sweep.own]) / 2
        return batch.world.add((both_ways - matches).sum() / len(texts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, texts, scale, rows, columns = ctx.saved_tensors
        batch: _Batch = ctx.batch
        of_images, of_texts = batch.sweep(images, texts, scale).gradients(rows, columns, ctx.narrow)
        of_texts = batch.world.scatter_sum(of_texts, batch.shares)
        weight = upstream / (2 * len(texts))
        of_scale = weight * (of_images * images).sum()
        return of_images.mul_(weight * scale), of_texts.mul_(weight * scale), of_scale, None


def _repeated(groups: Tensor, world: World, shares: list[int]) -> Tensor | None:
    """Everyone's columns in which some pairs agree, int64 [N, 1 or 2]; None if in none they do."""
    groups = world.gather(groups[:, None] if groups.ndim == 1 else groups, shares)
    ordered = groups.sort(dim=0).values
    repeated = groups[:, (ordered[1:] == ordered[:-1]).any(dim=0)]
    return repeated if repeated.shape[1] else None  # most batches hold no image twice


def _mass(weights: Tensor | None, world: World, shares: list[int], like: Tensor) -> Tensor:
    """What each pair of all counts for, 1 on average, float [N]."""
    if weights is None:
        return like.new_ones(sum(shares))
    mass = send(world.gather(weights, shares), like.device).to(like.dtype)
    return mass / mass.mean()


def _counts(groups: Tensor) -> Tensor:
    """How many duplicates each pair has, itself counted: int64 [N] from int64 [N, 1 or 2]."""
    numbers = [torch.unique(column, return_inverse=True)[1] for column in groups.T]
    counts = sum(number.bincount()[number] for number in numbers)
    if len(numbers) == 2:  # those that agree in both were counted twice
        both = torch.unique(numbers[0] * len(groups) + numbers[1], return_inverse=True)[1]
        counts = counts - both.bincount()[both]
    return torch.as_tensor(counts)
