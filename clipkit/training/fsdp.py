"""Shard weights, gradients and optimiser state over processes, for towers too large for one GPU.

Torch's FSDP2 (Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data
Parallel"): each block's weights are gathered when it runs and dropped afterwards.
"""

import gc
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from clipkit.errors import ConfigError
from clipkit.models.dual_encoder import DualEncoder
from clipkit.models.transformer import PACKED, offer_packed
from clipkit.training.distributed import World

METHODS = ("encode_images", "encode_tokens", PACKED)
"""Methods of a network or its blocks that, like ``forward``, gather the weights first."""


def shard(network: DualEncoder, world: World) -> None:
    """Shard a network's weights over the processes, block by block, in place.

    Args:
        network: on its device, with the same weights in every process.
        world: the processes.

    Raises:
        ConfigError: torch is too old.
    """
    try:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError:
        raise ConfigError(
            f"train.fsdp needs torch 2.7 or newer, this is {torch.__version__}; upgrade it, or "
            "leave train.fsdp out"
        ) from None
    mesh = init_device_mesh(world.device.type, (world.size,))
    world.leaving.callback(_leave_group, mesh)
    offer_packed(network)
    blocks = list(_blocks(network))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # The temperature is a scalar, which cannot be sharded, and the loss needs it.
    numbers = {parameter for parameter in network.parameters() if not parameter.ndim}
    fully_shard(network, mesh=mesh, ignored_params=numbers)
    for module in (*blocks, network):
        for name in METHODS:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)


def _leave_group(mesh: DeviceMesh) -> None:
    """Release the process group, whose threads end only when nothing references it.

    A thread that still runs when the interpreter exits, and releases a tensor at that moment,
    crashes the process ("terminate called without an active exception").
    """
    # Torch caches meshes, and a mesh references the group.
    getattr(mesh, "_pg_registry", {}).clear()
    gc.collect()  # sharded modules are reference cycles that include the group


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a network: outermost members of its module lists that have parameters."""
    for child in module.children():
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        if listed and next(child.parameters(), None) is not None:
            yield child
        else:
            yield from _blocks(child)


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is sharded over the processes."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; a collective operation, so all processes must call it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def whole_state(state: Any) -> Any:
    """Nested dictionaries and lists with all tensors whole; sharded ones move to the CPU."""
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value) for value in state]
    return whole(state).cpu() if isinstance(state, Tensor) and is_shard(state) else state


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """Shard a whole tensor like ``example``; unchanged if ``example`` is not sharded."""
    if not is_shard(example) or tensor.shape != example.shape:
        return tensor
    mesh = example.device_mesh
    return distribute_tensor(
        tensor.to(mesh.device_type), mesh, example.placements, src_data_rank=None
    )


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load the whole weights of a checkpoint into a network, sharded or not."""
    current = network.state_dict()
    network.load_state_dict(
        {name: like(t, current[name]) if name in current else t for name, t in weights.items()}
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the whole optimiser state of a checkpoint, for sharded weights or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        number: {
            name: like(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": sharded})
