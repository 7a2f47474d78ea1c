"""Tensors from the CPU to where they are computed with."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, for which nobody waits.

    Of memory that is not pinned CUDA may first wait for all that it was given before.

    Args:
        tensor: on the CPU or the device; its order in memory is kept.
        device: where it shall be.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
