"""Samples the sparse tracks that a training step shows to the model (section 2.2, "Sampling and Gaussian Filter")."""

from collections.abc import Sequence

import torch
from torch import Tensor


def motion_intensity(points: Tensor, visible: Tensor) -> Tensor:
    """Length in pixels of the visible path of each track: (B, N), of points (B, N, T, 2) and visible (B, N, T)."""
    steps = (points[..., 1:, :] - points[..., :-1, :]).norm(dim=-1)
    return (steps * (visible[..., 1:] & visible[..., :-1])).sum(dim=-1)


def sample_sparse(points: Tensor, visible: Tensor, max_tracks: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Mask of 1..max_tracks tracks per clip, drawn with probability proportional to their motion intensity.

    Args:
        points: (B, N, T, 2) pixels.
        visible: (B, N, T) bool.
        max_tracks: Upper bound of n; 8 in the paper.
        generators: One per clip, on the CPU for points on any device.

    Returns:
        (B, N) bool. If no track of a clip moves, those visible in its first frame are equally likely.

    Source: Image Conductor, section 2.2: n in [1, 8], "normalized motion intensity ... as the sampling probability".
    """
    intensity = motion_intensity(points, visible).cpu().double()
    starts = visible[..., 0].cpu().double()
    keep = torch.zeros(intensity.shape, dtype=torch.bool)
    for row, generator in enumerate(generators):
        count = int(torch.randint(1, max_tracks + 1, (), generator=generator))
        weights = intensity[row] if intensity[row].sum() > 1e-6 else starts[row]
        count = min(count, int((weights > 0).sum()))
        if count:
            keep[row, torch.multinomial(weights, count, generator=generator)] = True
    return keep.to(points.device)
