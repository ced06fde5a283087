"""Boxes as files hold them: our JSON form, and SMCD's folder of a picture and a `bbox.txt`.

    {"width": 384, "height": 256, "num_frames": 16, "objects": [
        {"name": "dog", "boxes": [[x1, y1, x2, y2], null, ...]},
        {"name": "ball", "boxes": [[x1, y1, x2, y2], ...], "frames": [0, 5, 15]}]}

The first object has a box, or null where it is absent, for each frame; the second has key boxes at some frames, between
which centre and size follow PCHIP curves. Before its first key box and after its last one it stays; a null key hides it
until the next. Messages count objects and frames from 0, as JSON tools do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.interpolate import PchipInterpolator  # pyright: ignore[reportMissingTypeStubs]

from imageconductor.conditioning.checks import check_keys, check_number
from imageconductor.conditioning.trajectory_json import MAX_FILE_FRAMES, abbreviate, as_list, check_size
from imageconductor.files import read_text

MAX_FILE_OBJECTS = 256
"""Largest number of objects that is read from a file."""

_MAX_DETECTED_FRAMES = 1 << 20

_LOG = logging.getLogger(__name__)
_FILE_KEYS = ("width", "height", "num_frames", "objects", "note")
_OBJECT_KEYS = ("name", "boxes", "frames", "note")
_MEASURED_KEYS = (*_OBJECT_KEYS, "id", "score")  # what trackers and detectors add
_PICTURES = ("img.png", "img.jpg", "img.jpeg")
_FORM = '{"width": W, "height": H, "num_frames": T, "objects": [{"name": ..., "boxes": [[x1, y1, x2, y2], ...]}]}'


@dataclass(frozen=True)
class BoxObject:
    """An object of a file.

    Attributes:
        name: its class.
        boxes: (K, 4) xyxy in pixels; arbitrary where the object is absent.
        present: (K,) bool.
        frames: (K,) numbers of the key boxes' frames; None = boxes are those of K frames.
    """

    name: str
    boxes: npt.NDArray[np.float64]
    present: npt.NDArray[np.bool_]
    frames: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BoxFile:
    """What a file holds.

    Attributes:
        objects: in its order.
        size: (W, H) of the frame.
    """

    objects: list[BoxObject]
    size: tuple[int, int]


def place_boxes(
    one: BoxObject, size: tuple[int, int], num_frames: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Boxes (T, 4) of an object in each frame, and where it is present (T,).

    Centre and size of key boxes are interpolated, so that no box turns inside out; a side that a curve brings out of
    the frame is cut there.

    Raises:
        ValueError: boxes for each frame, and another number of frames.
    """
    if one.frames is None:
        if len(one.boxes) != num_frames:
            raise ValueError(f"{one.name}: {len(one.boxes)} boxes, but {num_frames} frames")
        return one.boxes, one.present
    frames, keys = np.asarray(one.frames), np.flatnonzero(one.present)
    # What holds in a frame was said by the last key before it, or by the first one.
    last = np.maximum(np.searchsorted(frames, np.arange(num_frames), side="right") - 1, 0)
    present = one.present[last]
    if not len(keys):
        return np.zeros((num_frames, 4)), present
    knots, at = frames[keys], np.minimum(np.maximum(np.arange(num_frames), frames[keys[0]]), frames[keys[-1]])
    first, second = one.boxes[keys, :2], one.boxes[keys, 2:]
    values = np.concatenate([(first + second) / 2, second - first], axis=1)
    curve = cast("npt.NDArray[np.float64]", PchipInterpolator(knots, values)(at)) if len(keys) > 1 else values[at * 0]
    centre, half = curve[:, :2], curve[:, 2:] / 2
    placed = _cut(np.concatenate([centre - half, centre + half], axis=1), size)
    nearest = np.searchsorted(knots, at)
    is_key = knots[nearest] == at
    placed[is_key] = one.boxes[keys[nearest[is_key]]]  # exactly, whatever the curve's rounding
    return placed, present


def read_boxes(path: Path, num_frames: int, name: str | None, max_objects: int | None) -> BoxFile:
    """The boxes of a file; arguments and errors as `Boxes.load`."""
    if path.is_dir() or path.suffix == ".txt":
        return _read_published(path, num_frames, name)
    if not path.is_file():
        raise FileNotFoundError(f"no boxes at {path}")
    try:
        content: object = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}; boxes are read as {_FORM}") from error
    return check_boxes(content, num_frames, str(path), max_objects)


def check_boxes(
    content: object, num_frames: int, source: str, max_objects: int | None = None, *, are_measured: bool = False
) -> BoxFile:
    """The objects of our JSON form.

    Args:
        content: of the file.
        num_frames: T of the video, in which frames of a file that does not state its own number count.
        source: name at the start of messages.
        max_objects: largest number accepted; None = `MAX_FILE_OBJECTS`.
        are_measured: boxes of a detector, which are cut at the frame and not refused; of those outside nothing is left.
            There may be any number of them, each with an `id` and a `score`, which are ignored.

    Raises:
        ValueError: malformed content; names source, object and frame.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{source}: boxes are read as {_FORM}, got {abbreviate(content)}")
    fields = cast("dict[str, Any]", content)
    check_keys(fields, _FILE_KEYS, source)
    if missing := [key for key in ("width", "height", "objects") if key not in fields]:
        raise ValueError(f"{source}: lacks {', '.join(missing)}; boxes are read as {_FORM}")
    size = check_size((fields["width"], fields["height"]), source)
    counted = fields.get("num_frames", num_frames)
    most = _MAX_DETECTED_FRAMES if are_measured else MAX_FILE_FRAMES
    if not isinstance(counted, int) or isinstance(counted, bool) or not 1 <= counted <= most:
        raise ValueError(f"{source}: num_frames must be a whole number from 1 to {most}, got {counted!r}")
    if counted != num_frames:
        raise ValueError(f"{source}: its boxes are for {counted} frames, and the video has {num_frames}")
    objects = as_list(fields["objects"])
    if objects is None:
        raise ValueError(f"{source}: objects must be a list, got {abbreviate(fields['objects'])}")
    limit = MAX_FILE_OBJECTS if max_objects is None else max_objects
    if len(objects) > limit and not are_measured:
        raise ValueError(f"{source}: {len(objects)} objects, at most {limit} are accepted; leave some out")
    checked = [
        _check_object(one, size, counted, f"{source}: object {n}", are_measured) for n, one in enumerate(objects)
    ]
    return BoxFile(checked, size)


def format_boxes(objects: Sequence[BoxObject], size: tuple[int, int], num_frames: int) -> str:
    """Our JSON form, with a box or null for each frame."""
    entries = [
        {
            "name": one.name,
            "boxes": [box.tolist() if there else None for box, there in zip(one.boxes, one.present, strict=True)],
        }
        for one in objects
    ]
    return json.dumps({"width": size[0], "height": size[1], "num_frames": num_frames, "objects": entries})


def _check_object(content: object, size: tuple[int, int], num_frames: int, where: str, are_measured: bool) -> BoxObject:
    if not isinstance(content, dict):
        raise ValueError(f'{where} must be {{"name": ..., "boxes": [...]}}, got {abbreviate(content)}')
    fields = cast("dict[str, Any]", content)
    check_keys(fields, _MEASURED_KEYS if are_measured else _OBJECT_KEYS, where)
    name: object = fields.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f'{where}: name must be the class of the object, such as "dog", got {abbreviate(name)}')
    where = f"{where} ({abbreviate(name)})"
    boxes = as_list(fields.get("boxes"))
    if not boxes:
        raise ValueError(f"{where}: boxes must be a list of [x1, y1, x2, y2] or null, got {abbreviate(boxes)}")
    frames = _check_frames(fields["frames"], len(boxes), num_frames, where) if "frames" in fields else None
    if frames is None and len(boxes) != num_frames:
        raise ValueError(
            f"{where}: {len(boxes)} boxes for {num_frames} frames; give one for each, null where the object is absent, "
            'or say with "frames" which frames they belong to'
        )
    numbers = range(num_frames) if frames is None else frames
    check = _cut_box if are_measured else _check_box
    checked = [
        None if box is None else check(as_list(box), size, f"{where}, frame {t}", box)
        for t, box in zip(numbers, boxes, strict=True)
    ]
    values = np.asarray([[0.0] * 4 if box is None else box for box in checked], np.float64)
    return BoxObject(name, values, np.asarray([box is not None for box in checked], np.bool_), frames)


def _check_frames(frames: object, num_boxes: int, num_frames: int, where: str) -> tuple[int, ...]:
    numbers = as_list(frames)
    if numbers is None or len(numbers) != num_boxes:
        raise ValueError(f"{where}: frames must be {num_boxes} numbers, one for each box, got {abbreviate(frames)}")
    if not all(isinstance(t, int) and not isinstance(t, bool) for t in numbers):
        raise ValueError(f"{where}: frames must be whole numbers, got {abbreviate(frames)}")
    if sorted(set(numbers)) != numbers or numbers[0] < 0 or numbers[-1] >= num_frames:
        raise ValueError(f"{where}: frames must increase from 0 to at most {num_frames - 1}, got {abbreviate(frames)}")
    return tuple(numbers)


def _check_sides(values: list[Any] | None, where: str, given: object) -> list[float]:
    if values is None or len(values) != 4:
        raise ValueError(f"{where}: a box must be [x1, y1, x2, y2] or null, got {abbreviate(given)}")
    for key, value in zip(("x1", "y1", "x2", "y2"), values, strict=True):
        check_number(value, f"{where}: {key}")
    return [float(value) for value in values]


def _cut_box(values: list[Any] | None, size: tuple[int, int], where: str, given: object) -> list[float] | None:
    """What of a measured box is inside of the frame; None if nothing is."""
    cut = _cut(np.asarray(_check_sides(values, where, given)), size).tolist()
    return cut if cut[0] < cut[2] and cut[1] < cut[3] else None


def _check_box(values: list[Any] | None, size: tuple[int, int], where: str, given: object) -> list[float]:
    x1, y1, x2, y2 = _check_sides(values, where, given)
    box = f"({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"{where}: the box {box} has no area; it needs x1 < x2 and y1 < y2")
    if x1 < 0 or y1 < 0 or x2 > size[0] or y2 > size[1]:
        raise ValueError(
            f"{where}: the box {box} lies outside the {size[0]}x{size[1]} frame; x must be in [0, {size[0]}] and "
            f"y in [0, {size[1]}]"
        )
    return [x1, y1, x2, y2]


def _read_published(path: Path, num_frames: int, name: str | None) -> BoxFile:
    """SMCD's form: line f of `bbox.txt` is x1,y1,x2,y2 of frame f in pixels of the picture beside it."""
    text = path / "bbox.txt" if path.is_dir() else path
    if not text.is_file():
        raise FileNotFoundError(f"no boxes at {text}")
    if not name or not name.strip():
        raise ValueError(f'{text} does not tell the class of its object; name it, such as "dog"')
    picture = next((text.parent / one for one in _PICTURES if (text.parent / one).is_file()), None)
    if picture is None:
        raise FileNotFoundError(f"no {_PICTURES[0]} beside {text}, whose pixels its boxes count")
    try:
        with Image.open(picture) as image:
            size = image.size
    except OSError as error:
        raise ValueError(f"{picture} cannot be read as a picture: {error}") from error
    lines = [(number, line) for number, line in enumerate(read_text(text).splitlines(), start=1) if line.strip()]
    boxes = [_read_line(line, size, f"{text}, line {number}") for number, line in lines]
    if len(boxes) != num_frames:
        raise ValueError(f"{text}: {len(boxes)} boxes, one for each frame, and the video has {num_frames} frames")
    return BoxFile([BoxObject(name, np.asarray(boxes, np.float64), np.ones(len(boxes), np.bool_))], size)


def _read_line(line: str, size: tuple[int, int], where: str) -> list[float]:
    try:
        values = [float(part) for part in line.strip().rstrip(",").split(",")]
    except ValueError:
        raise ValueError(f"{where}: a box must be x1,y1,x2,y2, got {abbreviate(line)}") from None
    if len(values) == 4 and values[0] < values[2] and values[1] < values[3]:
        cut = _cut(np.asarray(values), size).tolist()
        if cut != values and cut[0] < cut[2] and cut[1] < cut[3]:  # What has no part in the picture is refused below.
            _LOG.warning("%s: the box reaches out of the %dx%d picture and is cut at its sides", where, *size)
            values = cut
    return _check_box(list(values), size, where, line)


def _cut(xyxy: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    return np.minimum(np.maximum(xyxy, 0), np.asarray([*size, *size], np.float64))
