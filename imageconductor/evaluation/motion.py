"""Motion metrics of one video.

CamMC and ObjMC are the paper's (section C.2): the mean Euclidean distance between the requested trajectory and the
tracked one, in pixels. MotionCtrl's CamMC compares camera poses and is another quantity of the same name.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.floating]  # (N, T, 2) pixels
Mask = NDArray[np.bool_]  # (N, T)


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
