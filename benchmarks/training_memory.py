"""Counts the GPU memory of a training step at full size, without a GPU and without weights.

Networks of SD-1.5's size stand on the meta device, where tensors have shapes and no content. What the backward pass
keeps is counted tensor by tensor, under the casts that CUDA's autocast makes; weights, gradients and Adam's moments
follow from the parameters. Not counted: the allocator's reserve, workspaces, and the VAE's own peak.

    python benchmarks/training_memory.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from imageconductor.models.adapters import (
    activate,
    active,
    adapter_parameters,
    add_adapter,
    freeze_all_but_adapter,
    frozen,
    lora_targets,
)
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.denoiser import Condition, Denoiser
from imageconductor.models.gated_attention import ObjectGates, SceneGates
from imageconductor.models.motion_module import LAYERS, motion_modules_bypassed
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


def kept_bytes(forward: Callable[[], Any], blocks: list[Any], own_parameters: list[Any]) -> tuple[int, int]:
    """Bytes that one forward pass keeps for the backward pass, parameters apart: in all, and most in one layer."""
    layers = [layer for block in blocks for name in LAYERS for layer in getattr(block, name, None) or ()]
    inside, by_layer = [-1], [0] * (len(layers) + 1)
    hooks = []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: inside.append(number)))
        hooks.append(layer.register_forward_hook(lambda *_: (inside.pop(), None)[1]))
    own = {parameter.untyped_storage()._cdata for parameter in own_parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            by_layer[inside[-1]] += storage.nbytes()
            alive.append(storage)
        return tensor

    alive: list[Any] = []  # a storage that were freed could lend its address to the next
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), CudaAutocast():
        forward()
    for hook in hooks:
        hook.remove()
    return sum(kept.values()), max(by_layer[:-1])


def image_conductor_step(denoiser: Denoiser, batch_size: int) -> tuple[int, int]:
    """`kept_bytes` of a step of stages 1 to 3 at 384x256, 16 frames."""
    unet, motion = denoiser.unet, denoiser.motion_controlnet
    x_t = torch.empty(batch_size, 4, 16, 32, 48, device="meta")
    condition = Condition(
        torch.empty(batch_size, 77, 768, device="meta"),
        x_t,
        x_t[:, :1],
        torch.empty(batch_size, 2, 16, 256, 384, device="meta"),
    )
    timesteps = torch.empty(batch_size, dtype=torch.int64, device="meta")
    blocks = [*unet.up_blocks, *motion.down_blocks]
    return kept_bytes(lambda: denoiser(x_t, timesteps, condition), blocks, parameters(denoiser))


def motion_director_step(unet: MotionUNet, size: tuple[int, int], num_frames: int) -> tuple[int, int]:
    """`kept_bytes` of a step of MotionDirector, whose two passes are kept together."""
    x_t = torch.empty(1, 4, num_frames, size[1] // 8, size[0] // 8, device="meta")
    text, timesteps = torch.empty(1, 77, 768, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")

    def forward() -> None:
        with active(unet, "appearance"), motion_modules_bypassed(unet):
            unet(x_t[:, :, :1], timesteps, text)
        with active(unet, "appearance", "motion"), frozen(unet, "appearance"):
            unet(x_t, timesteps, text)

    return kept_bytes(forward, [*unet.down_blocks, unet.mid_block, *unet.up_blocks], list(unet.parameters()))


def motion_director_unet(rank: int) -> MotionUNet:
    """AnimateDiff's UNet in float16 with MotionDirector's two LoRAs in float32."""
    with torch.device("meta"):
        unet = MotionUNet(**SD15_ANIMATEDIFF_V3).half()
        for name in ("appearance", "motion"):
            add_adapter(unet, name, rank=rank, targets=lora_targets(unet, name), dropout=0.1)
        for name in ("appearance", "motion"):
            for parameter in adapter_parameters(unet, name).values():
                parameter.data = parameter.data.float()
    freeze_all_but_adapter(unet, "appearance", "motion")
    return unet


def smcd_denoiser(stage: str, rank: int) -> Denoiser:
    """The networks of one of SMCD's stages on the meta device: object_gates, or scene_gates with a temporal LoRA."""
    with torch.device("meta"):
        unet = MotionUNet(**SD15_ANIMATEDIFF_V3).requires_grad_(False).bfloat16()
        objects, scene, image, motion = ObjectGates.from_unet(unet), None, None, None
        if stage == "scene_gates":
            image = ImageControlNet.from_unet(unet, conditioning_channels=4).requires_grad_(False).bfloat16()
            motion = MotionControlNet.from_unet(unet).requires_grad_(False).bfloat16()
            add_adapter(unet, "temporal", rank=rank, targets=lora_targets(unet, "motion"))
            activate(unet, "temporal")
            freeze_all_but_adapter(unet, "temporal")
            for parameter in adapter_parameters(unet, "temporal").values():
                parameter.data = parameter.data.float()
            objects.requires_grad_(False).bfloat16()
            scene = SceneGates.from_unet(unet)
    networks: Any = (unet, image, motion, objects, scene)
    return Denoiser(*networks)


def smcd_step(denoiser: Denoiser, batch_size: int) -> tuple[int, int]:
    """`kept_bytes` of a step of SMCD's stage 1 (a frame a clip), or 2 (16 frames, where there are scene gates)."""
    unet, num_frames = denoiser.unet, 1 if denoiser.scene_gates is None else 16
    x_t = torch.empty(batch_size, 4, num_frames, 32, 48, device="meta")
    first = None if denoiser.scene_gates is None else x_t[:, :, 0]
    keyframes = {} if first is None else {"keyframes": x_t, "mask": x_t[:, :1]}  # first_frame_by=both
    condition = Condition(
        torch.empty(batch_size, 77, 768, device="meta"),
        boxes=torch.empty(batch_size, num_frames, 8, 4, device="meta"),
        present=torch.empty(batch_size, num_frames, 8, device="meta"),
        names=torch.empty(batch_size, 8, 768, device="meta"),
        scene=first,
        input_frame=first,
        **keyframes,
    )
    timesteps = torch.empty(batch_size, dtype=torch.int64, device="meta")

    def forward() -> None:
        with motion_modules_bypassed(unet, num_frames == 1):
            denoiser(x_t, timesteps, condition)

    return kept_bytes(forward, [*unet.down_blocks, unet.mid_block, *unet.up_blocks], parameters(denoiser))


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
    networks = (getattr(denoiser, field.name) for field in fields(denoiser))
    return [parameter for network in networks if network is not None for parameter in network.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="clips per GPU and micro-step")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA")
    args = parser.parse_args()
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
                kept, block = image_conductor_step(denoiser, batch_size)
                # The backward pass holds one layer at a time whole.
                print_row(name, str(batch_size), checkpointed, learns, weights, kept + largest)
                largest = block
    for stage, batch_sizes in (("object_gates", (1, 16)), ("scene_gates", (1, 4))):
        denoiser = smcd_denoiser(stage, args.rank)
        learns = sum(p.numel() for p in parameters(denoiser) if p.requires_grad)
        weights = sum(p.nbytes for p in parameters(denoiser)) + 2 * FROZEN_ELSEWHERE
        for batch_size in batch_sizes:
            largest = 0
            for checkpointed in (False, True):
                denoiser.unet.checkpoint_blocks = checkpointed
                kept, block = smcd_step(denoiser, batch_size)
                print_row(f"SMCD {stage}", str(batch_size), checkpointed, learns, weights, kept + largest)
                largest = block
    unet = motion_director_unet(32)
    learns = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in unet.parameters()) + 2 * FROZEN_ELSEWHERE
    for size, num_frames in (((384, 384), 16), ((576, 320), 24)):
        largest = 0
        for checkpointed in (False, True):
            unet.checkpoint_blocks = checkpointed
            kept, block = motion_director_step(unet, size, num_frames)
            name = f"MotionDirector {size[0]}x{size[1]}x{num_frames}"
            print_row(name, "1", checkpointed, learns, weights, kept + largest)
            largest = block


def print_row(name: str, batch: str, checkpointed: bool, learns: int, weights: float, kept: int) -> None:
    """Prints a row of the table; sizes in bytes, `learns` in parameters."""
    gib = 2**30
    parts = [weights / gib, 12 * learns / gib, kept / gib]
    columns = [f"{part:.1f}" for part in (*parts, sum(parts))]
    used = "yes" if checkpointed else "no"
    print(f"| {name} | {learns / 1e6:.1f} M | {batch} | {used} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
