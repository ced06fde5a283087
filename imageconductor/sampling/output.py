"""What a call of the pipeline gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class ImageConductorOutput(BaseOutput):
    """Videos.

    Attributes:
        frames: "np" (B, T, H, W, 3) in [0, 1]; "pt" (B, T, 3, H, W) in [0, 1]; "pil" lists of T images for each video;
            "latent" (B, C, T, h, w).
        latents: With `keep_latents`: (B, C, T, h, w) float32 on the CPU, the sample before each step of the call and at
            last the result. Entry 0 of a whole run is the scaled noise, of a resumed one the sample that it began with.
    """

    frames: Any
    latents: list[Tensor] | None = None


def convert_frames(frames: Tensor, output_type: str) -> Any:
    """Frames (B, T, 3, H, W) in [0, 1], or latents, as one of `OUTPUT_TYPES`."""
    if output_type in ("latent", "pt"):
        return frames
    array = frames.permute(0, 1, 3, 4, 2).cpu().numpy()
    if output_type == "np":
        return array
    return [[Image.fromarray(np.round(frame * 255).astype(np.uint8)) for frame in video] for video in array]
