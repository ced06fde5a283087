"""Samples the sparse tracks that a training step shows to the model (section 2.2, "Sampling and Gaussian Filter")."""

from collections.abc import Sequence

import torch
from torch import Tensor

NOISE_FLOOR_PX = 0.5
"""Displacement up to which a track counts as still, in pixels of the training frame.

A still point that jitters by 0.05 px on each axis comes 0.3 px away from its start in one of 256 tracks of 32 frames;
tracks stored in float16 are rounded by up to 0.35 px between two points with x in 256..511.
"""


def motion_intensity(points: Tensor, visible: Tensor) -> Tensor:
    """Largest distance of each track from its start, in pixels: (B, N).

    Unlike the length of a path, it does not add up a tracker's jitter over the frames. It is 0 up to `NOISE_FLOOR_PX`,
    and for tracks that are hidden in frame 0.

    Args:
        points: (B, N, T, 2) pixels; hidden ones may have any value.
        visible: (B, N, T) bool.
    """
    displacement = (points - points[..., :1, :]).norm(dim=-1)
    largest = displacement.masked_fill(~(visible & visible[..., :1]), 0.0).amax(dim=-1)
    return largest.masked_fill(largest <= NOISE_FLOOR_PX, 0.0)


def sample_sparse(
    points: Tensor,
    visible: Tensor,
    max_tracks: int,
    generators: Sequence[torch.Generator],
    *,
    distinct: bool = False,
) -> Tensor:
    """Mask of 1..max_tracks tracks per clip, drawn with probability proportional to their motion intensity.

    Only tracks that are visible in frame 0 are drawn, since a user's trajectory begins there.

    Args:
        points: (B, N, T, 2) pixels.
        visible: (B, N, T) bool.
        max_tracks: Upper bound of n; 8 in the paper.
        generators: One per clip, on the CPU for points on any device.
        distinct: Draw all but the first for moving otherwise than those drawn before (beyond the paper).

    Returns:
        (B, N) bool. If no track of a clip moves, those visible in its first frame are equally likely.

    Source: Image Conductor, section 2.2: n in [1, 8], "normalized motion intensity ... as the sampling probability".
    """
    intensity = motion_intensity(points, visible).cpu().double()
    starts = visible[..., 0].cpu().double()
    keep = torch.zeros(intensity.shape, dtype=torch.bool)
    for row, generator in enumerate(generators):
        count = int(torch.randint(1, max_tracks + 1, (), generator=generator))
        weights = intensity[row] if intensity[row].any() else starts[row]
        count = min(count, int((weights > 0).sum()))
        if count and distinct:
            keep[row, _draw_distinct(points[row].cpu(), visible[row].cpu(), weights, count, generator)] = True
        elif count:
            keep[row, torch.multinomial(weights, count, generator=generator)] = True
    return keep.to(points.device)


def _draw_distinct(points: Tensor, visible: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` tracks whose motions differ, so that a few tell what moves and how.

    A track's probability is proportional to the square of how far it strays from the nearest motion drawn before, at
    least `NOISE_FLOOR_PX`, as centres are drawn in k-means++ (Arthur and Vassilvitskii, 2007).

    Args:
        points: (N, T, 2) pixels.
        visible: (N, T) bool.
        weights: (N,) of the first draw; only tracks with a positive one are ever drawn, and there are `count` of them.
        count: Tracks to draw.
        generator: On the CPU.
    """
    path = (points - points[:, :1]).double()
    left, drawn = weights, []
    for _ in range(count):
        drawn.append(int(torch.multinomial(left, 1, generator=generator)))
        strayed = (path - path[drawn[-1]]).norm(dim=-1).masked_fill(~(visible & visible[drawn[-1]]), 0.0).amax(-1)
        novelty = strayed.clamp(min=NOISE_FLOOR_PX).square().masked_fill(weights == 0, 0.0)
        left = novelty if len(drawn) == 1 else torch.minimum(left, novelty)
        left[drawn] = 0.0
    return torch.tensor(drawn)
