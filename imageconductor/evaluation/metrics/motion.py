"""Motion metrics of one video.

CamMC and ObjMC are the paper's (section C.2): the mean Euclidean distance between the requested trajectory and the
tracked one, in pixels. MotionCtrl's CamMC compares camera poses and is another quantity of the same name.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.floating]  # (N, T, 2) pixels
Mask = NDArray[np.bool_]  # (N, T)

_NEAR_RGB = 60.0  # distance at which a pixel still has a colour of the sprite world


def trajectory_error(requested: Points, tracked: Points, counted: Mask) -> float:
    """Mean distance in pixels over the counted (track, frame) pairs after frame 0; NaN if none counts.

    Raises:
        ValueError: The shapes differ; a longer track is never cut to fit.
    """
    if requested.shape != tracked.shape or requested.shape[:2] != counted.shape:
        raise ValueError(f"shapes differ: requested {requested.shape}, tracked {tracked.shape}, mask {counted.shape}")
    counted = counted[:, 1:]
    if not counted.any():
        return float("nan")
    return float(np.linalg.norm(requested - tracked, axis=-1)[:, 1:][counted].mean())


def still_error(requested: Points, counted: Mask) -> float:
    """Trajectory error of a motionless video, in which every point stays where it started."""
    return trajectory_error(requested, np.repeat(requested[:, :1], requested.shape[1], axis=1), counted)


def colour_error(
    requested: Points, counted: Mask, video: NDArray[np.uint8], colours: NDArray[np.floating], image: NDArray[np.uint8]
) -> float:
    """Mean distance in pixels between requested points and the places of their colours; NaN if no frame counts.

    For videos in which no tracker follows what is dragged. A colour's place in a frame is the median of the pixels
    that are nearest to it, as many as are near to it in `image`. So nothing is lost, and where the colour is not there
    at all the error is large.

    Args:
        requested: (N, T, 2) pixels, in the middle of what has the colour.
        counted: (N, T), the pairs that count; those of frame 0 do not.
        video: (T, H, W, 3).
        colours: (N, 3) RGB in [0, 255].
        image: (H, W, 3), the first frame of the true clip.
    """
    places = np.zeros(requested.shape)
    for n, colour in enumerate(colours):
        size = max(1, int((np.linalg.norm(image - colour, axis=-1) < _NEAR_RGB).sum()))
        for t, frame in enumerate(video):
            distances = np.linalg.norm(frame - colour, axis=-1)
            nearest = np.argpartition(distances.ravel(), size - 1)[:size]
            rows, columns = np.unravel_index(nearest, distances.shape)
            places[n, t] = np.median(columns), np.median(rows)
    return trajectory_error(requested, places, counted)


def background_displacement(tracked: Points, counted: Mask) -> float:
    """Median over points of their mean distance from where they started, in pixels; NaN if none counts."""
    distances = np.linalg.norm(tracked - tracked[:, :1], axis=-1)[:, 1:]
    means = [point[mask].mean() for point, mask in zip(distances, counted[:, 1:], strict=True) if mask.any()]
    return float(np.median(means)) if means else float("nan")


def tracked_fraction(followed: Mask, wanted: Mask) -> float:
    """Fraction of the wanted (track, frame) pairs after frame 0 that the tracker followed; NaN if none is wanted."""
    wanted = wanted[:, 1:]
    return float((followed[:, 1:] & wanted).sum() / wanted.sum()) if wanted.any() else float("nan")


def psnr(image: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    error = float(np.mean((np.asarray(image, np.float64) - reference) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))
