"""Tracks as files hold them, our JSON form, and checks whose messages name the track and the point.

`formats` reads files, `interpolation.py` gives one point per frame. Messages count tracks and points from 0, as JSON
tools do.
"""

import json
import re
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from imageconductor.conditioning.camera import CameraMotion
from imageconductor.conditioning.checks import check_keys, suggest
from imageconductor.conditioning.timing import STEADY, Timing
from imageconductor.files import write_text

ADVICE = (
    'trajectories are read as JSON: {"width": W, "height": H, "tracks": [{"points": [[x, y], ...]}, ...]} or '
    "[[[x, y], ...], ...]; docs/formats.md lists the files of other tools that are read"
)

MAX_FILE_TRACKS = 4096
"""Largest number of tracks that is read from a file."""

MAX_FILE_FRAMES = 4096
"""Largest number of points in a track of a file, and of frames that a drawing may count in."""

BORDER_PX = 1 / 64
"""Points on the right or lower border are moved this far below W, which is exact in float32 too."""

FARTHEST_MEASURED_PX = 1e9
"""Measured positions beyond are taken for damage; products with picture sizes stay finite."""

PUBLISHED_SIZE = (384, 256)
"""(W, H) of the published release, whose JSON form states no size."""

TRACK_CONTROLS = ("camera", "object")
"""What a track may say that it moves, by the code in `Trajectories.control`."""

_NOTE = "note"  # free text, since JSON has no comments
_FILE_KEYS = ("width", "height", "num_frames", "tracks", "camera", _NOTE)
_TRACK_KEYS = (
    *("points", "visible", "start", "end", "easing", "times", "interpolation", "control", "outside"),
    _NOTE,
)
_CAMERA_KEYS = ("pan", "zoom", "roll", "start", "end", "easing", "returns", "grid", _NOTE)


@dataclass(frozen=True)
class Track:
    """One track of a file.

    Attributes:
        points: (K, 2) float64, xy in pixels; K = 1 means "hold still".
        visible: (K,) bool.
        timing: when the motion takes place.
        interpolation: the curve through the points, of which straight lines keep their corners.
        control: one of `TRACK_CONTROLS`; None = the track does not say what it moves.
        hides_outside: whether the track is invisible outside the frame, which it may enter and leave.
        per_frame: whether points are those of K frames, measured or sampled, and not control points of a curve.
    """

    points: npt.NDArray[np.float64]
    visible: npt.NDArray[np.bool_]
    timing: Timing = STEADY
    interpolation: Literal["pchip", "linear"] = "pchip"
    control: str | None = None
    hides_outside: bool = False
    per_frame: bool = False


@dataclass(frozen=True)
class Drawing:
    """What a file holds.

    Attributes:
        tracks: the drawn tracks.
        size: (W, H) of the frame they are drawn in.
        num_frames: frames of the clip in which `start`, `end` and `times` count.
        camera: motion of the camera, whose tracks come after the drawn ones; None = not stated.
    """

    tracks: list[Track]
    size: tuple[int, int]
    num_frames: int
    camera: CameraMotion | None = None


def check_size(size: object, source: str = "size") -> tuple[int, int]:
    """`size` as (W, H).

    Raises:
        ValueError: it is not a pair of positive whole numbers; names `source`.
    """
    values = list(cast("Sequence[Any]", size)) if isinstance(size, (list, tuple)) else []
    if len(values) != 2 or not all(
        isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v > 0 for v in values
    ):
        raise ValueError(f"{source}: frame size must be (width, height), two positive whole numbers, got {size!r}")
    return int(values[0]), int(values[1])


def parse_size(text: str, source: str = "size") -> tuple[int, int]:
    """(W, H) of a text such as 576x320.

    Raises:
        ValueError: it is not two positive whole numbers; names `source`.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    if match is None:
        raise ValueError(f"{source} must be WIDTHxHEIGHT in pixels, such as 576x320, got {text!r}")
    return check_size((int(match[1]), int(match[2])), source)


def check_tracks(
    tracks: object, size: tuple[int, int], max_tracks: int, source: str, num_frames: int = 1, *, is_closed: bool = False
) -> list[Track]:
    """The control points of every track, each a finite [x, y] inside the frame.

    Args:
        tracks: list of tracks; a track is a list of [x, y] pixels, or {"points": [[x, y], ...]} with the further keys
            that docs/trajectories.md lists. Tracks that state their visibility were measured, not drawn, and may leave
            the frame, as those with "outside" may.
        size: (W, H). A point is inside if 0 <= x < W and 0 <= y < H.
        max_tracks: largest number of tracks accepted.
        source: name at the start of messages, such as that of the file.
        num_frames: frames of the clip in which tracks count their times.
        is_closed: x = W and y = H count as inside, and are moved below it.

    Raises:
        ValueError: malformed tracks; names source, track and point.
    """
    listed = as_list(tracks)
    if listed is None:
        raise ValueError(f"{source}: expected a list of tracks, got {abbreviate(tracks)}")
    check_count(len(listed), max_tracks, source)
    checked = [
        _check_track(track, size, f"{source}: track {n}", num_frames, is_closed) for n, track in enumerate(listed)
    ]
    if not is_closed:
        return checked
    limit = np.asarray(size) - BORDER_PX
    return [replace(track, points=np.minimum(track.points, limit)) for track in checked]


def check_count(num_tracks: int, max_tracks: int, source: str) -> None:
    """Makes sure that a file does not hold more tracks than are accepted.

    Raises:
        ValueError: it does; says how to thin them out.
    """
    if num_tracks > max_tracks:
        every = -(-num_tracks // max_tracks)
        command = f" (imageconductor convert --every {every})" if num_tracks <= MAX_FILE_TRACKS else ""
        raise ValueError(
            f"{source}: {num_tracks} tracks, at most {max_tracks} are accepted; "
            f"draw fewer, or keep one in {every}{command}"
        )


def check_drawing(
    fields: dict[str, Any], size: tuple[int, int] | None, max_tracks: int, source: str, num_frames: int
) -> Drawing:
    """What a file in our form draws; docs/trajectories.md lists its keys.

    Args:
        fields: the file.
        size: (W, H) of the frame of a file that states only the motion of the camera; None = 384x256.
        max_tracks: largest number of tracks accepted, those of the camera's motion included.
        source: name at the start of messages.
        num_frames: frames of the video, in which the times of files that do not state "num_frames" count.

    Raises:
        ValueError: malformed content; names source, track and key.
    """
    has_frame = "tracks" in fields or "camera" not in fields or "width" in fields or "height" in fields
    needed = ("width", "height") if "camera" in fields else ("width", "height", "tracks")
    if missing := [key for key in needed if has_frame and key not in fields]:
        raise ValueError(f"{source}: lacks {', '.join(missing)}; it has {abbreviate(list(fields))}; {ADVICE}")
    check_keys(fields, _FILE_KEYS, source)
    drawn_at = check_size((fields["width"], fields["height"]) if has_frame else size or PUBLISHED_SIZE, source)
    if "num_frames" in fields:
        counted: object = fields["num_frames"]
        if not isinstance(counted, int) or isinstance(counted, bool) or not 1 <= counted <= MAX_FILE_FRAMES:
            raise ValueError(
                f"{source}: num_frames must be a whole number from 1 to {MAX_FILE_FRAMES}, got {abbreviate(counted)}"
            )
        num_frames = counted
    camera = None
    if "camera" in fields:
        camera = _check_camera(fields["camera"], f"{source}: camera", num_frames)
        if camera.num_tracks > max_tracks:
            raise ValueError(
                f"{source}: camera: grid has {camera.num_tracks} tracks, at most {max_tracks} are accepted"
            )
        max_tracks -= camera.num_tracks
    tracks = check_tracks(fields.get("tracks", []), drawn_at, max_tracks, source, num_frames)
    return Drawing(tracks, drawn_at, num_frames, camera)


def fill_padding(points: npt.NDArray[np.float64], visible: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The points of a measured track, with positions between the known neighbours in place of padding.

    Hidden points at (0, 0), at (-1, -1) or without a number are padding. A track of nothing else is zeros.

    Args:
        points: (T, 2).
        visible: (T,) bool.
    """
    is_finite = (np.abs(points) < FARTHEST_MEASURED_PX).all(-1)  # False for NaN
    is_padding = ~visible & (~is_finite | (points == 0).all(-1) | (points == -1).all(-1))
    if not is_padding.any():
        return points
    gaps, known = np.flatnonzero(is_padding), np.flatnonzero(~is_padding)
    filled = np.where(is_padding[:, None], 0.0, points)
    for axis in (0, 1) if len(known) else ():
        filled[gaps, axis] = np.interp(gaps, known, points[known, axis])
    return filled


def write_trajectory_json(path: str | Path, tracks: Sequence[Track], size: tuple[int, int]) -> None:
    """Writes our JSON form atomically, with "visible" only for tracks that are hidden or outside the frame somewhere.

    Raises:
        ValueError: a point is not finite.
    """
    entries: list[dict[str, Any]] = []
    for n, track in enumerate(tracks):
        if not np.isfinite(track.points).all():
            raise ValueError(f"{path}: track {n} has points that are not finite; drop or fill them before saving")
        entry: dict[str, Any] = {"points": track.points.tolist()}
        inside = (track.points >= 0) & (track.points < np.asarray(size))
        if not (track.visible.all() and inside.all()):
            entry["visible"] = track.visible.tolist()
        if track.control is not None:
            entry["control"] = track.control
        entries.append(entry)
    write_text(path, json.dumps({"width": size[0], "height": size[1], "tracks": entries}))


def _check_track(track: object, size: tuple[int, int], where: str, num_frames: int, is_closed: bool) -> Track:
    fields: dict[str, Any] = {}
    if isinstance(track, dict):
        fields = cast("dict[str, Any]", track)
        check_keys(fields, _TRACK_KEYS, where)
        track = fields.get("points")
    flags, outside = fields.get("visible"), fields.get("outside", False)
    points = as_list(track)
    if points is None:
        raise ValueError(f"{where} must be a list of [x, y] points, got {abbreviate(track)}")
    if not points:
        raise ValueError(f"{where} has no points; a track needs at least one")
    if not isinstance(outside, bool):
        raise ValueError(f"{where}: outside must be true or false, got {abbreviate(outside)}")
    frame = size if flags is None and not outside else None
    controls = [_check_point(point, frame, f"{where}, point {k}", is_closed) for k, point in enumerate(points)]
    visible = [True] * len(points) if flags is None else as_list(flags)
    if visible is None or len(visible) != len(points) or not all(isinstance(v, (bool, np.bool_)) for v in visible):
        raise ValueError(f"{where}: visible must be a list of {len(points)} booleans, got {abbreviate(flags)}")
    interpolation, control = fields.get("interpolation", "pchip"), fields.get("control")
    for key, value, known in (
        ("interpolation", interpolation, ("pchip", "linear")),
        ("control", control, TRACK_CONTROLS),
    ):
        if value not in known and key in fields:
            raise ValueError(f"{where}: {key} must be {' or '.join(known)}, got {value!r}{suggest(value, known)}")
    timing = _check_timing(fields, where, num_frames, len(points))
    is_measured, at, seen = flags is not None, np.asarray(controls, np.float64), np.asarray(visible, np.bool_)
    at = fill_padding(at, seen) if is_measured else at
    return Track(at, seen, timing, interpolation, control, outside, per_frame=is_measured and len(points) > 1)


def _check_timing(fields: dict[str, Any], where: str, num_frames: int, num_points: int | None = None) -> Timing:
    """When the motion of a track of `num_points` points takes place, or that of the camera."""
    given = {key: fields[key] for key in ("start", "end", "easing", "times") if key in fields}
    if num_points == 1 and given:
        raise ValueError(f"{where} is a single point, which holds still; {next(iter(given))} needs two or more points")
    if (times := as_list(given.get("times"))) is not None:
        given["times"] = tuple(times)
        if len(times) != num_points:
            raise ValueError(f"{where}: times must be {num_points} frames, one for each point, got {len(times)}")
    try:
        timing = Timing(**given)
        timing.check_frames(num_frames)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return timing


def _check_camera(camera: object, where: str, num_frames: int) -> CameraMotion:
    if not isinstance(camera, dict):
        raise ValueError(f'{where} must be an object such as {{"pan": [0.2, 0]}}, got {abbreviate(camera)}')
    fields = cast("dict[str, Any]", camera)
    check_keys(fields, _CAMERA_KEYS, where)
    amounts = {key: fields[key] for key in ("pan", "zoom", "roll", "returns", "grid") if key in fields}
    for key in ("pan", "grid"):
        if (pair := as_list(amounts.get(key))) is not None:
            amounts[key] = tuple(pair)
    timing = _check_timing(fields, where, num_frames)
    try:
        return CameraMotion(**amounts, timing=timing)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_point(point: object, size: tuple[int, int] | None, where: str, is_closed: bool) -> list[float]:
    values = as_list(point)
    if values is None or len(values) != 2 or not all(is_number(v) for v in values):
        raise ValueError(f"{where} must be [x, y], two numbers, got {abbreviate(point)}")
    # The bound also excludes integers too large for a float, and NaN, which fails every comparison.
    if not all(abs(v) <= sys.float_info.max for v in values):
        raise ValueError(f"{where} must be finite, got {abbreviate(point)}")
    x, y = float(values[0]), float(values[1])
    if size is not None and not (0 <= x < size[0] and 0 <= y < size[1]) and not (is_closed and _touches(x, y, size)):
        end = "]" if is_closed else ")"
        raise ValueError(
            f"{where} at ({x:g}, {y:g}) lies outside the {size[0]}x{size[1]} frame; "
            f"x must be in [0, {size[0]}{end} and y in [0, {size[1]}{end}"
        )
    return [x, y]


def _touches(x: float, y: float, size: tuple[int, int]) -> bool:
    return 0 <= x <= size[0] and 0 <= y <= size[1]


def is_number(value: object) -> bool:
    """Whether it is a real number; booleans are not."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def as_list(value: object) -> list[Any] | None:
    """The members of a list, a tuple or an array; None for anything else."""
    return list(cast("Sequence[Any]", value)) if isinstance(value, (list, tuple, np.ndarray)) else None


_REPR = reprlib.Repr()  # of nested lists of any depth and length
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxother = 5, 20, 20, 80, 80


def abbreviate(value: object) -> str:
    """What a message shows of a value, at most 80 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
