"""Note where the text tower of a loaded model lies, for queries that need no more than it."""

from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from safetensors import SafetensorError, safe_open
from torch import nn

from clipkit.manifest import ModelRef
from clipkit.model.known import EPSILON, KnownTower, note, recall, stamp
from clipkit.model.transformer import runs_text_tower

_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")


def remember(model: ModelRef, clip: Any, file: Path) -> None:
    """Keep a note of the file, if it holds the text tower's weights as they were loaded.

    Args:
        model: which model it is, its fingerprint of all weights just computed.
        clip: open_clip's model, as loaded.
        file: of its weights.
    """
    text = getattr(clip, "text", clip)
    if file.suffix != ".safetensors" or not runs_text_tower(text) or recall(model):
        return
    blocks = text.transformer.resblocks
    activations = {_activation(block.mlp.gelu) for block in blocks}
    heads = {block.attn.num_heads for block in blocks}
    norms = [m for m in (*blocks.modules(), text.ln_final) if isinstance(m, nn.LayerNorm)]
    plain = None not in activations and all(norm.eps == EPSILON for norm in norms)
    if not plain or len(activations) != 1 or len(heads) != 1:
        return
    try:
        before = stamp(file)
        prefix = _prefix(text, file)
        unchanged = stamp(file) == before
    except (OSError, SafetensorError):
        return
    if prefix is not None and unchanged:
        activation = str(activations.pop())
        note(
            model,
            KnownTower(str(file), before, prefix, heads.pop(), len(blocks), activation),
        )


def _activation(module: nn.Module) -> str | None:
    if type(module) is QuickGELU:
        return "quick_gelu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


def _prefix(text: nn.Module, file: Path) -> str | None:
    """What stands before the names of the tower's weights in a file; None where others do."""
    wanted = {
        name: tensor
        for name, tensor in text.state_dict().items()
        if name.partition(".")[0] in _PARTS
    }
    with safe_open(file, "pt") as held:
        names = set(held.keys())
        for prefix in ("", "text."):
            if all(prefix + name in names for name in wanted):
                equal = all(_equal(held.get_tensor(prefix + n), t) for n, t in wanted.items())
                return prefix if equal else None
    return None


def _equal(held: torch.Tensor, loaded: torch.Tensor) -> bool:
    # Types that numpy knows.
    return held.dtype in (torch.float32, torch.float16) and torch.equal(held.float(), loaded)
