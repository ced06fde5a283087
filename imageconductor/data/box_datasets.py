"""Videos with boxes, as clips: GOT-10k, YouTube-VIS 2021, and curated clip records.

| data set | clip | boxes | caption |
|---|---|---|---|
| GOT-10k | `SPLIT/GOT-10k_*/NNNNNNNN.jpg` | one object, `groundtruth.txt` | class and motion of `meta_info.ini` |
| YouTube-VIS 2021 | `SPLIT/JPEGImages/CLIP/*.jpg` | several, `SPLIT/instances.json` | `caption.json`, or the classes |
| clip records | `KEY.mp4` | several, `KEY.boxes.json` | `KEY.json` |

A clip holds what a clip record does, tracks apart: a key, a caption, frames and their rate; and boxes.
"""

from __future__ import annotations

import configparser
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imageconductor.conditioning.box_files import check_boxes
from imageconductor.conditioning.boxes import Boxes
from imageconductor.conditioning.first_frame import load_image
from imageconductor.data.clip_records import ClipRecord, CorruptClipError
from imageconductor.data.clips import open_video
from imageconductor.data.videos import Video
from imageconductor.files import natural_order, read_text

_LOG = logging.getLogger(__name__)

YOUTUBE_VIS_FPS = 6.0
"""Every fifth frame of videos of 30 frames a second is in the data set."""

_LEFT_OUT = """
1898 9302 8628 1858 1849 9058 9065 1665 4419 9059 9211 9210 9032 9102 2446 8925 1867
9274 9323 2449 9031 9094 5912 7643 7788 8917 9214 7610 9320 7645 9027 8721 8931 8630
"""  # numbers of training clips of GOT-10k that SMCD's authors left out


@dataclass(frozen=True, eq=False)
class BoxClip:
    """A clip with boxes.

    Attributes:
        key: its name in the data set.
        caption: what it shows.
        pictures: its T frames in order, or the video that holds them.
        fps: frames a second.
        boxes: of its objects in each frame.
    """

    key: str
    caption: str
    pictures: tuple[Path, ...] | Video
    fps: float
    boxes: Boxes

    def frames(self, chosen: Sequence[int]) -> NDArray[np.uint8]:
        """Some of the frames (T, H, W, 3).

        Raises:
            FileNotFoundError: A picture is gone.
            ValueError: A picture, or the video, cannot be decoded.
        """
        if isinstance(self.pictures, Video):
            return self.pictures.frames(chosen)
        return np.stack([np.asarray(load_image(self.pictures[t])) for t in chosen])


def find_got10k(root: str | Path, split: str = "train", min_frames: int = 1) -> list[Path]:
    """Folders of a split's clips of at least `min_frames`, without those that SMCD's authors left out.

    Args:
        root: Folder with the splits; GOT-10k's own name for it, got-10k, is not required.
        split: "train" or "val".
        min_frames: T of the windows that will be drawn.

    Raises:
        FileNotFoundError: There is no clip.
    """
    folders = sorted(path for path in (Path(root) / split).glob("GOT-10k_*") if path.is_dir())
    left_out = {int(number) for number in _LEFT_OUT.split()}
    kept = [path for path in folders if _clip_number(path) not in left_out]
    kept = [path for path in kept if sum(1 for _ in path.glob("*.jpg")) >= min_frames]
    if not kept:
        raise FileNotFoundError(f"no clips of GOT-10k with {min_frames} frames or more in {Path(root) / split}")
    return kept


def read_got10k(folder: str | Path) -> BoxClip:
    """A clip of GOT-10k.

    Its object is absent where its labels say so (absence, or a cover of 0), and where its box is outside of the frame,
    has no area or is not finite.

    Args:
        folder: Of the clip.

    Raises:
        CorruptClipError: A file is missing or malformed; names it.
    """
    folder = Path(folder)
    pictures = tuple(sorted(folder.glob("*.jpg"), key=lambda path: natural_order(path.name)))
    meta = _read_meta(folder / "meta_info.ini")
    boxes = _read_numbers(folder / "groundtruth.txt", 4)
    if not pictures or len(boxes) != len(pictures):
        raise CorruptClipError(f"{folder}: {len(boxes)} boxes for {len(pictures)} pictures")
    present = np.asarray(np.isfinite(boxes).all(axis=1))
    for label, absent in (("absence", 1), ("cover", 0)):
        path = folder / f"{label}.label"
        if path.is_file():
            values = _read_numbers(path, 1)[:, 0]
            if len(values) != len(pictures):
                raise CorruptClipError(f"{path}: {len(values)} labels for {len(pictures)} pictures")
            present = present & (values != absent)
    name, motion = meta["object_class"], meta["motion_class"]
    rate = re.match(r"[\d.]+", meta.get("anno_fps", ""))
    return BoxClip(
        folder.name,
        f"A {name} that is {motion}.",
        pictures,
        float(rate[0]) if rate else 10.0,
        _to_boxes(boxes[None], present[None], (name,), _picture_size(pictures[0])),
    )


def read_youtube_vis(
    root: str | Path,
    split: str = "train",
    *,
    captions: str | Path | None = None,
    min_frames: int = 1,
    max_objects: int | None = None,
    first: int = 0,
) -> list[BoxClip]:
    """The clips of a split of YouTube-VIS 2021, of at least `min_frames`.

    Args:
        root: Folder with the splits.
        split: "train", or another whose `instances.json` has annotations.
        captions: JSON of captions by clip, such as TrackDiffusion's; None = `caption.json` in the root, if it is there.
            A clip without a caption is described by the classes of its objects.
        min_frames: T of the windows that will be drawn.
        max_objects: The first objects of a clip that are kept; None = all.
        first: Number of the first clip that is read, in the order of `instances.json`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is malformed; names it.
    """
    folder = Path(root) / split
    content = _read_json(folder / "instances.json")
    spoken = Path(captions) if captions is not None else Path(root) / "caption.json"
    texts = _read_json(spoken) if captions is not None or spoken.is_file() else {}
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        annotated: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"] or ():
            annotated.setdefault(annotation["video_id"], []).append(annotation)
        clips = [
            _youtube_clip(folder, video, annotated.get(video["id"], [])[:max_objects], names, texts)
            for video in content["videos"][first:]
            if len(video["file_names"]) >= min_frames
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'instances.json'} is not as YouTube-VIS has it: {error!r}") from error
    _LOG.info("%s: %d of %d clips have %d frames or more", folder, len(clips), len(content["videos"]), min_frames)
    return clips


def read_box_record(record: ClipRecord) -> BoxClip:
    """The clip of a record with `KEY.boxes.json`.

    Raises:
        CorruptClipError: A file is missing or malformed; names it.
    """
    video, info = open_video(record), record.info()
    try:
        content = json.loads(record.read("boxes.json"))
        file = check_boxes(content, len(video), f"{record.key}.boxes.json")
        boxes = Boxes.from_objects(file.objects, file.size, len(video))
    except ValueError as error:
        raise CorruptClipError(str(error)) from error
    return BoxClip(record.key, info["caption"], video, video.fps, boxes)


def _youtube_clip(
    folder: Path,
    video: dict[str, Any],
    annotations: Sequence[dict[str, Any]],
    names: dict[int, str],
    captions: dict[str, str],
) -> BoxClip:
    pictures = tuple(folder / "JPEGImages" / name for name in video["file_names"])
    key = Path(video["file_names"][0]).parent.name
    boxes = np.zeros((len(annotations), len(pictures), 4))
    present = np.zeros((len(annotations), len(pictures)), np.bool_)
    classes: list[str] = []
    for n, annotation in enumerate(annotations):
        if annotation["category_id"] not in names:
            raise ValueError(
                f"{folder}: clip {key} has an object of class {annotation['category_id']}, which has no name"
            )
        classes.append(names[annotation["category_id"]])
        if len(annotation["bboxes"]) != len(pictures):
            raise ValueError(f"{folder}: clip {key} has {len(pictures)} pictures and {len(annotation['bboxes'])} boxes")
        for t, box in enumerate(annotation["bboxes"]):
            if box is not None:
                boxes[n, t], present[n, t] = box, True
    caption = captions.get(key) or ", ".join(dict.fromkeys(classes))
    size = (int(video["width"]), int(video["height"]))
    return BoxClip(key, caption, pictures, YOUTUBE_VIS_FPS, _to_boxes(boxes, present, tuple(classes), size))


def _to_boxes(xywh: NDArray[np.float64], present: NDArray[np.bool_], names: tuple[str, ...], size: Any) -> Boxes:
    """Measured boxes (N, T, 4) x, y, w, h, cut at the frame; what is not in it becomes absent."""
    xyxy = torch.as_tensor(np.nan_to_num(np.concatenate([xywh[..., :2], xywh[..., :2] + xywh[..., 2:]], axis=-1)))
    inside = xyxy.clamp(min=0).minimum(xyxy.new_tensor([*size, *size]))
    has_area = (inside[..., 2:] > inside[..., :2]).all(-1)
    return Boxes(inside, torch.as_tensor(present) & has_area, names, size)


def _clip_number(folder: Path) -> int:
    digits = re.search(r"\d+$", folder.name)
    return int(digits[0]) if digits else -1


def _read_meta(path: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(read_text(path))
        meta = dict(parser["METAINFO"])
        if missing := [key for key in ("object_class", "motion_class") if not meta.get(key)]:
            raise CorruptClipError(f"{path}: lacks {', '.join(missing)}")
    except (OSError, configparser.Error, KeyError) as error:
        raise CorruptClipError(f"{path} cannot be read: {error}") from error
    return meta


def _read_numbers(path: Path, columns: int) -> NDArray[np.float64]:
    """The rows of a file, (T, columns)."""
    try:
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        rows = [[float(part) for part in line.split(",")] for line in lines]
    except (OSError, ValueError) as error:
        raise CorruptClipError(f"{path} cannot be read: {error}") from error
    if wrong := [number for number, row in enumerate(rows, start=1) if len(row) != columns]:
        raise CorruptClipError(f"{path}, line {wrong[0]}: expected {columns} numbers, got {len(rows[wrong[0] - 1])}")
    return np.asarray(rows, np.float64).reshape(-1, columns)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no annotations at {path}")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(content).__name__}")
    return content


def _picture_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise CorruptClipError(f"{path} cannot be read: {error}") from error
