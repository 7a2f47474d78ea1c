"""The optimiser and the learning-rate schedule."""

import math

import torch
from torch import nn

from clipkit.config import OptimConfig

MAX_LOGIT_SCALE = math.log(100)
"""Clamp of the learned log scale (Radford et al. 2021, section 2.5)."""


def build_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels, never gains, biases and the temperature."""
    decayed = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2]
    spared = [p for p in network.parameters() if p.requires_grad and p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(progress: float, config: OptimConfig) -> float:
    """The rate at a share ``progress`` in [0, 1] of the run: linear warm-up, cosine to zero."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    rest = (progress - config.warmup) / max(1 - config.warmup, 1e-12)
    return config.lr * (1 + math.cos(math.pi * min(rest, 1.0))) / 2
