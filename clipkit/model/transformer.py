"""open_clip's transformer towers, run with less work: the same function of the same weights.

Captions are laid end to end without padding, attention is causal and the end token alone is read
out; so nothing behind it is computed. The last block computes only what is read out: of an image
its class token. The patch embedding is one matrix product. What remains runs in the tower's
``dtype``, sums between blocks and norms in float32.
"""

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipkit.model.packing import Packing, Part, spread, take
from clipkit.model.transfer import send

PACKED = "run_packed"
"""Method of a block to be called for its packed pass, where ``offer_packed`` has given it one."""


def runs_image_tower(visual: nn.Module) -> bool:
    """Whether ``encode_images`` can stand in for an image tower's own forward pass."""
    return (
        type(visual) is VisionTransformer
        and visual.attn_pool is None
        and visual.pool_type in ("tok", "avg")
        and _runs(visual.transformer)
    )


def runs_text_tower(text: nn.Module) -> bool:
    """Whether ``encode_tokens`` can stand in for a text tower's own forward pass.

    It can where nothing behind the end token is seen: causal attention, read out at that token.
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
    """The image tower: float32 [n, 3, height, width] to float32 [n, dim], not yet of unit length.

    Args:
        visual: open_clip's ``VisionTransformer``.
        images: normalised; fastest with channels last in memory.
        dtype: of the matrix products.
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
    """The text tower: int64 [n, 77] to float32 [n, dim], not yet of unit length.

    Args:
        text: open_clip's ``TextTransformer``, or a ``CLIP``, which holds the same parts.
        tokens: captions with their end tokens, best on the CPU.
        dtype: of the matrix products.
    """
    # Lengths and places are worked out on the CPU: to ask a GPU is to wait for all that it does.
    device, tokens = text.positional_embedding.device, tokens.cpu()
    lengths, order = _lengths(tokens).sort(stable=True)
    packing = Packing.of(lengths.tolist(), device)
    kept = torch.arange(tokens.shape[1]) < lengths[:, None]
    encoded = _encode_packed(text, send(tokens[order][kept], device), packing, dtype)
    return encoded[send(order.argsort(), device)]


def encode_padded(text: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in a form that a compiler can keep: shapes depend on the batch's shape alone.

    Args:
        text: as above.
        tokens: int64 [n, length], cut behind the end of the longest caption or later.
        dtype: as above.
    """
    packing = Packing.padded(_lengths(tokens), tokens.shape[1])
    return _encode_packed(text, tokens.flatten(), packing, dtype)


def _lengths(tokens: Tensor) -> Tensor:
    # The end token has the largest id, and the first one counts, as in CLIP. Counting what is not
    # padding would be wrong: 0 is also the id of "!".
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
    """All blocks: float32 [tokens, width] to the same, or to [len(read), width] of those read."""
    last = len(transformer.resblocks) - 1
    again = transformer.grad_checkpointing and torch.is_grad_enabled()
    for number, block in enumerate(transformer.resblocks):
        run = getattr(block, PACKED, None) or partial(_run, block)
        x = run(x, packing, dtype, read if number == last else None, causal, again)
    return x


def offer_packed(network: nn.Module) -> None:
    """Give every block its packed pass as a method: FSDP gathers weights when one is called."""
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
    """``_block``; if ``again``, computed once more in the backward pass instead of kept."""
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
    """One residual block: float32 [tokens, width] to the same, of the rows ``read`` if given."""
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

    That token must be one that sees the whole sequence: any without a mask, with one the last.
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
    """Attention, [n, heads, length, head width] each; on a CPU in bf16 by plain products.

    There torch's fused kernel takes its backward pass in steps of single rows: for 64 sequences of
    50 tokens and 6 heads, forward and backward, 63 ms fused, 14 ms plain on one core of an EPYC.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        length = scores.shape[-1]
        scores += scores.new_full((length, length), -torch.inf).triu_(1)
    out: Tensor = scores.softmax(dim=-1) @ v
    return out
