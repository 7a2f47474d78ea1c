"""The dual encoder: open_clip's two towers as one module that returns unit vectors."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from open_clip.utils import to_2tuple
from torch import Tensor, nn
from torch.func import functional_call

from clipkit.models import transformer
from clipkit.models.tokenizer import CONTEXT, VOCAB
from clipkit.models.transformer import send


@dataclass(frozen=True)
class LockedTower:
    """A frozen tower.

    Attributes:
        body: the frozen part, whose outputs can be cached.
        head: the trainable projection into the shared space, else the identity.
    """

    body: nn.Module
    head: nn.Module


class DualEncoder(nn.Module):
    """Images and tokens to unit vectors, with the logit scale.

    Args:
        clip: open_clip's ``CLIP`` or ``CustomTextCLIP`` with CLIP's own text tower.
        precision: ``"bf16"`` for the towers' matrix products; weights and outputs stay float32.
        locked: the towers whose body stays in evaluation mode, by "image" or "text".
        compiled: compile the towers with ``torch.compile`` for training. Evaluation, whose batch
            sizes vary, runs them uncompiled.

    Attributes:
        precisions: the precision of each tower, by "image" and "text".
        given_features: locked towers for which ``forward`` takes cached features instead of images
            or tokens.
    """

    clip: Any  # its attributes are open_clip's, which has no types

    def __init__(
        self,
        clip: nn.Module,
        precision: str = "fp32",
        locked: Mapping[str, LockedTower] = MappingProxyType({}),
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.precisions = {"image": precision, "text": precision}
        self.locked = locked
        self.given_features: frozenset[str] = frozenset()
        self.runs_images = transformer.runs_image_tower(self.clip.visual)
        self.runs_texts = transformer.runs_text_tower(getattr(clip, "text", clip))
        # Compiling functions instead of modules keeps the names in checkpoints.
        self._compiled = [
            torch.compile(project, dynamic=False)
            for project in (self._project_images, self._project_padded)
            if compiled
        ]

    def train(self, mode: bool = True) -> Self:
        """Set the mode; locked towers stay in evaluation mode."""
        super().train(mode)
        for tower in self.locked.values():
            tower.body.eval()
        return self

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode a batch of pairs.

        Args:
            images: float32 [n, 3, height, width], normalised; or their features.
            tokens: int64 [n, 77]; or their features.

        Returns:
            image vectors and caption vectors, float32 [n, dim], unit rows, and the logit scale,
            float32 [].
        """
        encoded = [
            self.encode_features(tower, given) if tower in self.given_features else encode(given)
            for tower, encode, given in (
                ("image", self.encode_images, images),
                ("text", self.encode_tokens, tokens),
            )
        ]
        return encoded[0], encoded[1], self.scale

    @property
    def precision(self) -> str:
        """The precision of the image tower, whose vectors and features are stored."""
        return self.precisions["image"]

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, float32 []."""
        scale: Tensor = self.clip.logit_scale
        return scale.reshape(()).exp()

    def encode_images(self, images: Tensor) -> Tensor:
        """float32 [n, 3, height, width] to unit vectors, float32 [n, dim]."""
        project = self._compiled[0] if self._compiled and self.training else self._project_images
        return self._unit(project(images))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """int64 [n, 77], preferably on the CPU, to unit vectors, float32 [n, dim].

        Nothing after the end tokens is computed.
        """
        if not self._compiled or not self.training:
            return self._unit(self._project_tokens(tokens))
        longest = int(tokens.argmax(dim=1).max()) + 1
        cut = tokens[:, : padded_length(longest)]
        return self._unit(self._compiled[1](send(cut, self.clip.logit_scale.device)))

    def encode_features(self, tower: str, features: Tensor) -> Tensor:
        """Features of a locked tower, float32 [n, …], to unit vectors, float32 [n, dim]."""
        with self._autocast(tower, features.device):
            return self._unit(self.locked[tower].head(features))

    @torch.no_grad()
    def features(self, tower: str, given: Tensor) -> Tensor:
        """Outputs of a locked tower's body for images or tokens, float32 [n, …]."""
        body = self.locked[tower].body
        if tower == "text":
            features = self._project_tokens(given)
        elif body is self.clip.visual:
            features = self._project_images(given)
        else:
            with self._autocast(tower, given.device):
                features = body(given)
        return features.float()

    def _project_images(self, images: Tensor) -> Tensor:
        visual = self.clip.visual
        if self.runs_images:
            return transformer.encode_images(visual, images, self._dtype("image"))
        with self._autocast("image", images.device):
            projected: Tensor = visual(images)
        return projected

    def _project_tokens(self, tokens: Tensor) -> Tensor:
        if self.runs_texts:
            text = getattr(self.clip, "text", self.clip)
            return transformer.encode_tokens(text, tokens, self._dtype("text"))
        tokens = send(tokens, self.clip.logit_scale.device)
        with self._autocast("text", tokens.device):
            projected: Tensor = self.clip.encode_text(tokens)
        return projected

    def _project_padded(self, tokens: Tensor) -> Tensor:
        if not self.runs_texts:
            return self._project_tokens(F.pad(tokens, (0, CONTEXT - tokens.shape[1])))
        text = getattr(self.clip, "text", self.clip)
        return transformer.encode_padded(text, tokens, self._dtype("text"))

    def _unit(self, projected: Tensor) -> Tensor:
        return F.normalize(projected.to(self.clip.logit_scale.dtype), dim=-1)

    def _dtype(self, tower: str) -> torch.dtype:
        """The dtype of a tower's matrix products."""
        dtype: torch.dtype = self.clip.logit_scale.dtype
        return torch.bfloat16 if self.precisions[tower] == "bf16" else dtype

    def _autocast(self, tower: str, device: torch.device) -> AbstractContextManager[Any]:
        if self.precisions[tower] != "bf16":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)


def padded_length(longest: int) -> int:
    """The padded length for a compiled tower: one of five, as each is compiled separately."""
    return min(-(-longest // 16) * 16, CONTEXT)


def is_convolutional(clip: Any) -> bool:
    """Whether the image tower is a convolutional network, which is faster in channels-last."""
    # A vision transformer has one convolution, the patch embedding.
    return sum(isinstance(m, nn.Conv2d) for m in clip.visual.modules()) > 4


def why_unsuitable(text_config: dict[str, Any]) -> str | None:
    """Why a text tower is not CLIP's, with 77 tokens; None if it is.

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


def vector_dim(clip: Any) -> int:
    """Width of the vectors of an open_clip model."""
    text = getattr(clip, "text", clip)
    projection = text.text_projection
    if projection is None:
        return int(text.ln_final.weight.shape[0])
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return int(projection.shape[1])


def why_no_vectors(clip: Any) -> str | None:
    """Why the towers do not give one vector of the same width each; None if they do.

    Unusual towers run on the meta device, which computes shapes alone, in about a second.
    """
    if _surely_gives_vectors(clip):
        return None
    height, width = to_2tuple(clip.visual.image_size)
    state = {name: value.to("meta") for name, value in clip.state_dict(keep_vars=True).items()}
    state |= {name: value.to("meta") for name, value in clip.named_buffers()}
    # Two, because batch normalisation in training mode refuses a single item.
    images = torch.empty(2, 3, height, width, device="meta")
    tokens = torch.empty(2, CONTEXT, dtype=torch.long, device="meta")
    try:
        found = functional_call(clip, state, (images, tokens))
    except (NotImplementedError, RuntimeError):  # an operation without a meta kernel
        return None
    if isinstance(found, dict):
        found = (found["image_features"], found["text_features"])
    image, text = (list(features.shape) for features in found[:2])
    if len(image) == len(text) == 2 and image == text:
        return None
    return (
        f"its towers give arrays of shape {image[1:]} for an image and {text[1:]} for a caption, "
        "expected one vector of the same width each; see pool_type and the projections in its "
        "configuration"
    )


def _surely_gives_vectors(clip: Any) -> bool:
    """Whether attributes suffice to tell that both towers give vectors of the same width."""
    text, visual = getattr(clip, "text", clip), clip.visual
    pooled = getattr(text, "pool_type", getattr(text, "text_pool_type", None)) != "none"
    if isinstance(visual, TimmModel):
        # Without a head, the trunk alone decides.
        width = getattr(getattr(visual.head, "proj", None), "out_features", None)
    else:
        width = visual.output_dim
        no_pool = getattr(visual, "pool_type", None) == "none"
        pooled = pooled and (not no_pool or visual.attn_pool is not None)
    return pooled and width == vector_dim(clip)


def activations(clip: nn.Module) -> list[str]:
    """Class names of the activation functions, sorted."""
    found = {type(module).__name__ for module in clip.modules()}
    return sorted(name for name in found if _is_activation(name))


def _is_activation(name: str) -> bool:
    return any(
        part in name.lower() for part in ("gelu", "relu", "silu", "swish", "sigmoid", "tanh")
    )


def heads(modules: Iterable[nn.Module]) -> list[int]:
    """Attention heads of each layer in order, which weights do not show."""
    found = (getattr(module, "num_heads", None) for module in modules)
    return [count for count in found if isinstance(count, int)]
