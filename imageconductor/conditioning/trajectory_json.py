"""Drawn tracks in the two JSON forms, and checks whose messages name the track and the point.

A file holds control points; `trajectories.py` interpolates them to one point per frame. Messages count tracks and
points from 0, as JSON tools do.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from imageconductor.conditioning.camera import CameraMotion
from imageconductor.conditioning.checks import check_keys, suggest
from imageconductor.conditioning.timing import STEADY, Timing
from imageconductor.files import read_text, write_text

_FORMS = '{"width": W, "height": H, "tracks": [{"points": [[x, y], ...]}, ...]} or [[[x, y], ...], ...]'
_ADVICE = f"trajectories are read as JSON: {_FORMS}"

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
    """Control points of one track.

    Attributes:
        points: (K, 2) float64, xy in pixels; K = 1 means "hold still".
        visible: (K,) bool.
        timing: when the motion takes place.
        interpolation: the curve through the points, of which straight lines keep their corners.
        control: one of `TRACK_CONTROLS`; None = the track does not say what it moves.
        hides_outside: whether the track is invisible outside the frame, which it may enter and leave.
    """

    points: npt.NDArray[np.float64]
    visible: npt.NDArray[np.bool_]
    timing: Timing = STEADY
    interpolation: Literal["pchip", "linear"] = "pchip"
    control: str | None = None
    hides_outside: bool = False


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


def check_tracks(tracks: object, size: tuple[int, int], max_tracks: int, source: str, num_frames: int) -> list[Track]:
    """The control points of every track, each a finite [x, y] inside the frame.

    Args:
        tracks: list of tracks; a track is a list of [x, y] pixels, or {"points": [[x, y], ...]} with the further keys
            that docs/trajectories.md lists. Tracks that state their visibility were measured, not drawn, and may leave
            the frame, as those with "outside" may.
        size: (W, H). A point is inside if 0 <= x < W and 0 <= y < H.
        max_tracks: largest number of tracks accepted.
        source: name at the start of messages, such as that of the file.
        num_frames: frames of the clip in which tracks count their times.

    Raises:
        ValueError: malformed tracks; names source, track and point.
    """
    listed = _as_list(tracks)
    if listed is None:
        raise ValueError(f"{source}: expected a list of tracks, got {_abbreviate(tracks)}")
    if len(listed) > max_tracks:
        raise ValueError(
            f"{source}: {len(listed)} tracks, at most {max_tracks} are accepted; "
            f"draw fewer, or keep one in {-(-len(listed) // max_tracks)}"
        )
    return [_check_track(track, size, f"{source}: track {n}", num_frames) for n, track in enumerate(listed)]


def read_trajectory_json(path: Path, size: tuple[int, int] | None, max_tracks: int, num_frames: int) -> Drawing:
    """What a JSON file draws.

    The published form is a bare list of tracks, whose frame is taken to be `size`, or 384x256 if that is None. Our form
    is {"width": W, "height": H, "tracks": [{"points": [[x, y], ...]}]} with further keys, which docs/trajectories.md
    lists. A file that states only the motion of the camera needs no frame and is taken to be drawn in `size` too.

    Args:
        path: the file.
        size: (W, H) of the frame of files that state none.
        max_tracks: largest number of tracks accepted, those of the camera's motion included.
        num_frames: frames of the video, in which the times of files that do not state "num_frames" count.

    Raises:
        FileNotFoundError: no such file.
        ValueError: malformed content; names file, track and point.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such trajectory file")
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"{_describe_array(path) or error}; {_ADVICE}") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); it begins {text[:20]!r}; {_ADVICE}") from error
    if found := _describe_foreign(content):
        raise ValueError(f"{path} holds {found}; {_ADVICE}")
    if isinstance(content, list):
        drawn_at = check_size(size or PUBLISHED_SIZE)
        tracks = check_tracks(cast("object", content), drawn_at, max_tracks, str(path), num_frames)
        return Drawing(tracks, drawn_at, num_frames)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a list of tracks or an object, found {_abbreviate(content)}; {_ADVICE}")
    return _check_drawing(cast("dict[str, Any]", content), size, max_tracks, str(path), num_frames)


def _check_drawing(
    fields: dict[str, Any], size: tuple[int, int] | None, max_tracks: int, source: str, num_frames: int
) -> Drawing:
    """A file in our form, by its keys."""
    has_frame = "tracks" in fields or "camera" not in fields or "width" in fields or "height" in fields
    needed = ("width", "height") if "camera" in fields else ("width", "height", "tracks")
    if missing := [key for key in needed if has_frame and key not in fields]:
        raise ValueError(f"{source}: lacks {', '.join(missing)}; it has {_abbreviate(list(fields))}; {_ADVICE}")
    check_keys(fields, _FILE_KEYS, source)
    drawn_at = check_size((fields["width"], fields["height"]) if has_frame else size or PUBLISHED_SIZE, source)
    if "num_frames" in fields:
        counted: object = fields["num_frames"]
        if not isinstance(counted, int) or isinstance(counted, bool) or counted < 1:
            raise ValueError(f"{source}: num_frames must be a whole number of at least 1, got {counted!r}")
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


def _describe_array(path: Path) -> str | None:
    """What a binary file of NumPy's holds, such as tracks of a point tracker; None for other files."""
    with path.open("rb") as file:
        if not file.read(6).startswith((b"\x93NUMPY", b"PK\x03\x04")):
            return None
    try:
        arrays: Any = np.load(path, allow_pickle=False)
        named: dict[str, Any] = {"": arrays} if isinstance(arrays, np.ndarray) else dict(arrays)
    except (ValueError, OSError, KeyError):
        return f"{path} is an archive or an array that cannot be read"
    shapes = [f"{name} {array.dtype} {array.shape}".strip() for name, array in named.items()]
    return f"{path} is a NumPy file with {', '.join(shapes)}; write each (T, 2) track by its tolist()"


def _describe_foreign(content: object) -> str | None:
    """What the content of a JSON file of another tool is; None for the forms that are read, right or wrong."""
    if isinstance(content, str):
        return f"text inside of JSON, {_abbreviate(content)}; take the outer quotation marks away"
    listed = _as_list(content)
    if listed and all(_is_xy(member) for member in listed):
        return f'one track of {len(listed)} {{"x": .., "y": ..}} points, as spline editors write them'
    if listed and all(inner and all(map(_is_xy, inner)) for inner in map(_as_list, listed)):
        return f'{len(listed)} tracks of {{"x": .., "y": ..}} points, as spline editors write them'
    if listed and all(inner and len(inner) == 2 and all(map(_is_number, inner)) for inner in map(_as_list, listed)):
        return f"one track of {len(listed)} [x, y] points without the brackets of the list of tracks around it"
    return None


def _is_xy(value: object) -> bool:
    return isinstance(value, dict) and {"x", "y"} <= cast("dict[str, Any]", value).keys()


def write_trajectory_json(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> None:
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


def _check_track(track: object, size: tuple[int, int], where: str, num_frames: int) -> Track:
    fields: dict[str, Any] = {}
    if isinstance(track, dict):
        fields = cast("dict[str, Any]", track)
        check_keys(fields, _TRACK_KEYS, where)
        track = fields.get("points")
    flags, outside = fields.get("visible"), fields.get("outside", False)
    points = _as_list(track)
    if points is None:
        raise ValueError(f"{where} must be a list of [x, y] points, got {_abbreviate(track)}")
    if not points:
        raise ValueError(f"{where} has no points; a track needs at least one")
    if not isinstance(outside, bool):
        raise ValueError(f"{where}: outside must be true or false, got {_abbreviate(outside)}")
    frame = size if flags is None and not outside else None
    controls = [_check_point(point, frame, f"{where}, point {k}") for k, point in enumerate(points)]
    visible = [True] * len(points) if flags is None else _as_list(flags)
    if visible is None or len(visible) != len(points) or not all(isinstance(v, (bool, np.bool_)) for v in visible):
        raise ValueError(f"{where}: visible must be a list of {len(points)} booleans, got {_abbreviate(flags)}")
    interpolation, control = fields.get("interpolation", "pchip"), fields.get("control")
    for key, value, known in (
        ("interpolation", interpolation, ("pchip", "linear")),
        ("control", control, TRACK_CONTROLS),
    ):
        if value not in known and key in fields:
            raise ValueError(f"{where}: {key} must be {' or '.join(known)}, got {value!r}{suggest(value, known)}")
    timing = _check_timing(fields, where, num_frames, len(points))
    return Track(
        np.asarray(controls, np.float64), np.asarray(visible, np.bool_), timing, interpolation, control, outside
    )


def _check_timing(fields: dict[str, Any], where: str, num_frames: int, num_points: int | None = None) -> Timing:
    """When the motion of a track of `num_points` points takes place, or that of the camera."""
    given = {key: fields[key] for key in ("start", "end", "easing", "times") if key in fields}
    if num_points == 1 and given:
        raise ValueError(f"{where} is a single point, which holds still; {next(iter(given))} needs two or more points")
    if (times := _as_list(given.get("times"))) is not None:
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
        raise ValueError(f'{where} must be an object such as {{"pan": [0.2, 0]}}, got {_abbreviate(camera)}')
    fields = cast("dict[str, Any]", camera)
    check_keys(fields, _CAMERA_KEYS, where)
    amounts = {key: fields[key] for key in ("pan", "zoom", "roll", "returns", "grid") if key in fields}
    for key in ("pan", "grid"):
        if (pair := _as_list(amounts.get(key))) is not None:
            amounts[key] = tuple(pair)
    timing = _check_timing(fields, where, num_frames)
    try:
        return CameraMotion(**amounts, timing=timing)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_point(point: object, size: tuple[int, int] | None, where: str) -> list[float]:
    values = _as_list(point)
    if values is None or len(values) != 2 or not all(_is_number(v) for v in values):
        raise ValueError(f"{where} must be [x, y], two numbers, got {_abbreviate(point)}")
    # The bound also excludes integers too large for a float, and NaN, which fails every comparison.
    if not all(abs(v) <= sys.float_info.max for v in values):
        raise ValueError(f"{where} must be finite, got {_abbreviate(point)}")
    x, y = float(values[0]), float(values[1])
    if size is not None and not (0 <= x < size[0] and 0 <= y < size[1]):
        raise ValueError(
            f"{where} at ({x:g}, {y:g}) lies outside the {size[0]}x{size[1]} frame; "
            f"x must be in [0, {size[0]}) and y in [0, {size[1]})"
        )
    return [x, y]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _as_list(value: object) -> list[Any] | None:
    return list(cast("Sequence[Any]", value)) if isinstance(value, (list, tuple, np.ndarray)) else None


def _abbreviate(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
