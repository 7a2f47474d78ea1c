"""The logits of a batch, walked through tile by tile: no matrix of all pairs is ever held.

Symmetric InfoNCE, the contrastive loss of CLIP, without a matrix of all pairs in memory.

Which pairs of a batch say the same: those with the same image or the same caption.
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
from clipkit.training.distributed import ALONE, World

Part = tuple[slice, slice, Tensor, Tensor | None]
"""Rows, columns, their logits, and where the two are duplicates (None if nowhere)."""


@dataclass(frozen=True)
class Sweep:
    """Logits of n images, the rows, and N captions, the columns.

    Attributes:
        images: float [n, dim].
        texts: float [N, dim]; those of a whole batch, of which the images may be a part.
        scale: float [].
        first: the column of row 0's own caption; row i's own is ``first + i``.
        mass: float [N], what each pair counts for; 1 on average.
        groups: int [N, k]; pairs that agree in any of k ≥ 1 columns are duplicates; None: none are.
        targets: float [N], ``mass`` over how many duplicates a pair has, itself counted, where they
            are its targets; None where they are left out instead.
        tile: rows and columns held at a time.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor
    first: int
    mass: Tensor
    groups: Tensor | None
    targets: Tensor | None
    tile: int

    @property
    def own(self) -> slice:
        """The columns of the rows' own captions."""
        return slice(self.first, self.first + len(self.images))

    def normalisers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logarithms of the sums of exponentials of the logits, and what is counted as matched.

        Returns:
            of the rows, float [n]; of the columns, float [N]; the logits of each row's targets,
            each times its share, float [n]; the largest logit, float [].
        """
        rows = self.images.new_full((len(self.images),), -math.inf)
        columns = self.images.new_full((len(self.texts),), -math.inf)
        highest, matches = rows.new_full((), -math.inf), torch.zeros_like(rows)
        for i, j, logits, same in self._parts():
            if self.targets is not None and same is not None:
                matched = torch.where(same, logits, 0)
                to_text = self.targets[self.own][i] * matched.sum(dim=1)
                matches[i] += (to_text + matched @ self.targets[j]) / 2
            # One exponential serves rows and columns if both are measured from the tile's peak.
            peak = logits.max()
            highest = torch.maximum(highest, peak)
            exponentials = logits.sub_(peak).exp_()
            rows[i] = torch.logaddexp(rows[i], exponentials.sum(dim=1).log_() + peak)
            columns[j] = torch.logaddexp(columns[j], exponentials.sum(dim=0).log_() + peak)
        if not is_narrow(highest, rows, columns):
            rows, columns = self._careful_normalisers()
        if self.targets is None:
            products = (self.images * self.texts[self.own]).sum(dim=1)
            matches = self.mass[self.own] * (self.scale * products)
        return rows, columns, matches, highest

    def _careful_normalisers(self) -> tuple[Tensor, Tensor]:
        """The same for rows so far below the peak that their exponentials vanish beside it."""
        rows = self.images.new_full((len(self.images),), -math.inf)
        columns = self.images.new_full((len(self.texts),), -math.inf)
        for i, j, logits, _ in self._parts():
            rows[i] = torch.logaddexp(rows[i], logits.logsumexp(dim=1))
            columns[j] = torch.logaddexp(columns[j], logits.logsumexp(dim=0))
        return rows, columns

    def gradients(self, rows: Tensor, columns: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
        """Sums of the other side's vectors, each by its share less its target, both ways at once.

        Args:
            rows: the normalisers, float [n].
            columns: the normalisers, over the rows of all processes, float [N].
            narrow: whether one exponential a logit is enough everywhere.

        Returns:
            for the images, float [n, dim], and for all captions, float [N, dim].
        """
        of_images, of_texts = torch.zeros_like(self.images), torch.zeros_like(self.texts)
        mass = self.mass[self.own]
        for i, j, logits, same in self._parts():
            parts = _shares(logits, rows[i], columns[j], mass[i], self.mass[j], narrow)
            if self.targets is not None and same is not None:
                wanted = self.targets[self.own][i, None] + self.targets[None, j]
                parts -= wanted.masked_fill_(~same, 0)
            of_images[i].addmm_(parts, self.texts[j])
            of_texts[j].addmm_(parts.T, self.images[i])
        if self.targets is None:
            # The matches are counted once in each direction.
            of_images.addcmul_(mass[:, None], self.texts[self.own], value=-2)
            of_texts[self.own].addcmul_(mass[:, None], self.images, value=-2)
        return of_images, of_texts

    def _parts(self) -> Iterator[Part]:
        for row in range(0, len(self.images), self.tile):
            i = slice(row, row + self.tile)
            scaled = self.images[i] * self.scale
            for column in range(0, len(self.texts), self.tile):
                j = slice(column, column + self.tile)
                logits = scaled @ self.texts[j].T
                same = self._duplicates(i, j)
                if same is not None and self.targets is None:
                    same.diagonal(self.first + row - column).fill_(False)
                    logits.masked_fill_(same, -math.inf)
                yield i, j, logits, same

    def _duplicates(self, i: slice, j: slice) -> Tensor | None:
        """Where rows and columns are duplicates, themselves counted: bool [rows, columns]."""
        if self.groups is None:
            return None
        one, *more = self.groups.T
        same: Tensor = one[self.own][i, None] == one[None, j]
        for other in more:
            same |= other[self.own][i, None] == other[None, j]
        return same


def is_narrow(highest: Tensor, rows: Tensor, columns: Tensor) -> bool:
    """Whether the exponentials of all logits fit one float when measured from one level.

    Args:
        highest: the largest logit, float [].
        rows: the rows' normalisers, float [n].
        columns: the columns' normalisers, float [N].
    """
    # With a margin, for factors that multiply them. Asked once in a pass: on a GPU it waits.
    room = 0.8 * math.log(torch.finfo(rows.dtype).max)
    return bool(highest - torch.cat([rows, columns]).min() < room)


def _shares(
    logits: Tensor, rows: Tensor, columns: Tensor, of_rows: Tensor, of_columns: Tensor, narrow: bool
) -> Tensor:
    """Softmax along the rows plus softmax along the columns, each by its mass; overwrites."""
    if not narrow and not is_narrow(logits.max(), rows, columns):
        along_rows = (logits - rows[:, None]).exp_().mul_(of_rows[:, None])
        return along_rows.add_((logits - columns[None, :]).exp_().mul_(of_columns[None, :]))
    # exp(l − r) + exp(l − c) = exp(l − s) · (exp(s − r) + exp(s − c)): one exponential a logit.
    lowest = torch.minimum(rows.min(), columns.min())
    of_rows, of_columns = (lowest - rows).exp_() * of_rows, (lowest - columns).exp_() * of_columns
    return logits.sub_(lowest).exp_().mul_(of_rows[:, None] + of_columns[None, :])


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


def chance_loss(
    groups: Tensor,
    *,
    weights: Tensor | None = None,
    duplicates: Literal["mask", "positive", "ignore"] = "mask",
    world: World = ALONE,
) -> float:
    """``info_nce`` of a uniform predictor, whose logits are all equal.

    Each pair has as many candidates as are not masked for it. The number of targets does not
    matter, because the mean of equal logarithms is the same. Arguments as for ``info_nce``, on the
    CPU.
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
        columns = batch.world.all_reduce_logsumexp(columns)
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


def pair_groups(keys: Sequence[str], tokens: Tensor) -> Tensor:
    """Hashes of images and captions, equal in every process: int64 [n, 2].

    Two pairs are duplicates where they agree in either column: then one's caption is known to be
    right for the other's image. That is not carried on: if a and b share a caption, and b and c an
    image, nobody has said that a's image shows what c's caption tells.

    Args:
        keys: of the n images; the same key is the same image.
        tokens: int64 [n, 77], of their captions.
    """
    return torch.stack([image_groups(keys), caption_groups(tokens)], dim=1)


def image_groups(keys: Sequence[str]) -> Tensor:
    """64-bit hashes of keys, int64 [n]."""
    digests = (blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest() for key in keys)
    numbers = [int.from_bytes(digest, "big", signed=True) for digest in digests]
    return torch.tensor(numbers, dtype=torch.int64)


def caption_groups(tokens: Tensor) -> Tensor:
    """64-bit hashes of captions, int64 [n]; what punctuation stands at their end does not count.

    Case, spacing, HTML and damaged Unicode are gone already: the tokenizer sees to that.

    Args:
        tokens: int64 [n, 77].
    """
    positions = torch.arange(CONTEXT)
    inside = positions < tokens.argmax(dim=1, keepdim=True)  # the end token has the largest id
    words = inside & ~_endings()[tokens]
    last = (words * positions).amax(dim=1, keepdim=True)
    return ((tokens + 1) * (positions <= last) * _factors()).sum(dim=1)


@cache
def _endings() -> Tensor:
    """Whether a token may end a sentence: bool [vocabulary]."""
    pieces = (piece.removesuffix(WORD_END.encode()) for piece in vocabulary().pieces)
    return torch.tensor([bool(piece) and not piece.strip(b".!?;:,") for piece in pieces])


@cache
def _factors() -> Tensor:
    """An odd factor for each position: int64 [77].

    Sums of products with random factors, modulo 2**64, are a universal hash: two captions collide
    with a probability of at most 2**-48, whatever they say, for ids differ by less than 2**16.
    """
    generator = torch.Generator().manual_seed(77)
    return 2 * torch.randint(-(2**62), 2**62, (CONTEXT,), generator=generator) + 1
