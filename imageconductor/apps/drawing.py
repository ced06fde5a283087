"""What the drawing editor sends and gets: checks of values from a browser, files of tracks, preset motions.

Works without gradio. Values come from browsers, so anything may come: they are bounded before they are read.
"""

import base64
import binascii
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from imageconductor.apps.drawn_boxes import import_boxes, is_box_file
from imageconductor.conditioning import (
    CAMERA_PRESETS,
    OBJECT_PRESETS,
    PRESET_HELP,
    Trajectories,
    object_preset,
)
from imageconductor.conditioning.drawing_fields import camera_fields, scale_track, track_fields
from imageconductor.conditioning.first_frame import cover_scale
from imageconductor.conditioning.formats import TrackFile, read_tracks
from imageconductor.conditioning.presets import camera_preset_motion
from imageconductor.conditioning.trajectory_json import check_size
from imageconductor.files import natural_order

MAX_DRAWN_TRACKS = 256
"""Default for the largest number of tracks of a drawing, those of its camera included."""

MAX_DRAWN_POINTS = 8192
"""Default for the largest number of points of all tracks of a drawing."""

MAX_SIDE_PX = 1 << 16
"""Longest side of a picture that can be drawn on."""

MAX_IMPORT_BYTES = 8 << 20
"""Largest size of the track files that are imported at once."""

_MAX_IMPORT_FILES = 256
_MAX_TEXT = 200  # characters of a key or a text value; notes may have more
_MAX_NOTE = 2000
_MAX_DEPTH = 5  # of the point's numbers: drawing, tracks, track, points, point
_KEYS_PER_TRACK = 16

# Control points that an object preset needs, so that the curve through them is the preset's path.
_PRESET_POINTS = {"arc": 5, "s-curve": 9, "shake": 13, "shaking-line": 13, "line-and-back": 3}
_CORNERED = ("line-and-back",)


def check_drawing_value(
    value: object,
    num_frames: int,
    max_tracks: int = MAX_DRAWN_TRACKS,
    max_points: int = MAX_DRAWN_POINTS,
    *,
    size: tuple[int, int] | None = None,
) -> Trajectories:
    """The tracks of an editor's value, checked as a trajectory file is; those of its camera last.

    Args:
        value: what the browser sent.
        num_frames: T.
        max_tracks: largest number of tracks, those of the camera included.
        max_points: largest number of control points of all tracks.
        size: (W, H) of the picture, which the value must state; None = any.

    Returns:
        The tracks in pixels of the picture; none if nothing is drawn.

    Raises:
        ValueError: no picture yet, or a value that is no drawing; says what is wrong.
    """
    if value is None or value == "":
        raise ValueError("there is no picture yet: choose one, then draw on it")
    if not isinstance(value, dict):
        raise ValueError(f"a drawing must be an object with width, height and tracks, got {type(value).__name__}")
    fields = cast("dict[str, Any]", value)
    _check_counts(fields, max_tracks, max_points)
    _check_extent(fields, max_tracks, max_points)
    drawn_on = check_size((fields.get("width"), fields.get("height")), "drawing")
    if max(drawn_on) > MAX_SIDE_PX:
        raise ValueError(
            f"drawing: a picture may be {MAX_SIDE_PX} pixels wide and high, got {drawn_on[0]}x{drawn_on[1]}"
        )
    if size is not None and drawn_on != tuple(size):
        raise ValueError(
            f"the drawing belongs to a picture of {drawn_on[0]}x{drawn_on[1]} pixels and not to this one of "
            f"{size[0]}x{size[1]}; draw it again"
        )
    return Trajectories.from_drawing(fields, num_frames, max_tracks=max_tracks)


def _check_counts(fields: Mapping[str, Any], max_tracks: int, max_points: int) -> None:
    """Makes sure that there are not too many tracks and points, whatever they are."""
    tracks = fields.get("tracks", [])
    if not isinstance(tracks, list):
        raise ValueError(f"drawing: tracks must be a list, got {type(tracks).__name__}")
    listed = cast("list[Any]", tracks)
    if len(listed) > max_tracks:
        raise ValueError(f"the drawing has {len(listed)} tracks, at most {max_tracks} can be used; delete some")
    points = [cast("dict[str, Any]", track).get("points") if isinstance(track, dict) else track for track in listed]
    count = sum(len(cast("list[Any]", one)) for one in points if isinstance(one, list))
    if count > max_points:
        raise ValueError(f"the drawing has {count} points, at most {max_points} can be used; delete some tracks")


def _check_extent(fields: object, max_tracks: int, max_points: int) -> None:
    """Bounds the rest of a value, so that reading it and telling what is wrong with it stay cheap."""
    budget = 4 * max_points + _KEYS_PER_TRACK * (max_tracks + 2)
    left: list[tuple[object, int, bool]] = [(fields, 0, False)]
    while left:
        node, depth, is_note = left.pop()
        budget -= 1
        if budget < 0 or depth > _MAX_DEPTH:
            raise ValueError("the drawing holds more than tracks and their points; clear it and draw again")
        if isinstance(node, dict):
            members = cast("dict[Any, Any]", node)
            if any(len(str(key)) > _MAX_TEXT for key in members):
                raise ValueError(f"drawing: a key is longer than {_MAX_TEXT} characters")
            left += [(member, depth + 1, key == "note") for key, member in members.items()]
        elif isinstance(node, (list, tuple)):
            left += [(member, depth + 1, False) for member in cast("Sequence[Any]", node)]
        elif isinstance(node, str) and len(node) > (_MAX_NOTE if is_note else _MAX_TEXT):
            raise ValueError(f"drawing: a text of {len(node)} characters is too long")
        elif isinstance(node, int) and abs(node) >= 1 << 64:
            raise ValueError("drawing: a number is too large")


def import_tracks(request: object) -> dict[str, Any]:
    """Tracks and boxes of files that a browser sends, as the editor's value: what the editor's import button calls.

    Args:
        request: {"files": [{"name": file name, "data": base64}, ...], "size": [W, H] of the picture,
            "video_size": [W, H] or null, "num_frames": T, "max_objects": of the model, or null, "max_tracks" and
            "max_points": of the drawing, of which more are thinned out}.

    Returns:
        {"drawing": value, "objects": boxes of the value, "notes": [line, ...]}, without "drawing" or "objects" where no
        file holds tracks or boxes; or {"error": what is wrong}.
    """
    try:
        if not isinstance(request, dict):
            raise ValueError("no track file was sent")
        fields = cast("dict[str, Any]", request)
        picture = check_size(fields.get("size"), "picture")
        video = fields.get("video_size")
        num_frames, max_objects = fields.get("num_frames"), fields.get("max_objects")
        if not isinstance(num_frames, int) or isinstance(num_frames, bool) or not 1 <= num_frames <= 4096:
            raise ValueError("num_frames must be a whole number from 1 to 4096")
        published = None if video is None else check_size(video, "video_size")
        answer: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                paths = _write_files(Path(folder), fields.get("files"))
                boxes = [path for path in paths if is_box_file(path)]
                if len(boxes) > 1:
                    raise ValueError("choose one file of boxes")
                if boxes:
                    most = max_objects if isinstance(max_objects, int) else None
                    answer["objects"] = import_boxes(boxes[0], picture, published, num_frames, most)
                    paths.remove(boxes[0])
                file = _read_drawn(paths, picture, published, num_frames) if paths else None
            except (ValueError, OSError) as error:
                raise ValueError(str(error).replace(f"{folder}/", "")) from None
            notes = [] if file is None else [note.replace(f"{folder}/", "") for note in file.notes]
        if file is not None:
            most = (
                _read_bound(fields.get("max_tracks"), MAX_DRAWN_TRACKS),
                _read_bound(fields.get("max_points"), MAX_DRAWN_POINTS),
            )
            answer["drawing"] = drawing_value(file, picture, num_frames, published)
            notes += _thin_tracks(answer["drawing"], 0 if file.camera is None else file.camera.num_tracks, *most)
            check_drawing_value(answer["drawing"], num_frames, *most)
    except ValueError as error:
        return {"error": str(error)[:1000]}
    return {**answer, "notes": notes}


def _read_bound(value: object, most: int) -> int:
    """A bound that a browser sent, or the most where it sent none that is lower."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < most else most


def _thin_tracks(value: dict[str, Any], num_camera: int, max_tracks: int, max_points: int) -> list[str]:
    """Keeps every k-th track of an editor's value, so that it has no more than can be used; says so in a note.

    Args:
        value: Whose tracks are changed.
        num_camera: Tracks of its camera, which count too.
        max_tracks: Largest number of tracks.
        max_points: Largest number of their points.
    """
    tracks = cast("list[dict[str, Any]]", value["tracks"])
    kept, every = tracks, 1
    while len(kept) > 1 and (
        len(kept) + num_camera > max_tracks or sum(len(track["points"]) for track in kept) > max_points
    ):
        every += 1
        kept = tracks[::every]
    value["tracks"] = kept
    if every == 1:
        return []
    return [f"Of {len(tracks)} tracks {len(kept)} are kept, one of every {every}: more cannot be used here."]


def _read_drawn(
    paths: list[Path], picture: tuple[int, int], video: tuple[int, int] | None, num_frames: int
) -> TrackFile:
    return read_tracks(
        paths[0] if len(paths) == 1 else paths,
        image_size=picture,
        published_size=video or picture,
        num_frames=num_frames,
        max_tracks=MAX_DRAWN_TRACKS,
    )


def drawing_value(
    file: TrackFile, picture: tuple[int, int], num_frames: int, video_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The editor's value with the tracks of a file, moved from the file's frame onto the picture.

    The file's frame and the picture are both cover-cropped to the video, as sample.py does it; where they have one
    shape, that is a resize.

    Args:
        file: from `read_tracks`.
        picture: (W, H).
        num_frames: frames of the video, for files that do not say in how many they count.
        video_size: (W, H) of the video; None = the file's frame.
    """
    video = video_size or file.size
    scale = cover_scale(file.size, video) / cover_scale(picture, video)
    shift = ((picture[0] - file.size[0] * scale) / 2, (picture[1] - file.size[1] * scale) / 2)
    tracks = file.tracks
    if file.size != picture:
        tracks = [scale_track(track, scale, shift, picture) for track in tracks]
    value: dict[str, Any] = {
        "width": picture[0],
        "height": picture[1],
        "num_frames": file.num_frames or num_frames,
        "tracks": [track_fields(track, picture) for track in tracks],
    }
    if file.camera is not None:
        value["camera"] = camera_fields(file.camera)
    return value


def list_presets() -> dict[str, list[dict[str, Any]]]:
    """The preset motions for the editor's menu.

    Returns:
        "camera": name, help and the camera's amounts; "object": name, help and the control points of the path, from
        (0, 0), in parts of the picture's shorter side, with the interpolation where it is not a curve.
    """
    cameras = [
        {"name": name, "help": PRESET_HELP[name], "camera": camera_fields(camera_preset_motion(name))}
        for name in CAMERA_PRESETS
    ]
    objects: list[dict[str, Any]] = []
    side = 1000  # of a frame large enough that no path is shortened
    for name in OBJECT_PRESETS:
        path = object_preset(name, (side, side), _PRESET_POINTS.get(name, 2), start=(side / 2, side / 2))
        offsets = (path.points[0] - side / 2) / side
        entry = {
            "name": name,
            "help": PRESET_HELP[name],
            "points": [[round(x, 5) for x in p] for p in offsets.tolist()],
        }
        objects.append({**entry, "interpolation": "linear"} if name in _CORNERED else entry)
    return {"camera": cameras, "object": objects}


def _write_files(folder: Path, files: object) -> list[Path]:
    """The files of a request in a folder, under names without anything that could lead out of it."""
    listed = cast("list[Any]", files) if isinstance(files, list) else []
    if not listed or len(listed) > _MAX_IMPORT_FILES:
        raise ValueError(f"choose one to {_MAX_IMPORT_FILES} track files")
    total, paths = 0, list[Path]()
    for n, member in enumerate(listed):
        file = cast("dict[str, Any]", member) if isinstance(member, dict) else {}
        name, data = file.get("name"), file.get("data")
        if not isinstance(name, str) or not isinstance(data, str):
            raise ValueError("a track file needs a name and its content")
        total += len(data) * 3 // 4
        if total > MAX_IMPORT_BYTES + 4:
            raise ValueError(f"these files are larger than {MAX_IMPORT_BYTES >> 20} MiB; keep fewer tracks or frames")
        safe = re.sub(r"[^\w.-]", "_", name.replace("\\", "/").rsplit("/", 1)[-1])[-100:].lstrip(".") or f"tracks-{n}"
        path = folder / safe
        if path.exists():
            raise ValueError(f"two files are named {safe}")
        try:
            path.write_bytes(base64.b64decode(data, validate=True))
        except binascii.Error:
            raise ValueError(f"{safe} arrived damaged; choose it again") from None
        paths.append(path)
    return sorted(paths, key=lambda path: natural_order(path.stem))
