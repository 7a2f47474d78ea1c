"""Symmetric InfoNCE, the contrastive loss of CLIP."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(images: Tensor, texts: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE: the mean cross-entropy of each image finding its caption, and back.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
    figure 3; without ``groups`` it equals open_clip's ``ClipLoss``.

    Args:
        images: float [n, dim], rows of unit length.
        texts: float [n, dim], rows of unit length; row i belongs to image i.
        scale: float [], the inverse temperature.
        groups: int [n]; pairs of equal group say the same thing, so they are not counted as each
            other's negatives. None: all other pairs are negatives.

    Returns:
        float [].
    """
    logits = scale * images @ texts.T
    if groups is not None:
        same = groups[:, None] == groups[None, :]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def caption_groups(tokens: Tensor) -> Tensor:
    """Number equal captions alike: int64 [n, context] to int64 [n]."""
    groups: Tensor = torch.unique(tokens, dim=0, return_inverse=True)[1]
    return groups
