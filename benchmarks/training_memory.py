"""Counts the GPU memory of a training step at full size, without a GPU and without weights.

Networks of SD-1.5's size stand on the meta device, where tensors have shapes and no content. What the backward pass
keeps is counted tensor by tensor, under the casts that CUDA's autocast makes; weights, gradients and Adam's moments
follow from the parameters. Not counted: the allocator's reserve, workspaces, and the VAE's own peak.

    python benchmarks/training_memory.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from imageconductor.models.adapters import activate, add_adapter, freeze_all_but_adapter
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.denoiser import Condition, Denoiser
from imageconductor.models.motion_unet import SD15_ANIMATEDIFF_V3, MotionUNet

HALF = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.baddbmm, torch.bmm}
FULL = {F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm, F.softmax}
FROZEN_ELSEWHERE = 123.1e6 + 83.7e6  # parameters of SD-1.5's text encoder and VAE


class CudaAutocast(TorchFunctionMode):
    """The casts of `torch.autocast("cuda", torch.bfloat16)`, which meta tensors do not get."""

    def __init__(self) -> None:
        super().__init__()
        self.cast: dict[int, Tensor] = {}  # of weights, as autocast caches them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return FlashAttention.apply(*(self.to(x, torch.bfloat16) for x in args[:3]))
        dtype = torch.bfloat16 if func in HALF else torch.float32 if func in FULL else None
        if dtype is not None:
            args = [self.to(x, dtype) if isinstance(x, Tensor) else x for x in args]
            kwargs = {k: self.to(x, dtype) if isinstance(x, Tensor) else x for k, x in kwargs.items()}
        return func(*args, **kwargs)

    def to(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in `dtype`; a parameter is cast once."""
        if not isinstance(x, torch.nn.Parameter) or x.dtype == dtype:
            return x.to(dtype)
        return self.cast.setdefault(id(x), x.to(dtype))


class FlashAttention(torch.autograd.Function):
    """Keeps what the fused kernel keeps: its inputs, its output and a float32 a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # never run
        raise NotImplementedError


def kept_bytes(denoiser: Denoiser, batch_size: int) -> tuple[int, int]:
    """Bytes that one forward pass keeps for the backward pass, parameters apart: in all, and most in one block."""
    unet, motion = denoiser.unet, denoiser.motion_controlnet
    blocks: list[Any] = [*unet.up_blocks, *motion.down_blocks, motion.mid_block]
    inside, by_block = [-1], [0] * (len(blocks) + 1)
    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_, number=number: inside.append(number)))
        hooks.append(block.register_forward_hook(lambda *_: (inside.pop(), None)[1]))
    own = {parameter.untyped_storage()._cdata for parameter in parameters(denoiser)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            by_block[inside[-1]] += storage.nbytes()
            alive.append(storage)
        return tensor

    alive: list[Any] = []  # a storage that were freed could lend its address to the next
    x_t = torch.empty(batch_size, 4, 16, 32, 48, device="meta")
    condition = Condition(
        torch.empty(batch_size, 77, 768, device="meta"),
        x_t,
        x_t[:, :1],
        torch.empty(batch_size, 2, 16, 256, 384, device="meta"),
    )
    timesteps = torch.empty(batch_size, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), CudaAutocast():
        denoiser(x_t, timesteps, condition)
    for hook in hooks:
        hook.remove()
    return sum(kept.values()), max(by_block[:-1])


def full_size(adapter: str | None, rank: int) -> Denoiser:
    """The networks of a stage on the meta device, with what learns in float32 and the rest in bfloat16.

    Args:
        adapter: LoRA of the motion ControlNet that learns; None = the motion ControlNet itself, as in stage 1.
        rank: Of the LoRA.
    """
    with torch.device("meta"):
        unet = MotionUNet(**SD15_ANIMATEDIFF_V3)
        image = ImageControlNet.from_unet(unet, conditioning_channels=4)
        motion = MotionControlNet.from_unet(unet)
        if adapter is not None:
            add_adapter(motion, adapter, rank=rank)
            activate(motion, adapter)
    unet.requires_grad_(False).bfloat16()
    image.requires_grad_(False).bfloat16()
    if adapter is None:
        motion.unfreeze_()
    else:
        freeze_all_but_adapter(motion, adapter)
    return Denoiser(unet, image, motion)


def parameters(denoiser: Denoiser) -> list[torch.nn.Parameter]:
    """Parameters of all networks."""
    networks = (denoiser.unet, denoiser.image_controlnet, denoiser.motion_controlnet)
    return [parameter for network in networks for parameter in network.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="clips per GPU and micro-step")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA")
    args = parser.parse_args()
    gib = 2**30
    print("| stage | learns | batch | checkpointing | weights | gradients + Adam | activations | sum, GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, adapter in (("1 motion ControlNet", None), ("2, 3 LoRA", "camera")):
        denoiser = full_size(adapter, args.rank)
        learns = sum(p.numel() for p in parameters(denoiser) if p.requires_grad)
        weights = sum(p.nbytes for p in parameters(denoiser)) + 2 * FROZEN_ELSEWHERE
        for batch_size in args.batch_size:
            largest = 0
            for checkpointed in (False, True):
                denoiser.unet.checkpoint_blocks = checkpointed
                denoiser.motion_controlnet.checkpoint_blocks = checkpointed
                kept, block = kept_bytes(denoiser, batch_size)
                kept += largest  # The backward pass holds one block at a time whole.
                largest = block
                parts = [weights / gib, 12 * learns / gib, kept / gib]
                columns = [f"{part:.1f}" for part in (*parts, sum(parts))]
                used = "yes" if checkpointed else "no"
                print(f"| {name} | {learns / 1e6:.1f} M | {batch_size} | {used} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
