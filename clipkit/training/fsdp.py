"""Weights, gradients and optimiser state dealt out over processes, for towers beyond one card.

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
"""What is called on a network or its blocks beside ``forward``, and gathers weights likewise."""


def shard(network: DualEncoder, world: World) -> None:
    """Deal a network's weights out over the processes, block by block, in place.

    Args:
        network: on its device, the same in every process.
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
    # The temperature is one number, which cannot be dealt out, and the loss asks for it.
    numbers = {parameter for parameter in network.parameters() if not parameter.ndim}
    fully_shard(network, mesh=mesh, ignored_params=numbers)
    for module in (*blocks, network):
        for name in METHODS:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)


def _leave_group(mesh: DeviceMesh) -> None:
    """Let go of the group of processes, which ends its threads only when nothing holds it.

    A thread that is there when the interpreter ends, and lets go of a tensor just then, takes the
    process down ("terminate called without an active exception").
    """
    # Torch keeps meshes in caches of its own, and a mesh keeps the group.
    getattr(mesh, "_pg_registry", {}).clear()
    gc.collect()  # modules that are dealt out hold themselves, and the group


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of a network's lists of modules: its layers."""
    for child in module.children():
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        if listed and next(child.parameters(), None) is not None:
            yield child
        else:
            yield from _blocks(child)


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process holds only a part of a tensor."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; all processes must ask."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def whole_state(state: Any) -> Any:
    """Nested dictionaries and lists with every tensor whole, on the CPU where it was a shard."""
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value) for value in state]
    return whole(state).cpu() if isinstance(state, Tensor) and is_shard(state) else state


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, or of it the part that this process holds of ``example``."""
    if not is_shard(example) or tensor.shape != example.shape:
        return tensor
    mesh = example.device_mesh
    return distribute_tensor(
        tensor.to(mesh.device_type), mesh, example.placements, src_data_rank=None
    )


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Take over whole weights, as a checkpoint holds them."""
    current = network.state_dict()
    network.load_state_dict(
        {name: like(t, current[name]) if name in current else t for name, t in weights.items()}
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over the whole state of an optimiser, as a checkpoint holds it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dealt = {
        number: {
            name: like(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": dealt})
