"""Sharding of weights, gradients and optimiser state of what learns, by PyTorch's FSDP2.

Parameters are DTensors between steps. Checkpoints and results are gathered, so a run may go on with another number of
processes, or without sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from imageconductor.models.motion_unet import MotionUNet


def shard(networks: Sequence[nn.Module], device: torch.device) -> None:
    """Splits those networks that learn over all processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for network in networks:
        if any(parameter.requires_grad for parameter in network.parameters()):
            cast(Any, network).to(memory_format=torch.contiguous_format)  # FSDP takes no channels-last weights.
            # One unit, gathered from forward to backward: activations, not these weights, fill the memory then.
            fully_shard(network, mesh=mesh, reshard_after_forward=False)
            if isinstance(network, MotionUNet):
                for half in ("encode", "decode"):
                    register_fsdp_forward_method(network, half)


def forget_gathered(module: nn.Module) -> None:
    """Frees full weights that a pass without gradients has left behind, which the next one would take for present ones.

    Only a backward pass does it by itself.
    """
    for part in module.modules():
        if type(part).__name__.startswith("FSDP"):
            cast(Any, part).reshard()


def check_gradients(parameters: Sequence[Tensor]) -> None:
    """Makes sure that the backward pass reached what is split.

    Raises:
        RuntimeError: It did not, as in versions of PyTorch whose FSDP finds no tensors in a dataclass.
    """
    if all(parameter.grad is None for parameter in parameters):
        raise RuntimeError(f"FSDP of PyTorch {torch.__version__} gives no gradients here; 2.13 does")


def gather_tensors(state: Any, keep: bool) -> Any:
    """A tree with full tensors, on the CPU, in place of shards, or None unless `keep`; all processes must call it."""

    def gather(leaf: Any) -> Any:
        if not _is_split(leaf):
            return leaf
        tensor = leaf.full_tensor()
        return tensor.cpu() if keep else None

    return tree_map(gather, state)


def gather(value: Tensor) -> Tensor:
    """A full tensor in the place of a shard; all processes must call it."""
    return cast(Any, value).full_tensor() if _is_split(value) else value


def own_part(value: Tensor) -> Tensor:
    """This process's shard of a tensor, or all of one that is not split."""
    return cast(Any, value).to_local() if _is_split(value) else value


def split_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a full tensor, split as a parameter is, or all of it, in the parameter's memory format.

    The format matters: a fused Adam walks through the memory of parameter and moments side by side.
    """
    if not _is_split(parameter):
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    split: Any = parameter
    return distribute_tensor(value.to(parameter.device).contiguous(), split.device_mesh, split.placements)


def split_optimizer(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimiser's full `state_dict`, its moments split as the parameters are."""
    split = {}
    for number, moments in state["state"].items():
        shape = parameters[number].shape  # The count of steps, and scales of 8-bit moments, have others.
        split[number] = {
            key: split_like(value, parameters[number]) if isinstance(value, Tensor) and value.shape == shape else value
            for key, value in moments.items()
        }
    return {**state, "state": split}


def gather_weights(network: nn.Module) -> None:
    """Puts full weights in place of a network's shards, to be saved and not to be run; all processes must call it."""
    for module in network.modules():
        if type(module).__name__.startswith("FSDP"):  # `fully_shard` puts a class of its own before the network's.
            module.__class__ = type(module).__bases__[1]
        for name, parameter in list(module.named_parameters(recurse=False)):
            if _is_split(parameter):
                full = cast(Any, parameter).full_tensor().detach()
                module.register_parameter(name, nn.Parameter(full, parameter.requires_grad))


def _is_split(leaf: Any) -> bool:
    return hasattr(leaf, "full_tensor")  # a DTensor, whose class old versions of PyTorch keep elsewhere
