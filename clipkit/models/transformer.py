"""open_clip's transformer towers with less work: the same function of the same weights.

Captions are packed end to end without padding. Attention is causal and only the end token is read
out, so nothing after it is computed. The last block computes only the tokens that are read out,
for example the class token of an image. The patch embedding is one matrix product. Matrix products
run in the tower's ``dtype``, residual sums and norms in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device without waiting; the memory format stays the same.

    CUDA may wait for all earlier work before it copies from memory that is not pinned.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


PARTS_FROM = 64
"""From this many captions, attention pads them in parts of similar length; fewer do not gain."""
PARTS = 4
"""Parts of a batch of captions, from shortest to longest."""


@dataclass(frozen=True)
class Part:
    """Sequences that attention pads to one length.

    Attributes:
        count: number of sequences.
        length: length of the longest, in tokens.
        tokens: total number of tokens.
        places: int64 [tokens], the position of each token in the padded [count · length]; None if
            all sequences have the same length.
        valid: bool [count, 1, 1, length], which positions hold a token; None if all do.
    """

    count: int
    length: int
    tokens: int
    places: Tensor | None
    valid: Tensor | None


@dataclass(frozen=True)
class Packing:
    """Sequences packed end to end.

    Attributes:
        parts: the sequences in order, in parts of similar length.
        positions: int64 [tokens], the position of each token in its sequence.
        starts: int64 [n], the row of the first token of each sequence.
        ends: int64 [n], the row of the last token of each sequence.
    """

    parts: list[Part]
    positions: Tensor
    starts: Tensor
    ends: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Packing":
        """Pack sequences of these lengths, preferably sorted, for a device."""
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
        """Pack ``count`` sequences of one length."""
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
    # The backward pass of torch's own index_select adds rows one by one.

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
    """Gather rows: [m, width] and int64 [t] without repetitions to [t, width]."""
    if torch.compiler.is_compiling():  # the compiler derives its own backward pass
        return x.index_select(0, rows)
    taken: Tensor = _Take.apply(x, rows)
    return taken


def spread(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """Scatter rows: [t, width] to [size, width], row i at ``rows[i]`` and zeros elsewhere."""
    placed: Tensor = _Spread.apply(x, rows, size)
    return placed


PACKED = "run_packed"
"""Name of the method that ``offer_packed`` adds to blocks for their packed forward pass."""


def runs_image_tower(visual: nn.Module) -> bool:
    """Whether ``encode_images`` can replace an image tower's own forward pass."""
    return (
        type(visual) is VisionTransformer
        and visual.attn_pool is None
        and visual.pool_type in ("tok", "avg")
        and _runs(visual.transformer)
    )


def runs_text_tower(text: nn.Module) -> bool:
    """Whether ``encode_tokens`` can replace a text tower's own forward pass.

    It can if attention is causal and the end token is read out, so later tokens have no effect.
    """
    pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
    return (
        pool in ("argmax", "eos")
        and getattr(text, "attn_mask", None) is not None
        and getattr(text, "cls_emb", None) is None
        and _runs(getattr(text, "transformer", None))
    )


def _runs(transformer: Any) -> bool:
    return (
        type(transformer) is Transformer
        and transformer.batch_first
        and all(type(block) is ResidualAttentionBlock for block in transformer.resblocks)
    )


def encode_images(visual: Any, images: Tensor, dtype: torch.dtype) -> Tensor:
    """The image tower: float32 [n, 3, height, width] to float32 [n, dim], not normalised.

    Args:
        visual: open_clip's ``VisionTransformer``.
        images: normalised; fastest in channels-last.
        dtype: the dtype of the matrix products.
    """
    patches, kernel = _patches(images, visual.patch_size), visual.conv1.weight
    weight = kernel.permute(0, 2, 3, 1).reshape(len(kernel), -1)
    x = F.linear(patches.to(dtype), weight.to(dtype)).to(visual.positional_embedding.dtype)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = visual.ln_pre(visual.patch_dropout(x + visual.positional_embedding))
    n, length, width = x.shape
    packing = Packing.even(n, length, x.device)
    first = packing.starts if visual.pool_type == "tok" else None
    x = _transform(visual.transformer, x.reshape(-1, width), packing, dtype, read=first)
    pooled: Tensor = visual._pool(x.view(n, -1, width))[0]
    return pooled if visual.proj is None else pooled @ visual.proj


def _patches(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[n, channels, height, width] to [n, patches, size · size · channels], row by row."""
    n, channels, height, width = images.shape
    rows, columns = height // size[0], width // size[1]
    images = images[..., : rows * size[0], : columns * size[1]].permute(0, 2, 3, 1)
    cut = images.reshape(n, rows, size[0], columns, size[1], channels).transpose(2, 3)
    return cut.reshape(n, rows * columns, size[0] * size[1] * channels)


def encode_tokens(text: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The text tower: int64 [n, 77] to float32 [n, dim], not normalised.

    Args:
        text: open_clip's ``TextTransformer``, or a ``CLIP``, which holds the same parts.
        tokens: captions with their end tokens, preferably on the CPU.
        dtype: the dtype of the matrix products.
    """
    # Lengths and positions are computed on the CPU: reading them from a GPU would synchronise.
    device, tokens = text.positional_embedding.device, tokens.cpu()
    lengths, order = _lengths(tokens).sort(stable=True)
    packing = Packing.of(lengths.tolist(), device)
    kept = torch.arange(tokens.shape[1]) < lengths[:, None]
    encoded = _encode_packed(text, send(tokens[order][kept], device), packing, dtype)
    return encoded[send(order.argsort(), device)]


def encode_padded(text: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """``encode_tokens`` for a compiler: shapes depend only on the shape of the batch.

    Args:
        text: as in ``encode_tokens``.
        tokens: int64 [n, length], where ``length`` includes every end token.
        dtype: as in ``encode_tokens``.
    """
    packing = Packing.padded(_lengths(tokens), tokens.shape[1])
    return _encode_packed(text, tokens.flatten(), packing, dtype)


def _lengths(tokens: Tensor) -> Tensor:
    # The end token has the largest id, and the first one counts, as in CLIP. Counting non-zero ids
    # would be wrong: 0 is also the id of "!".
    return tokens.argmax(dim=1) + 1


def _encode_packed(text: Any, ids: Tensor, packing: Packing, dtype: torch.dtype) -> Tensor:
    words: Tensor = text.token_embedding(ids)
    x = words + F.embedding(packing.positions, text.positional_embedding)
    x = _transform(text.transformer, x, packing, dtype, read=packing.ends, causal=True)
    x = text.ln_final(x)
    projection = text.text_projection
    if isinstance(projection, nn.Linear):
        return cast(Tensor, projection(x))
    return x if projection is None else cast(Tensor, x @ projection)


def _transform(
    transformer: Any,
    x: Tensor,
    packing: Packing,
    dtype: torch.dtype,
    read: Tensor | None,
    causal: bool = False,
) -> Tensor:
    """All blocks: float32 [tokens, width] to the same, or to [len(read), width] with ``read``."""
    last = len(transformer.resblocks) - 1
    again = transformer.grad_checkpointing and torch.is_grad_enabled()
    for number, block in enumerate(transformer.resblocks):
        run = getattr(block, PACKED, None) or partial(_run, block)
        x = run(x, packing, dtype, read if number == last else None, causal, again)
    return x


def offer_packed(network: nn.Module) -> None:
    """Add the packed forward pass to every block as a method, before which FSDP gathers weights."""
    for module in network.modules():
        if type(module) is ResidualAttentionBlock:
            setattr(module, PACKED, MethodType(_run, module))


def _run(
    block: Any,
    x: Tensor,
    packing: Packing,
    dtype: torch.dtype,
    read: Tensor | None,
    causal: bool,
    again: bool,
) -> Tensor:
    """``_block``, with gradient checkpointing if ``again``."""
    if not again:
        return _block(block, x, packing, dtype, read, causal)
    return checkpoint(_block, block, x, packing, dtype, read, causal, use_reentrant=False)


def _block(
    block: Any,
    x: Tensor,
    packing: Packing,
    dtype: torch.dtype,
    read: Tensor | None,
    causal: bool,
) -> Tensor:
    """One residual block: float32 [tokens, width] to the same, or only the rows ``read``."""
    attention, width = block.attn, x.shape[1]
    weight, bias = attention.in_proj_weight.to(dtype), attention.in_proj_bias.to(dtype)
    heads = attention.num_heads
    h = block.ln_1(x).to(dtype)
    if read is None:
        attended = _attend(F.linear(h, weight, bias), packing, heads, causal)
    else:
        x = take(x, read)
        queries = F.linear(take(h, read), weight[:width], bias[:width])
        keys_values = F.linear(h, weight[width:], bias[width:])
        attended = _attend_from(queries, keys_values, packing, heads)
    x = x + block.ls_1(_linear(attention.out_proj, attended))
    h = block.mlp.gelu(_linear(block.mlp.c_fc, block.ln_2(x).to(dtype)))
    out: Tensor = x + block.ls_2(_linear(block.mlp.c_proj, h))
    return out


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _attend(qkv: Tensor, packing: Packing, heads: int, causal: bool) -> Tensor:
    """Self-attention of each sequence: [tokens, 3 · width] to [tokens, width]."""
    outs = []
    for part, rows in zip(packing.parts, _split(qkv, packing), strict=True):
        q, k, v = _heads(rows, part, 3, heads)
        out = _attention(q, k, v, causal).transpose(1, 2).flatten(0, 1).flatten(1)
        outs.append(out if part.places is None else take(out, part.places))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_from(queries: Tensor, keys_values: Tensor, packing: Packing, heads: int) -> Tensor:
    """Attention of one token of each sequence to all of it: [n, width] to [n, width].

    The token must see the whole sequence: any token without a mask, the last one with it.
    """
    outs = []
    counts = [part.count for part in packing.parts]
    of_queries = torch.split(queries, counts)
    for part, q, rows in zip(packing.parts, of_queries, _split(keys_values, packing), strict=True):
        k, v = _heads(rows, part, 2, heads)
        q = q.view(part.count, 1, heads, -1).transpose(1, 2)
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=part.valid).flatten(1))
    return torch.cat(outs)


def _split(x: Tensor, packing: Packing) -> Sequence[Tensor]:
    return torch.split(x, [part.tokens for part in packing.parts])


def _heads(rows: Tensor, part: Part, kinds: int, heads: int) -> tuple[Tensor, ...]:
    """[tokens, kinds · width], padded, as ``kinds`` tensors [count, heads, length, head width]."""
    if part.places is not None:
        rows = spread(rows, part.places, part.count * part.length)
    parted = rows.view(part.count, part.length, kinds, heads, -1)
    return torch.unbind(parted.permute(2, 0, 3, 1, 4))


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of [n, heads, length, head width]; plain matrix products in bf16 on a CPU.

    The backward pass of torch's fused CPU kernel works row by row: 64 sequences of 50 tokens with 6
    heads take 63 ms fused and 14 ms plain, forward and backward, on one core of an EPYC.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        length = scores.shape[-1]
        scores += scores.new_full((length, length), -torch.inf).triu_(1)
    out: Tensor = scores.softmax(dim=-1) @ v
    return out
