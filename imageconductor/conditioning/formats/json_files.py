"""JSON forms: ours, the published one, boxes, MotionPro's and DragAnything's; JSON of any tool as Python objects.

Sources of the forms: the published release (bare lists; DragNUWA's node and MOFA-Video have the same),
HiDream-ai/MotionPro `demo_sparse_flex_wh_annotation.py`, showlab/DragAnything `demo.py`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from imageconductor.conditioning.box_files import check_boxes, place_boxes
from imageconductor.conditioning.formats.track_file import (
    Hints,
    TrackFile,
    blame_assumed_size,
    check_length,
    drawn_tracks,
    find_size,
    measured_tracks,
    stated_size,
)
from imageconductor.conditioning.trajectory_json import (
    ADVICE,
    BORDER_PX,
    Track,
    abbreviate,
    as_list,
    check_drawing,
    check_tracks,
    is_number,
    write_trajectory_json,
)
from imageconductor.files import write_text

_MAX_NESTED_TEXT = 3


def parse_json(text: str, path: Path) -> Any:
    """JSON as Python objects; of spline editors' text also with ' in place of ", and JSON texts within JSON.

    Raises:
        ValueError: it is not valid; shows how it begins.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            content = json.loads(text.replace("'", '"')) if text.lstrip()[:1] == "[" and "'" in text else None
        except (ValueError, RecursionError):
            content = None
        if content is None:
            raise ValueError(f"{path}: not valid JSON ({error}); it begins {text[:20]!r}; {ADVICE}") from error
    for _ in range(_MAX_NESTED_TEXT):
        content = _parse_inner(content)
    return content


def recognise_json(content: object) -> str:
    """Name of the form that parsed JSON has; "imageconductor" and "published" for objects and lists that are no other.

    Lists of {"x": x, "y": y} are "kjnodes" whether its editor or that of LTX wrote them: they mean the same.
    """
    if isinstance(content, dict):
        fields = cast("dict[str, object]", content)
        if "traj_key_points" in fields:
            return "motionpro"
        if isinstance(fields.get("objects"), list) and "tracks" not in fields:
            return "boxes"
        is_objects = bool(fields) and all(
            isinstance(value, dict) and "trajectory" in value for value in fields.values()
        )
        return "draganything" if is_objects else "imageconductor"
    listed = as_list(content)
    return "kjnodes" if listed and any(_is_spline(member) for member in listed) else "published"


def read_ours(path: Path, content: object, hints: Hints) -> TrackFile:
    """Our form: {"width": W, "height": H, "tracks": [{"points": [[x, y], ...]}, ...]} (docs/trajectories.md)."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a list of tracks or an object, found {abbreviate(content)}; {ADVICE}")
    fields = cast("dict[str, Any]", content)
    assumed = hints.size or hints.published_size or hints.image_size
    drawing = check_drawing(fields, assumed, hints.max_tracks, str(path), hints.num_frames)
    tracks, size = _check_lengths(drawing.tracks, path), drawing.size
    notes = stated_size(path, size, hints) if "width" in fields else ()
    return TrackFile("imageconductor", tracks, size, notes, drawing.num_frames, drawing.camera)


def read_box_centres(path: Path, content: object, hints: Hints) -> TrackFile:
    """A file of boxes (docs/boxes.md): a track for each object, along the centres of its boxes."""
    stated = cast("dict[str, Any]", content).get("num_frames") if isinstance(content, dict) else None
    num_frames = hints.num_frames if stated is None else stated
    file = check_boxes(cast("object", content), num_frames, str(path), hints.max_tracks)
    points = np.zeros((len(file.objects), num_frames, 2))
    present = np.zeros(points.shape[:2], np.bool_)
    for n, one in enumerate(file.objects):
        boxes, present[n] = place_boxes(one, file.size, num_frames)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5
        points[n, present[n]] = centres.clip(0, np.asarray(file.size) - BORDER_PX)[present[n]]
    tracks = measured_tracks(points, present, hints, str(path))
    return TrackFile("boxes", tracks, file.size, stated_size(path, file.size, hints), num_frames)


def read_published(path: Path, content: object, hints: Hints) -> TrackFile:
    """The published form: a bare list of tracks, each a list of [x, y] control points."""
    if as_list(content) is None:
        return read_ours(path, content, hints)  # says what is wrong
    if found := _describe_single(content):
        raise ValueError(f"{path} holds {found}; {ADVICE}")
    return _read_controls(path, content, hints, "published")


def read_motionpro(path: Path, content: object, hints: Hints) -> TrackFile:
    """MotionPro's meta_data.json: {"traj_key_points": the published form}, in pixels of its cropped first frame."""
    return _read_controls(path, _field(path, content, "traj_key_points", "motionpro"), hints, "motionpro")


def read_draganything(path: Path, content: object, hints: Hints) -> TrackFile:
    """DragAnything's {"1": {"trajectory": [[x, y], ...]}, ...}: a point for each frame, pixels of the picture."""
    objects = list(cast("dict[str, object]", content).values()) if isinstance(content, dict) else []
    lists = [as_list(_field(path, member, "trajectory", "draganything")) or [] for member in objects]
    size, notes = find_size(path, hints, "draganything")
    with blame_assumed_size(notes):
        return TrackFile("draganything", drawn_tracks(lists, size, hints, str(path)), size, notes)


def write_ours(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:
    """Writes our form."""
    write_trajectory_json(path, tracks, size)
    return [path]


def write_published(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:  # noqa: ARG001
    """Writes the published form, which has no room for the size."""
    write_text(path, json.dumps([track.points.tolist() for track in tracks]))
    return [path]


def write_motionpro(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:  # noqa: ARG001
    """Writes MotionPro's form, which has no room for the size."""
    write_text(path, json.dumps({"traj_key_points": [track.points.tolist() for track in tracks]}))
    return [path]


def is_xy(value: object) -> bool:
    """Whether a JSON value is a spline editor's point."""
    return isinstance(value, dict) and {"x", "y"} <= cast("dict[str, Any]", value).keys()


def has_points(value: object) -> bool:
    """Whether a JSON value is a spline with its settings, as KJNodes' `points_store` holds them."""
    listed = as_list(cast("Mapping[str, object]", value).get("points")) if isinstance(value, dict) else None
    return bool(listed) and all(map(is_xy, cast("list[object]", listed)))


def _is_spline(value: object) -> bool:
    listed = as_list(value)
    return is_xy(value) or has_points(value) or (bool(listed) and all(map(is_xy, cast("list[object]", listed))))


def _read_controls(path: Path, content: object, hints: Hints, name: str) -> TrackFile:
    size, notes = find_size(path, hints, name)
    with blame_assumed_size(notes):
        tracks = _check_lengths(check_tracks(content, size, hints.max_tracks, str(path)), path)
    return TrackFile(name, tracks, size, notes)


def _check_lengths(tracks: list[Track], path: Path) -> list[Track]:
    for n, track in enumerate(tracks):
        check_length(len(track.points), f"{path}: track {n}")
    return tracks


def _field(path: Path, content: object, key: str, name: str) -> object:
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{path}: {name} files have {key!r}, found {abbreviate(cast('object', content))}")
    return cast("dict[str, object]", content)[key]


def _parse_inner(content: object) -> object:
    """The content with JSON texts in it, alone or in a list, as their objects; one that is not JSON stays."""
    if isinstance(content, list):
        return [_parse_inner(member) if isinstance(member, str) else member for member in cast("list[object]", content)]
    if isinstance(content, str):
        try:
            return json.loads(content.replace("'", '"'))
        except (ValueError, RecursionError):
            return content
    return content


def _describe_single(content: object) -> str | None:
    """What a bare list is that lacks the brackets of the list of tracks around it."""
    listed = as_list(content)
    if listed and all(inner and len(inner) == 2 and all(map(is_number, inner)) for inner in map(as_list, listed)):
        return f"one track of {len(listed)} [x, y] points without the brackets of the list of tracks around it"
    return None
