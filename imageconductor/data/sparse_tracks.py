"""Which of a clip's tracks a training step shows to the model (section 2.2, "Sampling and Gaussian Filter")."""

from collections.abc import Sequence

import torch
from torch import Tensor


def motion_intensity(points: Tensor, visible: Tensor) -> Tensor:
    """Length of each track's visible path in pixels, (B, N), from points (B, N, T, 2) and visible (B, N, T)."""
    steps = (points[..., 1:, :] - points[..., :-1, :]).norm(dim=-1)
    return (steps * (visible[..., 1:] & visible[..., :-1])).sum(dim=-1)


def sample_sparse(points: Tensor, visible: Tensor, max_tracks: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Mask of 1..max_tracks tracks of each clip, drawn with probability proportional to their motion.

    Args:
        points: (B, N, T, 2) pixels.
        visible: (B, N, T) bool.
        max_tracks: Upper limit of n; the paper's is 8.
        generators: One a clip, on the CPU, whatever the device of the points.

    Returns:
        (B, N) bool. A clip in which nothing moves draws evenly among the tracks visible in its first frame.

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
