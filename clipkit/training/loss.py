"""The contrastive loss of CLIP, symmetric InfoNCE, computed in tiles.

The loss never materialises the matrix of all pairs: it computes the logits tile by tile, once for
the softmax normalisers and again for the gradients. Pairs can be weighted, and pairs with the same
image or the same caption can be masked or treated as positives. Several processes can share a
batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipkit.models.bpe import WORD_END, vocabulary
from clipkit.models.tokenizer import CONTEXT
from clipkit.models.transformer import send
from clipkit.shapes import Float, Int
from clipkit.training.distributed import ALONE, World

TILES = {"cpu": 1024, "cuda": 4096}
"""Rows and columns of a tile of logits. In float32, 4 MB fit the cache of a CPU. On a GPU, larger
tiles (64 MB) need fewer kernel launches."""


def info_nce(
    images: Float[Tensor, "n dim"],
    texts: Float[Tensor, "n dim"],
    scale: Float[Tensor, ""],
    groups: Int[Tensor, " n"] | Int[Tensor, "n k"] | None = None,
    tile: int | None = None,
    *,
    weights: Float[Tensor, " n"] | None = None,
    duplicates: Literal["mask", "positive", "ignore"] = "mask",
    world: World = ALONE,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: the mean cross-entropy of image→text and text→image matching.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
    figure 3; without ``groups`` it equals open_clip's ``ClipLoss``. The logits are computed tile by
    tile, and again in the backward pass, so memory grows linearly with n, not quadratically.

    Several processes can share one batch of N pairs. Each computes the logits of its own images
    with all captions, and the captions' normalisers are reduced over the processes (Chen et al.
    2023, "DisCo-CLIP", section 3, with one product of n × N instead of two). Every process gets the
    loss of the whole batch and its gradient with respect to the local vectors. The gradient of the
    scale is partial and must be summed over the processes.

    Args:
        images: float [n, dim], rows of unit length.
        texts: float [n, dim], rows of unit length; row i belongs to image i.
        scale: float [], the inverse temperature.
        groups: int [n] or [n, 2]. Pairs that agree in any column are duplicates: each one's caption
            also matches the other's image. None: no duplicates.
        tile: rows and columns of a tile of logits; None: ``TILES``. It limits the memory and does
            not change the result.
        weights: float [n], non-negative; the loss is the weighted mean over the pairs.
        duplicates: ``"mask"``: duplicates are not each other's negatives. ``"positive"``: the
            targets of a pair are itself and all its duplicates, with equal probability (Khosla et
            al. 2020, "Supervised Contrastive Learning", equation 2; in both directions Yang et al.
            2022, "Unified Contrastive Learning in Image-Text-Label Space", equations 2 to 4).
            ``"ignore"``: all other pairs are negatives, whatever their groups.
        world: the processes that share the batch; n may differ between them.

    Returns:
        float []; differentiable once, with respect to images, texts and scale.
    """
    shares = world.shares(len(images))
    if groups is not None:
        groups = None if duplicates == "ignore" else _repeated_groups(groups, world, shares)
    weights = _normalised_weights(weights, world, shares, images)
    targets = None
    if groups is not None:
        groups = send(groups, images.device)
        targets = weights / _duplicate_counts(groups) if duplicates == "positive" else None
    tile = tile or TILES.get(images.device.type, TILES["cpu"])
    batch = _Batch(weights, groups, targets, tile, world, shares)
    loss: Tensor = _TiledInfoNCE.apply(images, texts, scale, batch)
    return loss


def chance_loss(
    groups: Tensor,
    *,
    weights: Tensor | None = None,
    duplicates: Literal["mask", "positive", "ignore"] = "mask",
    world: World = ALONE,
) -> float:
    """``info_nce`` of a uniform predictor, whose logits are all equal.

    A pair's loss is the logarithm of the number of its unmasked candidates. The number of its
    targets does not matter: they all have the same probability. Arguments as for ``info_nce``, on
    the CPU.
    """
    shares = world.shares(len(groups))
    repeated = _repeated_groups(groups, world, shares) if duplicates == "mask" else None
    if repeated is None:
        return math.log(sum(shares))
    candidates = len(repeated) + 1 - _duplicate_counts(repeated).double()
    weights = _normalised_weights(weights, world, shares, candidates)
    return float((weights * candidates.log()).mean())


def pair_groups(keys: Sequence[str], tokens: Tensor) -> Tensor:
    """Hashes of images and captions, int64 [n, 2], the same in every process.

    Two pairs that agree in either column are duplicates: each one's caption also matches the
    other's image. The relation is not transitive. If a and b share a caption, and b and c share an
    image, nothing is known about a's image and c's caption.

    Args:
        keys: of the n images; equal keys mean the same image.
        tokens: int64 [n, 77], of their captions.
    """
    digests = (blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest() for key in keys)
    numbers = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.stack([torch.tensor(numbers, dtype=torch.int64), caption_groups(tokens)], dim=1)


def caption_groups(tokens: Tensor) -> Tensor:
    """64-bit hashes of captions, int64 [n], without their final punctuation.

    The tokenizer has already normalised case, whitespace, HTML and broken Unicode.

    Args:
        tokens: int64 [n, 77].
    """
    positions = torch.arange(CONTEXT)
    inside = positions < tokens.argmax(dim=1, keepdim=True)  # the end token has the largest id
    words = inside & ~_is_punctuation()[tokens]
    last = (words * positions).amax(dim=1, keepdim=True)
    return ((tokens + 1) * (positions <= last) * _hash_factors()).sum(dim=1)


@cache
def _is_punctuation() -> Tensor:
    """Whether a token consists of punctuation that can end a sentence: bool [vocabulary]."""
    pieces = (piece.removesuffix(WORD_END.encode()) for piece in vocabulary().pieces)
    return torch.tensor([bool(piece) and not piece.strip(b".!?;:,") for piece in pieces])


@cache
def _hash_factors() -> Tensor:
    """A random odd factor for each position: int64 [77].

    The sum of products with random factors, modulo 2**64, is a universal hash. Token ids differ by
    less than 2**16, so any two captions collide with a probability of at most 2**-48.
    """
    generator = torch.Generator().manual_seed(77)
    return 2 * torch.randint(-(2**62), 2**62, (CONTEXT,), generator=generator) + 1


def _repeated_groups(groups: Tensor, world: World, shares: list[int]) -> Tensor | None:
    """The columns of all processes' groups that have duplicates, int64 [N, 1 or 2].

    None if no column has any, as in most batches.
    """
    groups = world.gather(groups[:, None] if groups.ndim == 1 else groups, shares)
    ordered = groups.sort(dim=0).values
    repeated = groups[:, (ordered[1:] == ordered[:-1]).any(dim=0)]
    return repeated if repeated.shape[1] else None


def _normalised_weights(
    weights: Tensor | None, world: World, shares: list[int], like: Tensor
) -> Tensor:
    """The weights of all processes' pairs with a mean of 1, float [N]."""
    if weights is None:
        return like.new_ones(sum(shares))
    weights = send(world.gather(weights, shares), like.device).to(like.dtype)
    return weights / weights.mean()


def _duplicate_counts(groups: Tensor) -> Tensor:
    """The number of duplicates of each pair, including itself: int64 [N] from int64 [N, 1 or 2]."""
    numbers = [torch.unique(column, return_inverse=True)[1] for column in groups.T]
    counts = sum(number.bincount()[number] for number in numbers)
    if len(numbers) == 2:  # pairs that agree in both columns were counted twice
        both = torch.unique(numbers[0] * len(groups) + numbers[1], return_inverse=True)[1]
        counts = counts - both.bincount()[both]
    return torch.as_tensor(counts)


@dataclass(frozen=True)
class _Batch:
    """A batch of N pairs over all processes, except its vectors.

    Attributes:
        weights: float [N], 1 on average.
        groups: int [N, k]; pairs that agree in any of k ≥ 1 columns are duplicates. None: no
            duplicates.
        targets: float [N], each pair's weight divided by the number of its duplicates, including
            itself, if they are its targets. None: they are masked.
        tile: rows and columns of a tile of logits.
        world: the processes.
        shares: number of pairs of each process.
    """

    weights: Tensor
    groups: Tensor | None
    targets: Tensor | None
    tile: int
    world: World
    shares: list[int]

    @property
    def own(self) -> slice:
        """This process's pairs."""
        first = sum(self.shares[: self.world.rank])
        return slice(first, first + self.shares[self.world.rank])


class _TiledInfoNCE(torch.autograd.Function):
    """Two passes over the tiles: one for the normalisers, one for the gradients."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, batch: _Batch) -> Tensor:
        texts = batch.world.gather(texts, batch.shares)
        logits = TiledLogits(images, texts, scale, batch)
        rows, columns, matches, highest = logits.normalisers()
        columns = batch.world.all_reduce_logsumexp(columns)
        ctx.save_for_backward(images, texts, scale, rows, columns)
        ctx.batch, ctx.in_range = batch, _in_range(highest, rows, columns)
        both_directions = batch.weights[batch.own] * (rows + columns[batch.own]) / 2
        return batch.world.add((both_directions - matches).sum() / len(texts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images, texts, scale, rows, columns = ctx.saved_tensors
        batch: _Batch = ctx.batch
        logits = TiledLogits(images, texts, scale, batch)
        of_images, of_texts = logits.gradients(rows, columns, ctx.in_range)
        of_texts = batch.world.scatter_sum(of_texts, batch.shares)
        weight = upstream / (2 * len(texts))
        of_scale = weight * (of_images * images).sum()
        return of_images.mul_(weight * scale), of_texts.mul_(weight * scale), of_scale, None


Tile = tuple[slice, slice, Tensor, Tensor | None]
"""Rows, columns, logits and a bool mask of duplicates (None if the batch has none)."""


@dataclass(frozen=True)
class TiledLogits:
    """Logits of this process's n images, the rows, and all N captions, the columns.

    Attributes:
        images: float [n, dim].
        texts: float [N, dim].
        scale: float [].
        batch: weights, groups and targets of the N pairs.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor
    batch: _Batch

    def normalisers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logsumexp of the rows and of the columns, and the matching logits.

        Returns:
            logsumexp of the rows, float [n], and of the columns, float [N]; the weighted mean logit
            of each row's targets, float [n]; the largest logit, float [].
        """
        targets, own = self.batch.targets, self.batch.own
        rows = self.images.new_full((len(self.images),), -math.inf)
        columns = self.images.new_full((len(self.texts),), -math.inf)
        highest, matches = rows.new_full((), -math.inf), torch.zeros_like(rows)
        for i, j, logits, same in self._tiles():
            if targets is not None and same is not None:
                matching = torch.where(same, logits, 0)
                to_text = targets[own][i] * matching.sum(dim=1)
                matches[i] += (to_text + matching @ targets[j]) / 2
            # Relative to the tile's maximum, one exponential serves both rows and columns.
            peak = logits.max()
            highest = torch.maximum(highest, peak)
            exponentials = logits.sub_(peak).exp_()
            rows[i] = torch.logaddexp(rows[i], exponentials.sum(dim=1).log_() + peak)
            columns[j] = torch.logaddexp(columns[j], exponentials.sum(dim=0).log_() + peak)
        if not _in_range(highest, rows, columns):
            rows, columns = self._exact_normalisers()
        if targets is None:
            products = (self.images * self.texts[own]).sum(dim=1)
            matches = self.batch.weights[own] * (self.scale * products)
        return rows, columns, matches, highest

    def _exact_normalisers(self) -> tuple[Tensor, Tensor]:
        """The normalisers if exponentials underflow relative to the maximum of a tile."""
        rows = self.images.new_full((len(self.images),), -math.inf)
        columns = self.images.new_full((len(self.texts),), -math.inf)
        for i, j, logits, _ in self._tiles():
            rows[i] = torch.logaddexp(rows[i], logits.logsumexp(dim=1))
            columns[j] = torch.logaddexp(columns[j], logits.logsumexp(dim=0))
        return rows, columns

    def gradients(self, rows: Tensor, columns: Tensor, in_range: bool) -> tuple[Tensor, Tensor]:
        """Gradients of the loss with respect to the vectors, without the factor scale / (2 N).

        Args:
            rows: the rows' normalisers, float [n].
            columns: the columns' normalisers over all processes, float [N].
            in_range: whether one exponential per logit is enough in every tile.

        Returns:
            for the images, float [n, dim], and for all captions, float [N, dim].
        """
        targets, own = self.batch.targets, self.batch.own
        weights = self.batch.weights[own]
        of_images, of_texts = torch.zeros_like(self.images), torch.zeros_like(self.texts)
        for i, j, logits, same in self._tiles():
            of_logits = _weighted_softmaxes(
                logits, rows[i], columns[j], weights[i], self.batch.weights[j], in_range
            )
            if targets is not None and same is not None:
                of_targets = targets[own][i, None] + targets[None, j]
                of_logits -= of_targets.masked_fill_(~same, 0)
            of_images[i].addmm_(of_logits, self.texts[j])
            of_texts[j].addmm_(of_logits.T, self.images[i])
        if targets is None:
            # Each pair is a target in both directions.
            of_images.addcmul_(weights[:, None], self.texts[own], value=-2)
            of_texts[own].addcmul_(weights[:, None], self.images, value=-2)
        return of_images, of_texts

    def _tiles(self) -> Iterator[Tile]:
        """All tiles; the logits of masked duplicates are minus infinity."""
        size, first = self.batch.tile, self.batch.own.start
        for row in range(0, len(self.images), size):
            i = slice(row, row + size)
            scaled = self.images[i] * self.scale
            for column in range(0, len(self.texts), size):
                j = slice(column, column + size)
                logits = scaled @ self.texts[j].T
                same = self._duplicates(i, j)
                if same is not None and self.batch.targets is None:
                    same.diagonal(first + row - column).fill_(False)
                    logits.masked_fill_(same, -math.inf)
                yield i, j, logits, same

    def _duplicates(self, i: slice, j: slice) -> Tensor | None:
        """Which rows and columns are duplicates, each pair of itself too: bool [rows, columns]."""
        if self.batch.groups is None:
            return None
        one, *more = self.batch.groups.T
        same: Tensor = one[self.batch.own][i, None] == one[None, j]
        for other in more:
            same |= other[self.batch.own][i, None] == other[None, j]
        return same


def _in_range(highest: Tensor, rows: Tensor, columns: Tensor) -> bool:
    """Whether exponentials of all logits, relative to one level, are in the range of a float.

    Args:
        highest: the largest logit, float [].
        rows: the rows' normalisers, float [n].
        columns: the columns' normalisers, float [N].
    """
    # The margin leaves room for factors. Called once per pass, because it waits for the GPU.
    room = 0.8 * math.log(torch.finfo(rows.dtype).max)
    return bool(highest - torch.cat([rows, columns]).min() < room)


def _weighted_softmaxes(
    logits: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    in_range: bool,
) -> Tensor:
    """The sum of the row-wise and the column-wise softmax, weighted; overwrites ``logits``."""
    if not in_range and not _in_range(logits.max(), rows, columns):
        by_row = (logits - rows[:, None]).exp_().mul_(row_weights[:, None])
        by_column = (logits - columns[None, :]).exp_().mul_(column_weights[None, :])
        return by_row.add_(by_column)
    # exp(l − r) + exp(l − c) = exp(l − s) · (exp(s − r) + exp(s − c)): one exponential per logit.
    lowest = torch.minimum(rows.min(), columns.min())
    row_factors = (lowest - rows).exp_() * row_weights
    column_factors = (lowest - columns).exp_() * column_weights
    return logits.sub_(lowest).exp_().mul_(row_factors[:, None] + column_factors[None, :])
