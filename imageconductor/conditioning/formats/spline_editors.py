"""The strings of spline editors: KJNodes' `coordinates` and `points_store`, and LTX's sparse tracks.

Sources: kijai/ComfyUI-KJNodes `nodes/curve_nodes.py`, Lightricks/ComfyUI-LTXVideo `sparse_tracks.py`. The editors keep
points in the closed box from 0 to W and from 0 to H; KJNodes gives a flat list where there is exactly one spline.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from imageconductor.conditioning.formats.json_files import ADVICE, has_points, is_xy
from imageconductor.conditioning.formats.track_file import Hints, TrackFile, blame_assumed_size, drawn_tracks, find_size
from imageconductor.conditioning.trajectory_json import Track, abbreviate, as_list
from imageconductor.files import write_text


def read_kjnodes(path: Path, content: object, hints: Hints) -> TrackFile:
    """KJNodes' lists of {"x": x, "y": y}, flat for one spline, nested for several; or of {"points": [...]}."""
    return _read_splines(path, content, hints, "kjnodes")


def read_ltx(path: Path, content: object, hints: Hints) -> TrackFile:
    """LTX's list of lists of {"x": x, "y": y}."""
    return _read_splines(path, content, hints, "ltx")


def write_kjnodes(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:
    """Writes the string that KJNodes' spline editor hands to other nodes: whole pixels, flat for one track."""
    lists = _whole_pixels(tracks, size)
    write_text(path, json.dumps(lists[0] if len(lists) == 1 else lists))
    return [path]


def write_ltx(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:
    """Writes the `coordinates` of LTX's sparse track editor: whole pixels, always nested."""
    write_text(path, json.dumps(_whole_pixels(tracks, size)))
    return [path]


def _read_splines(path: Path, content: object, hints: Hints, name: str) -> TrackFile:
    listed = as_list(content)
    if listed is None:
        raise ValueError(f"{path}: {name} files hold a list of points, found {abbreviate(content)}; {ADVICE}")
    splines: list[Any] = [listed] if listed and all(map(is_xy, listed)) else listed
    is_store = any(map(has_points, splines))
    lists: list[list[object]] = []
    for n, spline in enumerate(splines):
        fields = cast("dict[str, object]", spline) if isinstance(spline, dict) else {"points": spline}
        points = as_list(fields.get("points"))
        if not points or not all(map(is_xy, points)):
            raise ValueError(
                f'{path}: track {n} must be a list of {{"x": x, "y": y}}, got {abbreviate(cast("object", spline))}'
            )
        lists.append([[point["x"], point["y"]] for point in points])
    size, notes = find_size(path, hints, name)
    with blame_assumed_size(notes):
        tracks = drawn_tracks(lists, size, hints, str(path), is_sampled=not is_store)
    if any(not track.visible.all() for track in tracks):
        notes += (f"{path} has tracks of different lengths; the shorter ones end hidden",)
    return TrackFile(name, tracks, size, notes)


def _whole_pixels(tracks: Sequence[Track], size: tuple[int, int]) -> list[list[dict[str, int]]]:
    width, height = size
    return [
        [{"x": min(round(x), width - 1), "y": min(round(y), height - 1)} for x, y in track.points.tolist()]
        for track in tracks
    ]
