"""Tracks of files as one point per frame: control points on a curve, points of other frame counts linearly in time."""

from typing import cast

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator  # pyright: ignore[reportMissingTypeStubs]

from imageconductor.conditioning.trajectory_json import Track

Points = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def place_track(track: Track, num_frames: int, counted_in: int | None = None) -> tuple[Points, Flags]:
    """Points (T, 2) and visibility (T,) bool of a track over T frames.

    The first and the last frame are its first and last point, unless its timing says otherwise. A frame between two
    points is visible if both of them are. A single point stays where it is.

    Args:
        track: of a file.
        num_frames: T.
        counted_in: frames of the clip in which the track's times count; None = T.

    Raises:
        ValueError: fewer than one frame.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    control, count = track.points, len(track.points)
    if count == 1:
        return np.repeat(control, num_frames, axis=0), np.repeat(track.visible, num_frames)
    if count == num_frames and track.timing.is_default:
        return control, track.visible  # Evaluating the curve could round, but a saved file must load exactly.
    knots, at = track.timing.knots(count, num_frames, counted_in or num_frames)
    # What a tracker writes for a hidden frame says nothing of where the point is.
    used = np.flatnonzero(track.visible) if track.per_frame and track.visible.any() else np.arange(count)
    if track.per_frame or track.interpolation == "linear":
        axes: list[Points] = [np.interp(at, knots[used], control[used, axis]) for axis in (0, 1)]
        points = np.stack(axes, axis=-1)
    else:
        points = cast("Points", PchipInterpolator(knots, control)(at))
    # Neither curve overshoots, but their rounding could move a border point outside the frame.
    points = np.minimum(np.maximum(points, control[used].min(axis=0)), control[used].max(axis=0))
    place = np.round(np.interp(at, knots, np.arange(count)), 9)
    return points, track.visible[np.floor(place).astype(int)] & track.visible[np.ceil(place).astype(int)]
