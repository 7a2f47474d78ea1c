"""Sequences of different lengths laid end to end, and padded where attention needs it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipkit.model.transfer import send

PARTS_FROM = 64
"""Captions from which on attention pads them in parts of like length; fewer gain nothing."""
PARTS = 4
"""Parts of a batch of captions, from the shortest to the longest."""


@dataclass(frozen=True)
class Part:
    """Sequences that attention pads to one length.

    Attributes:
        count: how many.
        length: of the longest, in tokens.
        tokens: of all together.
        places: int64 [tokens], where each token stands in the padded [count · length]; None where
            all are of one length.
        valid: bool [count, 1, 1, length], which places hold a token; None where all do.
    """

    count: int
    length: int
    tokens: int
    places: Tensor | None
    valid: Tensor | None


@dataclass(frozen=True)
class Packing:
    """Sequences laid end to end.

    Attributes:
        parts: the sequences in order, in parts of like length.
        positions: int64 [tokens], the place of each token in its sequence.
        starts: int64 [n], the first token of each sequence.
        ends: int64 [n], the last token of each sequence.
    """

    parts: list[Part]
    positions: Tensor
    starts: Tensor
    ends: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Packing":
        """Lay out sequences of these lengths, which should be sorted, for a device."""
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        positions = torch.arange(sum(lengths)) - starts.repeat_interleave(sizes)
        cuts = 1 if len(lengths) < PARTS_FROM else PARTS
        share = -(-len(lengths) // cuts)
        chunks = [lengths[i : i + share] for i in range(0, len(lengths), share)]
        tokens = [sum(chunk) for chunk in chunks]
        firsts = accumulate(tokens, initial=0)
        parts = [
            _part(chunk, positions[first : first + count], device)
            for chunk, first, count in zip(chunks, firsts, tokens, strict=False)
        ]
        numbers = (positions, starts, starts + sizes - 1)
        return cls(parts, *(send(tensor, device) for tensor in numbers))

    @classmethod
    def even(cls, count: int, length: int, device: torch.device) -> "Packing":
        """Lay out ``count`` sequences of one length."""
        starts = length * torch.arange(count, device=device)
        part = Part(count, length, count * length, None, None)
        positions = torch.arange(length, device=device).repeat(count)
        return cls([part], positions, starts, starts + length - 1)

    @classmethod
    def padded(cls, lengths: Tensor, longest: int) -> "Packing":
        """Sequences that stay padded to ``longest`` tokens: int64 [n], on their device."""
        even = cls.even(len(lengths), longest, lengths.device)
        valid = even.positions.view(-1, longest) < lengths[:, None]
        part = replace(even.parts[0], valid=valid[:, None, None])
        return cls([part], even.positions, even.starts, even.starts + lengths - 1)


def _part(lengths: Sequence[int], positions: Tensor, device: torch.device) -> Part:
    count, longest, tokens = len(lengths), max(lengths), sum(lengths)
    if tokens == count * longest:
        return Part(count, longest, tokens, None, None)
    sizes = torch.tensor(lengths)
    rows = torch.arange(count).repeat_interleave(sizes)
    valid = torch.arange(longest) < sizes[:, None]
    places = send(rows * longest + positions, device)
    return Part(count, longest, tokens, places, send(valid[:, None, None], device))


class _Take(torch.autograd.Function):
    # The backward pass of torch's own index_select adds rows up one by one.

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.size = len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return upstream.new_zeros(ctx.size, upstream.shape[1]).index_copy_(0, rows, upstream), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(size, x.shape[1]).index_copy_(0, rows, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return upstream.index_select(0, rows), None, None


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of a matrix: [m, width] and int64 [t], each row at most once, to [t, width]."""
    if torch.compiler.is_compiling():  # which makes a backward pass of its own
        return x.index_select(0, rows)
    taken: Tensor = _Take.apply(x, rows)
    return taken


def spread(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """The reverse: [t, width] to [size, width] with row i at ``rows[i]`` and zeros elsewhere."""
    placed: Tensor = _Spread.apply(x, rows, size)
    return placed
