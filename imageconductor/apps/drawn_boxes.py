"""Boxes of the drawing editor: its value's "objects", and boxes files that it imports.

The value holds them as the JSON form of `conditioning.box_files` does, in pixels of the picture: key boxes at frames,
of which the value's "num_frames" says in how many they count. Works without gradio, as `drawing` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from imageconductor.conditioning import Boxes
from imageconductor.conditioning.box_files import MAX_FILE_OBJECTS, BoxObject, check_boxes, place_boxes
from imageconductor.conditioning.first_frame import cover_scale
from imageconductor.conditioning.trajectory_json import MAX_FILE_FRAMES, abbreviate
from imageconductor.files import read_text

MAX_NAME_CHARS = 60
"""Longest class name that a browser may send; text encoders read fewer tokens than that, of which the model tells."""

_MAX_KEY = 200  # characters, as in drawing.py
_MAX_NOTE = 2000
_THIN_PX = 0.5  # how far boxes may move when keys are left out that the curves between the others pass


def check_drawn_boxes(value: Mapping[str, Any], num_frames: int, max_objects: int | None) -> Boxes | None:
    """The boxes of an editor's value in pixels of the picture, checked as a boxes file is; None = it has none.

    Args:
        value: what the browser sent; its tracks are not looked at.
        num_frames: T; key boxes that count in another number stay in the same part of the clip.
        max_objects: of the model's object gates; None = it has none.

    Raises:
        ValueError: malformed boxes, or boxes that the model cannot take; says what is wrong.
    """
    objects = value.get("objects")
    if objects is None or objects == []:
        return None
    if max_objects is None:
        raise ValueError("boxes need object gates, which this model does not have; delete the boxes")
    if not isinstance(objects, list):
        raise ValueError(f"drawing: objects must be a list, got {type(objects).__name__}")
    listed = cast("list[Any]", objects)
    if len(listed) > max_objects:
        raise ValueError(f"the drawing has {len(listed)} boxes, this model takes at most {max_objects}; delete some")
    for n, one in enumerate(listed, 1):
        _check_entry(one, n)
    counted = value.get("num_frames", num_frames)
    content = {key: value.get(key) for key in ("width", "height")} | {"num_frames": counted, "objects": listed}
    file = check_boxes(content, counted, "drawing", max_objects)
    return Boxes.from_objects(retime_objects(file.objects, counted, num_frames), file.size, num_frames)


def without_boxes(value: Any) -> Any:
    """The value without its boxes: what a trajectory file holds. What is no drawing comes back as it is."""
    if not isinstance(value, dict):
        return value
    return {key: member for key, member in cast("dict[str, Any]", value).items() if key != "objects"}


def retime_objects(objects: Sequence[BoxObject], counted: int, num_frames: int) -> list[BoxObject]:
    """Objects that count in `counted` frames, in a clip of T: each key at the nearest frame, which keeps one.

    The editor's script does the same (`countBoxesIn` of boxes.js).
    """
    if counted == num_frames:
        return list(objects)
    factor = (num_frames - 1) / max(counted - 1, 1)
    moved = list[BoxObject]()
    for one in objects:
        nearest: dict[int, tuple[float, int]] = {}
        for k, frame in enumerate(range(counted) if one.frames is None else one.frames):
            place = math.floor(frame * factor + 0.5)
            distance = abs(frame * factor - place)
            if place not in nearest or distance < nearest[place][0]:
                nearest[place] = distance, k
        kept = [k for _, k in nearest.values()]
        moved.append(BoxObject(one.name, one.boxes[kept], one.present[kept], tuple(nearest)))
    return moved


def is_box_file(path: Path) -> bool:
    """Whether a file holds boxes in our JSON form, or means to."""
    if path.suffix.lower() != ".json":
        return False
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "objects" in content


def import_boxes(
    path: Path, picture: tuple[int, int], video: tuple[int, int] | None, num_frames: int, max_objects: int | None
) -> list[dict[str, Any]]:
    """The "objects" of the editor's value with the boxes of a file, moved from the file's frame onto the picture.

    Both are cover-cropped to the video, as sample.py does it. Boxes of each frame become few key boxes.

    Args:
        path: `is_box_file`.
        picture: (W, H).
        video: (W, H); None = the file's frame.
        num_frames: T, in which the result counts.
        max_objects: of the model's object gates; None = it has none.

    Raises:
        ValueError: malformed content, or boxes that the model cannot take.
    """
    if max_objects is None:
        raise ValueError(f"{path}: holds boxes, for which this model has no object gates; choose a file of tracks")
    content: Any = json.loads(read_text(path))
    counted = content.get("num_frames", num_frames)
    file = check_boxes(content, counted, str(path), min(max_objects, MAX_FILE_OBJECTS))
    for n, one in enumerate(file.objects, 1):
        _check_name(one.name, n)
    objects = [_thin(one, file.size) if one.frames is None else one for one in file.objects]
    if file.size != picture:
        video = video or file.size
        scale = cover_scale(file.size, video) / cover_scale(picture, video)
        objects = [_move(one, file.size, scale, picture) for one in objects]
    return [_to_json(one) for one in retime_objects(objects, counted, num_frames)]


def fit_boxes(objects: Sequence[Mapping[str, Any]], old: tuple[int, int], new: tuple[int, int]) -> list[dict[str, Any]]:
    """Checked objects of a value on a picture of another size: each side stays at its part of the width or height."""
    scale = np.asarray([*new, *new]) / np.asarray([*old, *old])

    def move(box: Any) -> list[float] | None:
        return None if box is None else np.minimum(np.asarray(box, np.float64) * scale, [*new, *new]).tolist()

    return [{**one, "boxes": [move(box) for box in one["boxes"]]} for one in objects]


def _check_entry(one: object, n: int) -> None:
    """Bounds what a browser sent as an object, counted as the editor counts, before it is read as one of a file is."""
    if not isinstance(one, dict):
        raise ValueError(f"box {n} must be an object with name, boxes and frames, got {abbreviate(one)}")
    fields = cast("dict[Any, Any]", one)
    if any(len(str(key)) > _MAX_KEY for key in fields):
        raise ValueError(f"box {n}: a key is longer than {_MAX_KEY} characters")
    note = fields.get("note", "")
    if not isinstance(note, str) or len(note) > _MAX_NOTE:
        raise ValueError(f"box {n}: a note must be a text of at most {_MAX_NOTE} characters")
    keys = [cast("list[Any]", fields[key]) for key in ("boxes", "frames") if isinstance(fields.get(key), list)]
    if any(len(key) > MAX_FILE_FRAMES for key in keys):
        raise ValueError(f"box {n} has more than {MAX_FILE_FRAMES} key boxes")
    _check_name(fields.get("name"), n)


def _check_name(name: object, n: int) -> None:
    """Refuses the name of a box, counted as the editor counts, that is missing or long."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"box {n} has no name; choose it and type what it shows, such as dog")
    if len(name) > MAX_NAME_CHARS:
        raise ValueError(f"the name of box {n} has {len(name)} characters, at most {MAX_NAME_CHARS} are taken")


def _thin(one: BoxObject, size: tuple[int, int]) -> BoxObject:
    """An object with key boxes in place of a box for each frame, of which some are left out.

    Where it appears or is absent stays exactly so; boxes move by at most half a pixel.
    """
    num_frames = len(one.boxes)
    frames = [t for t in range(num_frames) if t == 0 or one.present[t] or one.present[t - 1]]
    keys = replace(one, boxes=one.boxes[frames], present=one.present[frames], frames=tuple(frames))
    if num_frames > 64:  # the search below takes a time that grows with its third power
        return keys
    for frame in frames[1:-1]:
        left = [k for k, other in enumerate(cast("tuple[int, ...]", keys.frames)) if other != frame]
        fewer = replace(
            keys,
            boxes=keys.boxes[left],
            present=keys.present[left],
            frames=tuple(cast("tuple[int, ...]", keys.frames)[k] for k in left),
        )
        placed, present = place_boxes(fewer, size, num_frames)
        if (present == one.present).all() and (abs(placed - one.boxes)[present] <= _THIN_PX).all():
            keys = fewer
    return keys


def _move(one: BoxObject, size: tuple[int, int], scale: float, picture: tuple[int, int]) -> BoxObject:
    """Key boxes scaled around the frame's centre and cut at the picture's sides; those outside become absent."""
    shift = [(picture[axis] - size[axis] * scale) / 2 for axis in (0, 1)]
    boxes = np.clip(one.boxes * scale + [*shift, *shift], 0, [*picture, *picture]).round(2)
    return replace(one, boxes=boxes, present=one.present & (boxes[:, 2:] > boxes[:, :2]).all(-1))


def _to_json(one: BoxObject) -> dict[str, Any]:
    boxes = [box.tolist() if there else None for box, there in zip(one.boxes, one.present, strict=True)]
    return {"name": one.name, "boxes": boxes, "frames": list(cast("tuple[int, ...]", one.frames))}
