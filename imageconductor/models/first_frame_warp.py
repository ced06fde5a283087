"""What a small UNet has beyond AnimateDiff's: its up path reads the first frame at places that it chooses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imageconductor.models.motion_module import MotionModule

_PLACES_OF_UNIT = 16
"""An offset of 1 is a sixteenth of the frame's width or height, at every resolution."""


class FirstFrameWarp(nn.Module):
    """Features of the first frame, warped by learned offsets, added to those of every frame.

    Each head reads its channels at one place: a frame's own place, plus an offset that a convolution of the frame's
    features gives. It is deformable attention (Zhu et al., 2021) with one sampling point a head and one frame to read
    from. A motion module sees the first frame at its own place only, so that content must be carried by spatial
    attention, which a small network hardly learns (docs/decisions.md, 41).

    Args:
        channels: C.
        num_heads: Heads; divides C.
        norm_num_groups: Groups of the norm before it.
    """

    def __init__(self, channels: int, num_heads: int, norm_num_groups: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(norm_num_groups, channels)
        self.offsets = nn.Conv2d(channels, 2 * num_heads, 3, padding=1)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]
        self.values = nn.Conv2d(channels, channels, 1)
        self.merge = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Tensor, num_frames: int) -> Tensor:
        """Features (B*T, C, h, w) with what the first frame holds elsewhere."""
        height, width = hidden.shape[-2:]
        normed = self.norm(hidden)
        values = self.values(hidden[::num_frames]).unflatten(1, (self.num_heads, -1))
        values = values.repeat_interleave(num_frames, dim=0).flatten(0, 1)
        offsets = self.offsets(normed).unflatten(1, (self.num_heads, 2)).flatten(0, 1)
        with torch.autocast(hidden.device.type, enabled=False):  # Places need float32.
            read = F.grid_sample(
                values.float(),
                _identity_grid(height, width, hidden.device) + offsets.float().movedim(1, -1) * (2 / _PLACES_OF_UNIT),
                padding_mode="border",
                align_corners=False,
            )
        return hidden + self.merge(read.to(hidden.dtype).reshape(hidden.shape))


def add_first_frame_warp_(unet: nn.Module, num_heads: int, norm_num_groups: int) -> None:
    """Puts a warp before the temporal attention of every motion module of a UNet's up path, in place."""
    for block in unet.up_blocks:  # type: ignore[union-attr]
        for module in block.motion_modules:
            assert isinstance(module, MotionModule)
            module.first_frame_warp = FirstFrameWarp(module.norm.num_channels, num_heads, norm_num_groups)


def _identity_grid(height: int, width: int, device: torch.device) -> Tensor:
    """(h, w, 2) float32: the centre of each place as `grid_sample` counts, x first."""
    y, x = ((torch.arange(side, device=device) + 0.5) * (2 / side) - 1 for side in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
