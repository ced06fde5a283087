"""Nodes that sample videos and draw tracks on them. Frames are ComfyUI's images: (T, H, W, 3) float32 in [0, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imageconductor.sampling.branches import Control
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.sampling.video import Frames, draw_trajectories, to_uint8, upscale_for_viewing

from . import host
from .track_nodes import Tracks

_AUTO = "auto"
_BYTES_PER_PIXEL = 3e4  # of a video's width x height, beside the weights, in half precision (docs/memory.md)
_OFFLOADED_BYTES = 4e9  # of weights that come to the GPU at a time where networks wait in main memory
_CHUNK = 16  # as `SampleJob.decode_chunk_size`


class SampleVideo:
    """Videos that begin with an image and move along tracks."""

    CATEGORY = host.CATEGORY
    DESCRIPTION = "Samples videos that begin with the image and move along the tracks. Without an image: text-to-video."
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("frames", "fps")
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs in ComfyUI's form."""
        scale = {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1}
        count = {"default": 0, "min": 0, "max": 16384}
        controls = (
            "What the tracks move. auto: as the tracks say; both LoRAs if only some say the camera; else the model's."
        )
        return {
            "required": {
                "model": (host.MODEL,),
                "prompt": ("STRING", {"default": "", "multiline": True}),
                "negative_prompt": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "Empty: the model's default."},
                ),
                "control": ([_AUTO, *(control.value for control in Control)], {"tooltip": controls}),
                "camera_free_scale": (
                    "FLOAT",
                    {
                        **scale,
                        "tooltip": "lambda_trajs of Eq. 5, with control object; above 1 pins the camera. 0: off.",
                    },
                ),
                "guidance_scale": ("FLOAT", {**scale, "tooltip": "lambda_cfg, 1: off. 0: the model's default."}),
                "trajectory_guidance_scale": (
                    "FLOAT",
                    {**scale, "tooltip": "Above 1 follows the tracks more closely, 1: off. 0: the model's default."},
                ),
                "steps": ("INT", {**count, "max": 1000, "tooltip": "0: the model's default."}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
                "num_frames": ("INT", {**count, "max": 4096, "tooltip": "0: the model's default."}),
                "width": ("INT", {**count, "tooltip": "Pixels. 0: the model's default."}),
                "height": ("INT", {**count, "tooltip": "Pixels. 0: the model's default."}),
                "num_videos": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "Videos of each image, with seeds that count up."},
                ),
            },
            "optional": {
                "image": (
                    "IMAGE",
                    {"tooltip": "First frame, cropped to the shape of the video; several make videos each."},
                ),
                "tracks": (host.TRACKS,),
                "decode_chunk_size": (
                    "INT",
                    {
                        "default": _CHUNK,
                        "min": 1,
                        "max": 4096,
                        "tooltip": "Frames that are decoded at a time; fewer take less memory.",
                    },
                ),
            },
        }

    def sample(
        self,
        model: ImageConductorPipeline,
        prompt: str,
        negative_prompt: str,
        control: str,
        camera_free_scale: float,
        guidance_scale: float,
        trajectory_guidance_scale: float,
        steps: int,
        seed: int,
        num_frames: int,
        width: int,
        height: int,
        num_videos: int,
        image: Tensor | None = None,
        tracks: Tracks | None = None,
        decode_chunk_size: int = _CHUNK,
    ) -> tuple[Tensor, float]:
        """Frames (V T, H, W, 3) of V videos after one another, on the CPU, and the model's frames a second.

        0 stands for the model's default, or, of `camera_free_scale`, for off.

        Raises:
            ValueError: Inputs that do not fit the model or each other.
        """
        host.check_interrupted()
        defaults = model.sampling_defaults
        size = (width or defaults["width"], height or defaults["height"])
        num_frames = num_frames or defaults["num_frames"]
        drawn = None if tracks is None else tracks.place(size, num_frames)
        arriving = _OFFLOADED_BYTES if hasattr(model.unet, "_hf_hook") else 0.0
        host.make_room(_BYTES_PER_PIXEL * size[0] * size[1] + arriving)
        pictures = [] if image is None else _to_pictures(image)
        seeds = [seed + i for i in range(num_videos)]
        result: Any = model(
            image=pictures or None,
            trajectories=drawn if drawn is not None and drawn.num_tracks else None,
            prompt=prompt,
            negative_prompt=negative_prompt or None,
            control=None if control == _AUTO else control,
            camera_free_scale=camera_free_scale or None,
            guidance_scale=guidance_scale or None,
            trajectory_guidance_scale=trajectory_guidance_scale or None,
            num_inference_steps=steps or None,
            num_frames=num_frames,
            height=size[1],
            width=size[0],
            seed=seeds,
            output_type="pt",
            decode_chunk_size=decode_chunk_size,
            callback_on_step_end=host.report_steps(),
        )
        frames = result.frames.permute(0, 1, 3, 4, 2).flatten(0, 1)  # (V T, H, W, 3)
        return frames.float().cpu().contiguous(), float(defaults["fps"])


class DrawTracks:
    """Frames with tracks drawn over them."""

    CATEGORY = host.CATEGORY
    DESCRIPTION = "Draws tracks over the frames they were made for, with a dot for each frame."
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("frames",)
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs in ComfyUI's form."""
        return {
            "required": {
                "frames": ("IMAGE",),
                "tracks": (host.TRACKS,),
                "num_videos": ("INT", {"default": 1, "min": 1, "max": 4096, "tooltip": "Videos that the frames hold."}),
                "enlarge": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Enlarge small frames until the shorter side is 256 pixels."},
                ),
            }
        }

    def draw(self, frames: Tensor, tracks: Tracks, num_videos: int, enlarge: bool) -> tuple[Tensor]:
        """Frames (V T, H, W, 3) of V videos after one another, with the tracks of T frames on each.

        Raises:
            ValueError: The frames are not a multiple of the videos.
        """
        pixels = _to_pixels(frames)
        if len(pixels) % num_videos:
            raise ValueError(f"num_videos is {num_videos}, of which {len(pixels)} frames are no multiple")
        large, factor = upscale_for_viewing(pixels) if enlarge else (pixels, 1)
        trajectories = tracks.place((pixels.shape[2], pixels.shape[1]), len(pixels) // num_videos)
        drawn = [draw_trajectories(video, trajectories, factor) for video in np.split(large, num_videos)]
        return (torch.from_numpy(np.concatenate(drawn)).float() / 255,)


def _to_pictures(image: Tensor) -> list[Image.Image]:
    """A picture of each image of a batch; a fourth channel is its opacity."""
    return [Image.fromarray(one) for one in _to_pixels(image, channels=(3, 4))]


def _to_pixels(image: Tensor, channels: tuple[int, ...] = (3,)) -> Frames:
    """ComfyUI's (B, H, W, C) in [0, 1] as bytes.

    Raises:
        ValueError: Another shape, or a value that is not finite.
    """
    if image.ndim != 4 or image.shape[-1] not in channels or not len(image):
        raise ValueError(f"expected images (B, H, W, {' or '.join(map(str, channels))}), got {tuple(image.shape)}")
    if not image.isfinite().all():
        raise ValueError("the images hold nan or infinite values")
    return to_uint8(image.float().cpu().numpy())
