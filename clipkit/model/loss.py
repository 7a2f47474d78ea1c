"""Symmetric InfoNCE, the contrastive loss of CLIP, without a matrix of all pairs in memory."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1024
"""Rows and columns of the logits held at a time: 4 MB in float32."""


def info_nce(
    images: Tensor, texts: Tensor, scale: Tensor, groups: Tensor | None = None, tile: int = TILE
) -> Tensor:
    """Symmetric InfoNCE: the mean cross-entropy of each image finding its caption, and back.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
    figure 3; without ``groups`` it equals open_clip's ``ClipLoss``. The logits are computed tile by
    tile, and again in the backward pass, so that memory grows with n, not with its square.

    Args:
        images: float [n, dim], rows of unit length.
        texts: float [n, dim], rows of unit length; row i belongs to image i.
        scale: float [], the inverse temperature.
        groups: int [n]; pairs of equal group say the same thing, so they are not counted as each
            other's negatives. None: all other pairs are negatives.
        tile: rows and columns of the logits held at a time; it bounds the memory, not the result.

    Returns:
        float []; differentiable once, with respect to images, texts and scale.
    """
    loss: Tensor = _TiledInfoNCE.apply(images, texts, scale, groups, tile)
    return loss


class _TiledInfoNCE(torch.autograd.Function):
    """Two passes over the tiles: one for the normalisers, one for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, groups: Tensor | None, tile: int
    ) -> Tensor:
        rows, columns = _normalisers(images, texts, scale, groups, tile)
        ctx.save_for_backward(images, texts, scale, groups, rows, columns)
        ctx.tile = tile
        matches = scale * (images * texts).sum(dim=1)
        return ((rows + columns) / 2 - matches).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        images, texts, scale, groups, rows, columns = ctx.saved_tensors
        of_images, of_texts = torch.zeros_like(images), torch.zeros_like(texts)
        for i, j, logits in _tiles(images, texts, scale, groups, ctx.tile):
            shares = _shares(logits, rows[i], columns[j])
            of_images[i].addmm_(shares, texts[j])
            of_texts[j].addmm_(shares.T, images[i])
        # The matches are counted once in each direction.
        of_images.sub_(texts, alpha=2)
        of_texts.sub_(images, alpha=2)
        weight = upstream / (2 * len(images))
        of_scale = weight * (of_images * images).sum()
        return of_images.mul_(weight * scale), of_texts.mul_(weight * scale), of_scale, None, None


def _tiles(
    images: Tensor, texts: Tensor, scale: Tensor, groups: Tensor | None, tile: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The logits part by part, with the rows and columns they stand for."""
    for row in range(0, len(images), tile):
        i = slice(row, row + tile)
        scaled = images[i] * scale
        for column in range(0, len(texts), tile):
            j = slice(column, column + tile)
            logits = scaled @ texts[j].T
            if groups is not None:
                same = groups[i, None] == groups[None, j]
                if row == column:
                    same.fill_diagonal_(False)
                logits.masked_fill_(same, -math.inf)
            yield i, j, logits


def _normalisers(
    images: Tensor, texts: Tensor, scale: Tensor, groups: Tensor | None, tile: int
) -> tuple[Tensor, Tensor]:
    """Logarithms of the sums of exponentials of the logits' rows and columns, float [n] each."""
    rows = images.new_full((len(images),), -math.inf)
    columns = rows.clone()
    highest = -math.inf
    for i, j, logits in _tiles(images, texts, scale, groups, tile):
        # One exponential serves rows and columns if both are measured from the tile's peak.
        peak = logits.max()
        highest = max(highest, float(peak))
        exponentials = logits.sub_(peak).exp_()
        rows[i] = torch.logaddexp(rows[i], exponentials.sum(dim=1).log_() + peak)
        columns[j] = torch.logaddexp(columns[j], exponentials.sum(dim=0).log_() + peak)
    if highest - min(float(rows.min()), float(columns.min())) < _range(rows.dtype):
        return rows, columns
    return _careful_normalisers(images, texts, scale, groups, tile)


def _careful_normalisers(
    images: Tensor, texts: Tensor, scale: Tensor, groups: Tensor | None, tile: int
) -> tuple[Tensor, Tensor]:
    """The same for rows so far below the peak that their exponentials vanish beside it."""
    rows = images.new_full((len(images),), -math.inf)
    columns = rows.clone()
    for i, j, logits in _tiles(images, texts, scale, groups, tile):
        rows[i] = torch.logaddexp(rows[i], logits.logsumexp(dim=1))
        columns[j] = torch.logaddexp(columns[j], logits.logsumexp(dim=0))
    return rows, columns


def _shares(logits: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Softmax along the rows plus softmax along the columns; overwrites the logits."""
    lowest = torch.minimum(rows.min(), columns.min())
    if float(logits.max() - lowest) >= _range(logits.dtype):
        return (logits - rows[:, None]).exp_() + (logits - columns[None, :]).exp_()
    # exp(l − r) + exp(l − c) = exp(l − s) · (exp(s − r) + exp(s − c)): one exponential a logit.
    factors = (lowest - rows).exp_()[:, None] + (lowest - columns).exp_()[None, :]
    return logits.sub_(lowest).exp_().mul_(factors)


def _range(dtype: torch.dtype) -> float:
    """How far apart two logits may be for their exponentials to fit one float, with a margin."""
    return 0.8 * math.log(torch.finfo(dtype).max)


def caption_groups(tokens: Tensor) -> Tensor:
    """Number equal captions alike: int64 [n, context] to int64 [n]."""
    groups: Tensor = torch.unique(tokens, dim=0, return_inverse=True)[1]
    return groups
