"""Counts the GPU memory of sampling at full size, without a GPU and without weights.

Networks of the published sizes stand on the meta device, where tensors have shapes and no content; a guided step and
the decoding of a video are run there, and every storage is counted from its first use to its release. Not counted: the
allocator's reserve, the workspaces of convolutions, and CUDA itself (together 1 to 2 GB).

    python benchmarks/sampling_memory.py
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

from imageconductor.models.adapters import Adapter, add_adapter
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.denoiser import Condition, Denoiser
from imageconductor.models.motion_unet import SD15_ANIMATEDIFF_V3, MotionUNet
from imageconductor.sampling.branches import Control, GuidedDenoiser, plan

SD15_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "sample_size": 512,  # also the size of its tiles
    "layers_per_block": 2,
}


class FusedAttention(TorchFunctionMode):
    """Attention as the fused CUDA kernels have it: no matrix of scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations inside made and that are still in use; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made_from = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        output = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        self.count([x for x in made if x.untyped_storage()._cdata not in made_from])
        return output

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that operations outside made, such as weights, or those of an operation inside."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                self.known.add(key)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that `call` holds at a time, its arguments apart."""
    with torch.no_grad(), torch.device("meta"), FusedAttention(), LiveBytes() as counter:
        call()
    return counter.peak


def networks(dtype: torch.dtype) -> dict[str, Any]:
    """The published model's networks on the meta device."""
    with torch.device("meta"):
        unet = MotionUNet(**SD15_ANIMATEDIFF_V3)
        motion = MotionControlNet.from_unet(unet)
        parts: dict[str, Any] = {
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
            "vae": AutoencoderKL(**SD15_VAE),
            "image_controlnet": ImageControlNet.from_unet(unet, conditioning_channels=4),
            "motion_controlnet": motion,
            "unet": unet,
        }
        for adapter in Adapter:
            add_adapter(motion, adapter, rank=64)
    return {name: network.to(dtype).eval().requires_grad_(False) for name, network in parts.items()}


def step_bytes(parts: dict[str, Any], size: tuple[int, int], videos: int, camera_free_scale: float | None) -> int:
    """Peak of one guided step for `videos` videos of one condition."""
    width, height = size
    dtype = parts["unet"].dtype
    with torch.device("meta"):
        text = torch.empty(1, 77, 768, dtype=dtype)
        first_frame = torch.empty(1, 4, 16, height // 8, width // 8, dtype=dtype)
        flow = torch.empty(1, 2, 16, height, width, dtype=dtype)
        conditions = [Condition(one, first_frame, first_frame[:, :1], flow) for one in (text, text.clone())]
        x_t, t = first_frame.repeat(videos, 1, 1, 1, 1), torch.empty((), dtype=torch.int64)
    branches = plan(Control.OBJECT, 8.5, camera_free_scale)
    denoiser = Denoiser(parts["unet"], parts["image_controlnet"], parts["motion_controlnet"])
    with torch.device("meta"):
        denoise = GuidedDenoiser(denoiser, branches, {"uncond": conditions[0], "prompt": conditions[1]})
        denoise.prepare()
    return peak_bytes(lambda: denoise(x_t, t))


def decode_bytes(vae: Any, size: tuple[int, int], frames: int, tiled: bool = False) -> int:
    """Peak of decoding `frames` frames at once."""
    latents = torch.empty(frames, 4, size[1] // 8, size[0] // 8, dtype=vae.dtype, device="meta")
    vae.enable_tiling() if tiled else vae.disable_tiling()
    return peak_bytes(lambda: vae.decode(latents).sample)


def main() -> None:
    """Prints the tables of docs/memory.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(384, 256), metavar=("W", "H"), help="pixels")
    size = tuple(parser.parse_args().size)
    parts = networks(torch.float16)
    weights = {name: sum(p.numel() for p in network.parameters()) * 2 for name, network in parts.items()}
    gb = 1e9
    print("weights, GB in float16\n\n| network | |\n|---|---|")
    for name, count in {**weights, "all": sum(weights.values())}.items():
        print(f"| {name} | {count / gb:.2f} |")

    steps = {(videos, scale): step_bytes(parts, size, videos, scale) for videos in (1, 4) for scale in (None, 1.5)}
    print("\none guided step, peak beside the weights, GB\n\n| videos | guidance | |\n|---|---|---|")
    for (videos, scale), count in steps.items():
        print(f"| {videos} | {'classifier-free' if scale is None else 'Eq. 5'} | {count / gb:.2f} |")

    decoding = {frames: decode_bytes(parts["vae"], size, frames) for frames in (16, 4, 1)}
    decoding_tiled = decode_bytes(parts["vae"], size, 1, tiled=True)
    print("\ndecoding, GB\n\n| frames at a time | |\n|---|---|")
    for frames, count in decoding.items():
        print(f"| {frames} | {count / gb:.2f} |")
    print(f"| 1, tiled | {decoding_tiled / gb:.2f} |")

    print("\none video with Eq. 5, GB\n\n| offload | decode 16 at a time | 1 at a time |\n|---|---|---|")
    working = steps[1, 1.5]
    for name, resident, step, decode in (
        ("none", sum(weights.values()), working, sum(weights.values())),
        ("model", weights["unet"] + weights["motion_controlnet"], working, weights["vae"]),  # The UNet stays.
        ("sequential", 0, working, 0),
    ):
        totals = [max(resident + step, decode + decoding[frames]) for frames in (16, 1)]
        print(f"| {name} | {totals[0] / gb:.1f} | {totals[1] / gb:.1f} |")


if __name__ == "__main__":
    main()
