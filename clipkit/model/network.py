"""The dual encoder: open_clip's two towers as one module that returns unit vectors."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipkit.model.tokenizer import CONTEXT, VOCAB

HALVED = 64
"""Captions from which on the shorter half is encoded apart; fewer gain nothing."""
PLAIN_ATTENTION = 32
"""Longest captions, in tokens, for which plain attention is faster on a CPU."""


class DualEncoder(nn.Module):
    """Images and tokens to unit vectors, and the scale of their products.

    Args:
        clip: open_clip's ``CLIP`` or ``CustomTextCLIP`` with CLIP's own text tower.
        precision: ``"bf16"`` runs the towers under autocast; weights and outputs stay float32.
    """

    clip: Any  # its attributes are open_clip's, which has no types

    def __init__(self, clip: nn.Module, precision: str = "fp32") -> None:
        super().__init__()
        self.clip = clip
        self.precision = precision

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode a batch of pairs.

        Args:
            images: float32 [n, 3, height, width], normalised.
            tokens: int64 [n, 77].

        Returns:
            image vectors and caption vectors, float32 [n, dim], rows of unit length, and the
            logit scale, float32 [].
        """
        return self.encode_images(images), self.encode_tokens(tokens), self.scale

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, float32 []."""
        scale: Tensor = self.clip.logit_scale
        return scale.exp().reshape(())

    def encode_images(self, images: Tensor) -> Tensor:
        """float32 [n, 3, height, width] to unit vectors, float32 [n, dim]."""
        with self._autocast(images.device):
            features = self.clip.visual(images)
        return F.normalize(features.float(), dim=-1)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """int64 [n, 77] to unit vectors, float32 [n, dim].

        Runs only up to the end of the longest caption, the shorter half of a large batch apart,
        which changes nothing: attention is causal and the end token is what is read out, so
        nothing after it is ever seen.
        """
        text = getattr(self.clip, "text", self.clip)
        with self._autocast(tokens.device):
            if is_trimmable(text):
                features = _encode_by_length(text, tokens)
            else:
                features = self.clip.encode_text(tokens)
        return F.normalize(features.float(), dim=-1)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


def is_trimmable(text: nn.Module) -> bool:
    """Whether a text tower sees nothing behind the end token: causal, read out at that token."""
    pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
    return (
        pool in ("argmax", "eos")
        and getattr(text, "attn_mask", None) is not None
        and getattr(text, "cls_emb", None) is None
    )


def _encode_by_length(text: Any, tokens: Tensor) -> Tensor:
    # The end token has the largest id, and the first one counts, as in CLIP. Counting what is not
    # padding would be wrong: 0 is also the id of "!".
    ends = tokens.argmax(dim=1)
    order = ends.argsort(stable=True)
    halves = order.chunk(2) if len(order) >= HALVED else (order,)
    features = torch.cat([_encode_trimmed(text, tokens[half], ends[half]) for half in halves])
    return features[order.argsort()]


def _encode_trimmed(text: Any, tokens: Tensor, ends: Tensor) -> Tensor:
    """The text tower of open_clip on the first positions only: int64 [n, l] to [n, dim]."""
    length = int(ends.max()) + 1 if len(ends) else 1
    tokens = tokens[:, :length]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    with nullcontext() if text.transformer.grad_checkpointing else _attention(x.device, length):
        x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
    x = text.ln_final(x[torch.arange(len(x), device=x.device), ends])
    projection = text.text_projection
    if projection is None:
        return x  # type: ignore[no-any-return]
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection  # type: ignore[no-any-return]


def _attention(device: torch.device, length: int) -> AbstractContextManager[Any]:
    """Plain attention for short captions on a CPU, where the fused kernel is slower.

    A training step of a text tower of width 192 on 256 captions of up to 16 tokens, bf16, two
    cores: 0.27 s fused, 0.17 s plain.
    """
    plain = device.type == "cpu" and length <= PLAIN_ATTENTION
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def is_convolutional(clip: Any) -> bool:
    """Whether the image tower is a convolutional network, which runs faster channels-last."""
    # A vision transformer has one convolution, its patch embedding.
    return sum(isinstance(m, nn.Conv2d) for m in clip.visual.modules()) > 4


def why_unsuitable(text_config: dict[str, Any]) -> str | None:
    """Why a text tower cannot take CLIP's 77 tokens; None if it can.

    Args:
        text_config: open_clip's ``text_cfg``.
    """
    context = text_config.get("context_length", CONTEXT)
    vocabulary = text_config.get("vocab_size", VOCAB)
    if text_config.get("hf_model_name"):
        return f"its text tower is the Hugging Face model {text_config['hf_model_name']}"
    if text_config.get("hf_tokenizer_name"):
        return f"its tokenizer is {text_config['hf_tokenizer_name']}"
    if context != CONTEXT:
        return f"its context is {context} tokens, CLIP's is {CONTEXT}"
    if vocabulary != VOCAB:
        return f"its vocabulary has {vocabulary} entries, CLIP's has {VOCAB}"
    if text_config.get("tokenizer_kwargs", {}).get("clean", "lower") != "lower":
        return f"it cleans text by {text_config['tokenizer_kwargs']['clean']!r}, CLIP by 'lower'"
    return None


def activations(clip: nn.Module) -> list[str]:
    """Names of the activation functions in use, sorted."""
    found = {type(module).__name__ for module in clip.modules()}
    return sorted(name for name in found if _is_activation(name))


def _is_activation(name: str) -> bool:
    return any(
        part in name.lower() for part in ("gelu", "relu", "silu", "swish", "sigmoid", "tanh")
    )


def heads(modules: Iterable[nn.Module]) -> list[int]:
    """Attention heads of each layer, in order: they shape the result but not the weights."""
    found = (getattr(module, "num_heads", None) for module in modules)
    return [count for count in found if isinstance(count, int)]
