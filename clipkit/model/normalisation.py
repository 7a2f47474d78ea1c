"""Batch normalisation over a batch that several processes share."""

from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from clipkit.model.distributed import World


def share_statistics(network: nn.Module, world: World) -> None:
    """Let batch normalisation see the pairs of all processes, in place, where torch can.

    It can on GPUs. On CPUs each process normalises by its own share of the batch, which differs
    from what one process does with the whole; the running statistics saved are the first one's.

    Args:
        network: with any layers.
        world: the processes.
    """
    if world.size > 1 and world.device.type == "cuda":
        for name, child in network.named_children():
            setattr(network, name, convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
