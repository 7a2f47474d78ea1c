"""Captions with random tokens left out, so that a text tower cannot learn them by heart."""

import torch
from torch import Tensor


def drop_tokens(tokens: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Leave each token of each caption out with the same probability; what stays moves up.

    Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods for Text
    Classification", section 4 ("word dropout").

    Args:
        tokens: int64 [n, 77]; start and end tokens always stay.
        share: the probability, in [0, 1].
        generator: the source of randomness.

    Returns:
        int64 [n, 77].
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    ends = tokens.argmax(dim=1, keepdim=True)  # the end token has the largest id
    drawn = torch.rand(tokens.shape, generator=generator).to(tokens.device) < share
    kept = ~(drawn & (places > 0) & (places < ends)) & (places <= ends)
    order = (~kept).int().argsort(dim=1, stable=True)
    return tokens.gather(1, order) * (places < kept.sum(dim=1, keepdim=True))
