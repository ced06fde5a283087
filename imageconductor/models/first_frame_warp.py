"""What a small UNet has beyond AnimateDiff's: it reads the first frame at places that it chooses or is told."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imageconductor.models.controlnets import Residuals
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
        normed = self.norm(hidden)
        values = self.values(hidden[::num_frames]).unflatten(1, (self.num_heads, -1))
        values = values.repeat_interleave(num_frames, dim=0).flatten(0, 1)
        offsets = self.offsets(normed).unflatten(1, (self.num_heads, 2)).flatten(0, 1)
        read = _read(values, offsets)
        return hidden + self.merge(read.to(hidden.dtype).reshape(hidden.shape))


class WarpedOutput(nn.Module):
    """The output as a mean of what the network paints and the first frame's latents, read at learned offsets.

    Each place has weights that add up to 1: one for the painting, and one for each of a few places to read from. What
    is carried therefore arrives unharmed by the network's width; what the first frame does not show is painted. One
    read begins where flow map or boxes say that a place has come from, the others at the place itself.

    Args:
        channels: Of the features that the weights and offsets follow from.
        num_reads: Places that a place can choose from.
    """

    def __init__(self, channels: int, num_reads: int = 5):
        super().__init__()
        self.num_reads = num_reads
        self.choose = nn.Conv2d(channels, 3 * num_reads + 1, 3, padding=1)
        nn.init.normal_(self.choose.weight, std=0.01)  # All reads would learn the same from zeros.

    def forward(self, features: Tensor, painted: Tensor, residuals: Residuals | None, num_frames: int) -> Tensor:
        """The output (B*T, C, h, w).

        Args:
            features: (B*T, D, h, w).
            painted: (B*T, C, h, w), clean latents.
            residuals: With pictures, of which only first frames are read, and displacements. Without pictures what is
                painted is the output.
            num_frames: T.
        """
        if residuals is None or residuals.pictures is None:
            return painted
        offsets, logits = self.choose(features).split([2 * self.num_reads, self.num_reads + 1], dim=1)
        offsets = offsets.float().unflatten(1, (self.num_reads, 2))
        if residuals.displacements is not None:
            along = offsets[:, :1] - _PLACES_OF_UNIT * residuals.displacements[:, None]
            offsets = torch.cat([along, offsets[:, 1:]], dim=1)
        first = residuals.pictures[::num_frames].repeat_interleave(num_frames * self.num_reads, dim=0)
        read = _read(first, offsets.flatten(0, 1)).unflatten(0, (-1, self.num_reads))
        weights = logits.float().softmax(dim=1)[:, :, None]
        return (weights[:, 0] * painted.float() + (weights[:, 1:] * read).sum(1)).to(painted.dtype)


class WarpedSkips(nn.Module):
    """The first frame's latents, moved as flow map or boxes tell, joined to the skip connections of their resolution.

    A flow map reaches further than the shape that is dragged, so each place has to decide between what would arrive and
    what was there. Here it sees both before the up path ends, and not only when the output mixes them.

    Args:
        latent_channels: C.
        channels: D, of the skip connections.
        num_skips: How many have the latents' resolution; they come first.
    """

    def __init__(self, latent_channels: int, channels: int, num_skips: int):
        super().__init__()
        self.compare = nn.Conv2d(2 * latent_channels + 2, channels, 3, padding=1)
        self.add = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(num_skips))
        for layer in self.add:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, skips: tuple[Tensor, ...], residuals: Residuals | None, num_frames: int) -> tuple[Tensor, ...]:
        """The skip connections, those of the latents' resolution changed.

        Args:
            skips: Each (B*T, D_i, h_i, w_i).
            residuals: With pictures, of which only first frames are read, and displacements. Without pictures nothing
                is changed, without displacements the first frame is joined as it is.
            num_frames: T.
        """
        if residuals is None or residuals.pictures is None:
            return skips
        first = residuals.pictures[::num_frames].repeat_interleave(num_frames, dim=0)
        offsets = residuals.displacements
        offsets = first.new_zeros(len(first), 2, *first.shape[2:]) if offsets is None else _PLACES_OF_UNIT * offsets
        seen = torch.cat([_read(first, -offsets), first.float(), offsets.float()], dim=1)
        told = F.silu(self.compare(seen.to(skips[0].dtype)))
        joined = (skip + layer(told) for skip, layer in zip(skips, self.add, strict=False))
        return (*joined, *skips[len(self.add) :])


def add_first_frame_warp_(unet: nn.Module, num_heads: int, norm_num_groups: int) -> None:
    """Puts a warp before the temporal attention of every motion module of a UNet's up path, in place."""
    for block in unet.up_blocks:  # type: ignore[union-attr]
        for module in block.motion_modules:
            assert isinstance(module, MotionModule)
            module.first_frame_warp = FirstFrameWarp(module.norm.num_channels, num_heads, norm_num_groups)


def _read(pictures: Tensor, offsets: Tensor) -> Tensor:
    """Pictures (N, C, h, w) read at offsets (N, 2, h, w) from each place, x first: (N, C, h, w) float32."""
    height, width = pictures.shape[-2:]
    with torch.autocast(pictures.device.type, enabled=False):  # Places need float32.
        places = offsets.float().movedim(1, -1) * (2 / _PLACES_OF_UNIT) + _identity_grid(height, width, offsets.device)
        return F.grid_sample(pictures.float(), places, padding_mode="border", align_corners=False)


def _identity_grid(height: int, width: int, device: torch.device) -> Tensor:
    """(h, w, 2) float32: the centre of each place as `grid_sample` counts, x first."""
    y, x = ((torch.arange(side, device=device) + 0.5) * (2 / side) - 1 for side in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
