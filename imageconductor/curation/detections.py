"""Boxes of a clip from what a detector found in its footage, frame by frame."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from imageconductor.files import read_text

if TYPE_CHECKING:
    from imageconductor.conditioning.box_files import BoxFile, BoxObject
    from imageconductor.conditioning.boxes import Boxes

_FORM = '{"fps": F, "width": W, "height": H, "num_frames": T, "objects": [{"name": ..., "boxes": [...]}]}'


class BoxesError(ValueError):
    """The file of a detector's boxes is malformed; the message names it."""


def find_detections(folder: str | Path, source_id: str) -> Path | None:
    """The file of a source's boxes, `ID.json` in the folder, ID being its whole id; None if there is none."""
    path = Path(folder) / f"{source_id}.json"
    return path if path.is_file() else None


def read_detections(
    path: Path, times: Sequence[float], footage: tuple[int, int], size: tuple[int, int]
) -> tuple[bytes, int]:
    """The content of `KEY.boxes.json`, and the number of objects in it.

    Between two frames of the detector a box is interpolated where both have it; elsewhere the nearer frame decides.

    Args:
        path: Our JSON form of boxes (`conditioning.box_files`) with the rate of the detector's frames, of which frame n
            is n / fps seconds from the beginning of the footage.
        times: Of the clip's frames, in seconds from the beginning of the footage.
        footage: (W, H) as displayed; boxes of a detector that saw smaller frames are rescaled.
        size: (W, H) of the clip, which is the cover crop of the footage.

    Raises:
        BoxesError: The file is malformed.
    """
    from imageconductor.conditioning.box_files import MAX_FILE_OBJECTS  # Here, since it brings torch.

    file, num_frames, fps = _read(path)
    try:
        boxes = _at(file, num_frames, [time * fps for time in times]).resize(footage).cover_crop(size)
    except ValueError as error:
        raise BoxesError(str(error)) from error
    boxes = boxes.select([n for n in range(boxes.num_objects) if boxes.present[n].any()])
    if boxes.num_objects > MAX_FILE_OBJECTS:
        raise BoxesError(f"{path}: {boxes.num_objects} objects in the clip, at most {MAX_FILE_OBJECTS} are accepted")
    return boxes.encode(), boxes.num_objects


def check_detections(path: Path) -> None:
    """Makes sure that a file of a detector's boxes can be read.

    Raises:
        BoxesError: It is malformed.
    """
    _read(path)


def _read(path: Path) -> tuple[BoxFile, int, float]:
    """The objects, the number of the detector's frames and their rate."""
    try:
        return _parse(path)
    except ValueError as error:
        raise BoxesError(str(error)) from error


def _parse(path: Path) -> tuple[BoxFile, int, float]:
    from imageconductor.conditioning.box_files import check_boxes

    try:
        content: Any = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}; a detector's boxes are read as {_FORM}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a detector's boxes are read as {_FORM}")
    fields = cast("dict[str, Any]", content)
    fps, num_frames = fields.pop("fps", None), fields.get("num_frames")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise ValueError(f"{path}: fps must be the rate of the detector's frames, a positive number, got {fps}")
    if num_frames is None:
        raise ValueError(f"{path}: lacks num_frames, the number of the detector's frames")
    return check_boxes(fields, num_frames, str(path), are_measured=True), num_frames, fps


def _at(file: BoxFile, num_frames: int, places: Sequence[float]) -> Boxes:
    """Boxes at places between frames; behind the last frame, from half a frame on, everything is absent."""
    import torch

    from imageconductor.conditioning.boxes import Boxes

    # Only the frames around the clip, for a tracker may find thousands of objects in the footage.
    first = min(int(min(places)), num_frames - 1)
    count = min(int(max(places)) + 2, num_frames) - first
    boxes = Boxes.from_objects([_cut_out(one, first, count) for one in file.objects], file.size, count)
    last = count - 1
    at = torch.tensor(places, dtype=torch.float64)
    is_inside = at.round() < num_frames
    nearest = (at.round().long() - first).clamp(0, last)
    before = (at.floor().long() - first).clamp(0, last)
    after = (before + 1).clamp(max=last)
    weight = (at - first - before).clamp(0, 1)[:, None]
    between = boxes.xyxy[:, before] * (1 - weight) + boxes.xyxy[:, after] * weight
    both = (boxes.present[:, before] & boxes.present[:, after])[..., None]
    xyxy = torch.where(both, between, boxes.xyxy[:, nearest])
    return Boxes(xyxy, boxes.present[:, nearest] & is_inside, boxes.names, boxes.size)


def _cut_out(one: BoxObject, first: int, count: int) -> BoxObject:
    """An object in `count` frames of the detector from `first` on; absent in those that the file does not list."""
    from imageconductor.conditioning.box_files import BoxObject

    frames = np.arange(len(one.boxes)) if one.frames is None else np.asarray(one.frames)
    inside = (frames >= first) & (frames < first + count)
    boxes, present = np.zeros((count, 4)), np.zeros(count, np.bool_)
    boxes[frames[inside] - first], present[frames[inside] - first] = one.boxes[inside], one.present[inside]
    return BoxObject(one.name, boxes, present)
