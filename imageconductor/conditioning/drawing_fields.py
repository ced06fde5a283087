"""Tracks and camera motions as the fields of our JSON form, with all that a drawing may state."""

from dataclasses import replace
from typing import Any

import numpy as np

from imageconductor.conditioning.camera import CameraMotion
from imageconductor.conditioning.timing import Timing
from imageconductor.conditioning.trajectory_json import BORDER_PX, Track

_DIGITS = 3  # of a pixel, where points were scaled


def track_fields(track: Track, size: tuple[int, int]) -> dict[str, Any]:
    """One member of "tracks", which `check_tracks` reads as the same track.

    A track of a point per frame becomes one of straight lines between them.

    Args:
        track: in pixels of `size`.
        size: (W, H).
    """
    fields: dict[str, Any] = {"points": track.points.tolist(), **_timing_fields(track.timing)}
    is_inside = ((track.points >= 0) & (track.points < np.asarray(size))).all()
    if not track.visible.all() or not (is_inside or track.hides_outside):
        fields["visible"] = track.visible.tolist()
    is_joined = track.per_frame and len(track.points) > 1 and "visible" not in fields  # which says the same
    if track.interpolation == "linear" or is_joined:
        fields["interpolation"] = "linear"
    if track.control is not None:
        fields["control"] = track.control
    if track.hides_outside:
        fields["outside"] = True
    return fields


def camera_fields(camera: CameraMotion) -> dict[str, Any]:
    """The content of "camera", without what is at its default."""
    still = CameraMotion()
    fields: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in (("pan", camera.pan), ("zoom", camera.zoom), ("roll", camera.roll))
        if value != getattr(still, name)
    }
    fields |= _timing_fields(camera.timing)
    if camera.returns:
        fields["returns"] = True
    if camera.grid != still.grid:
        fields["grid"] = list(camera.grid)
    return fields


def scale_track(track: Track, scale: float, shift: tuple[float, float], size: tuple[int, int]) -> Track:
    """The track in a frame of `size` (W, H), under a' = scale * a + shift with a = x + 0.5, the distance from the edge.

    Points that are still in the picture stay in [0, W); a track that was inside and no longer is may leave the frame,
    where it is invisible.
    """
    moved = np.round((track.points + 0.5) * scale + np.asarray(shift) - 0.5, _DIGITS)
    if track.hides_outside or not track.visible.all():
        return replace(track, points=moved)
    edge = np.asarray(size) - 0.5
    # Points in [W - 0.5, W) are accepted although the picture ends at W - 0.5; half a coarse pixel may lie beyond.
    slack = 0.5 * max(scale, 1) + 10**-_DIGITS
    if ((moved >= -slack) & (moved <= edge + slack)).all():
        return replace(track, points=np.minimum(np.maximum(moved, 0), np.asarray(size) - BORDER_PX))
    return replace(track, points=moved, hides_outside=True)


def _timing_fields(timing: Timing) -> dict[str, Any]:
    if timing.times is not None:
        return {"times": list(timing.times)}
    fields = {"start": timing.start, "end": timing.end, "easing": timing.easing}
    return {key: value for key, value in fields.items() if value not in (None, "linear")}
