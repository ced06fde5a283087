"""Flow maps: trajectories drawn as blurred displacement fields, the input of the motion ControlNet.

The release scatters each frame's displacements into an H x W map and filters it with a 99 x 99 Gaussian. The filter is
linear and separable, so a displacement d at pixel (x, y) contributes d * outer(G_y[y], G_x[x]), where row j of G is the
response of the one-dimensional filter, with its border, to a unit impulse at j. A frame is one matrix product over
tracks.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from imageconductor.conditioning.trajectories import Trajectories, inside


@dataclass(frozen=True)
class FlowMapConvention:
    """The convention by which a model's flow maps are drawn, stored with its weights; the defaults are the release's.

    Attributes:
        kernel_size: odd width of the Gaussian's support, pixels.
        sigma_px: its standard deviation.
        normalisation: "sum", the kernel sums to 1; "peak", its centre is 1, so values are displacements in pixels;
            "average", the displacements' average, weighted by kernels whose centre is 1, so that many tracks of one
            motion say the same as one.
        least_weight: of an average: where kernels add up to less, values fall with them to 0. A smaller one widens the
            surroundings in which a track's displacement is written in full.
        accumulate: whether the value of step i is p_{i+1} - p_0 (the paper's text) instead of p_{i+1} - p_i (the
            release).
        at_end: whether the value of step i, which is frame i + 1's, is written where the point is in that frame,
            p_{i+1}, instead of where it was before, p_i (the release).
        still_drift_px: distance in x and in y over which a still track is drawn to move during the clip, as in the
            release; at 0 a still track only overwrites others, or under "average" holds back those beside it.
        scale: factor on the displacement.
    """

    kernel_size: int = 99
    sigma_px: float = 10.0
    normalisation: Literal["sum", "peak", "average"] = "sum"
    accumulate: bool = False
    still_drift_px: float = 1.0
    scale: float = 1.0
    least_weight: float = 1.0
    at_end: bool = False

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {self.kernel_size}")
        if not 0 < self.sigma_px < math.inf:
            raise ValueError(f"sigma_px must be positive, got {self.sigma_px}")
        if self.normalisation not in ("sum", "peak", "average"):
            raise ValueError(f'normalisation must be "sum", "peak" or "average", got {self.normalisation!r}')
        if not 0 <= self.still_drift_px < math.inf:
            raise ValueError(f"still_drift_px must not be negative, got {self.still_drift_px}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not 0 < self.least_weight <= 1:
            raise ValueError(f"least_weight must lie in (0, 1], got {self.least_weight}")


def flow_map(
    points: Tensor,
    visible: Tensor,
    size: tuple[int, int],
    convention: FlowMapConvention,
    *,
    still: Tensor | None = None,
) -> Tensor:
    """Flow maps of a batch of clips, given as tensors of points, drawn on their device.

    Step i, from p_i to p_{i+1}, is written into frame i + 1 at the truncated pixel of p_i, or of p_{i+1} where the
    convention says so. It is left out if that point lies outside the frame, if either end is invisible, or if the
    displacement is not finite, as that from a p_0 which is unknown. If two tracks write the same pixel of a frame, the
    later one wins.

    Args:
        points: (B, N, T, 2) float, xy in pixels of `size`; unknown ones are not finite.
        visible: (B, N, T) bool.
        size: (W, H).
        convention: the convention that the model was trained with.
        still: (B, N) bool, tracks that hold still; None = no track.

    Returns:
        (B, 2, T, H, W) float32, channel 0 = x; frame 0 is zero.

    Raises:
        ValueError: shapes that do not fit together.

    Source: section 2.2 of the paper ("Sampling and Gaussian Filter") and the published release.
    """
    _check_shapes(points, visible, still)
    width, height = size
    pixels, displacements, written = _steps(points, visible, size, convention, still)
    kernel = (convention.kernel_size, convention.sigma_px, convention.normalisation)
    g_x = _filter_matrix(width, *kernel, points.device).to(displacements.dtype)
    g_y = _filter_matrix(height, *kernel, points.device).to(displacements.dtype)
    batch, _, num_frames, _ = points.shape
    out = torch.zeros(batch, 2, num_frames, height, width, device=points.device)
    for i in range(num_frames - 1):  # One frame at a time bounds the memory: dense tracks would need T times as much.
        x, y = pixels[:, :, i].unbind(-1)
        rows = displacements[:, :, i].mT[..., None] * g_y[y][:, None]  # (B, 2, N, H)
        out[:, :, i + 1] = rows.mT @ g_x[x][:, None]
        if convention.normalisation == "average":
            weights = (written[:, :, i, None] * g_y[y]).mT @ g_x[x]  # (B, H, W)
            out[:, :, i + 1] /= weights[:, None].clamp(min=convention.least_weight)
    return out


def build_flow_map(
    trajectories: Trajectories, convention: FlowMapConvention, device: torch.device | str | None = None
) -> Tensor:
    """Flow map of one clip, given as `Trajectories`, drawn on `device` (default: theirs): (1, 2, T, H, W) float32."""
    device = trajectories.points.device if device is None else torch.device(device)
    return flow_map(
        trajectories.points[None].to(device, _precision(device)),
        trajectories.visible[None].to(device),
        trajectories.size,
        convention,
        still=trajectories.still[None].to(device),
    )


def _steps(
    points: Tensor, visible: Tensor, size: tuple[int, int], convention: FlowMapConvention, still: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (B, N, T - 1, 2) int64, displacements (B, N, T - 1, 2), and (B, N, T - 1) bool, steps that are drawn.

    Displacements of steps that are left out are zero.
    """
    points = points.to(_precision(points.device))
    steps = slice(1, None) if convention.at_end else slice(None, -1)
    written = inside(points[:, :, steps], size) & visible[:, :, :-1] & visible[:, :, 1:]
    if still is not None:
        ramp = torch.linspace(0, convention.still_drift_px, points.shape[2], device=points.device, dtype=points.dtype)
        points = points + still[:, :, None, None] * ramp[:, None]
    start = points[:, :, :1] if convention.accumulate else points[:, :, :-1]
    displacements = (points[:, :, 1:] - start) * convention.scale
    written = written & displacements.isfinite().all(-1)
    # Invisible points may be NaN, which has no pixel and survives a product with zero.
    pixels = points[:, :, steps].where(written[..., None], 0.0).long()
    # A still point on the border drifts out of the frame but is written at its pixel to the end.
    pixels = pixels.minimum(pixels.new_tensor(size) - 1)
    written = written & ~_overwritten(pixels, written, size[0])
    return pixels, displacements.where(written[..., None], 0.0), written


def _overwritten(pixels: Tensor, written: Tensor, width: int) -> Tensor:
    """(B, N, T - 1) bool: steps whose pixel a later track writes in the same frame.

    Dropping them beforehand gives the same map on every device; a scatter with repeated indices would not.
    """
    index = pixels[..., 1] * width + pixels[..., 0]
    num_tracks = index.shape[1]
    later = torch.ones(num_tracks, num_tracks, dtype=torch.bool, device=index.device).triu(1)
    dropped = torch.zeros_like(written)
    for i in range(index.shape[2]):
        same = index[:, :, None, i] == index[:, None, :, i]
        dropped[:, :, i] = (same & later & written[:, None, :, i]).any(-1)
    return dropped


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # Training could not use a cached tensor that was made in inference mode.
def _filter_matrix(length: int, kernel_size: int, sigma_px: float, normalisation: str, device: torch.device) -> Tensor:
    """(length, length), row j = response of the filter to a unit impulse at j; the border is reflected repeatedly.

    The border is OpenCV's default, reflect-101: the edge pixel is not repeated.
    """
    offsets = np.arange(kernel_size) - kernel_size // 2
    kernel = np.exp(-(offsets**2) / (2 * sigma_px**2))
    if normalisation == "sum":
        kernel /= kernel.sum()
    target = np.arange(length)[:, None]
    period = max(2 * (length - 1), 1)
    source = (target + offsets) % period
    source = np.minimum(source, period - source) if length > 1 else np.zeros_like(source)
    matrix = np.zeros((length, length))
    np.add.at(matrix, (source, np.broadcast_to(target, source.shape)), np.broadcast_to(kernel, source.shape))
    return torch.as_tensor(matrix, dtype=_precision(device), device=device)


def _precision(device: torch.device) -> torch.dtype:
    """float64 if the device has it: TF32 and autocast do not affect it, and the products here are small."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check_shapes(points: Tensor, visible: Tensor, still: Tensor | None) -> None:
    if points.ndim != 4 or points.shape[-1] != 2 or points.shape[2] < 1 or not points.is_floating_point():
        raise ValueError(f"points must be float (B, N, T, 2), got {points.dtype} {tuple(points.shape)}")
    if visible.shape != points.shape[:3] or visible.dtype != torch.bool:
        raise ValueError(
            f"visible must be bool {tuple(points.shape[:3])} as points are, got {visible.dtype} {tuple(visible.shape)}"
        )
    if still is not None and (still.shape != points.shape[:2] or still.dtype != torch.bool):
        raise ValueError(
            f"still must be bool {tuple(points.shape[:2])} as points are, got {still.dtype} {tuple(still.shape)}"
        )
