"""Samples with boxes: windows of clips of GOT-10k, YouTube-VIS and curated shards, and pictures with detections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imageconductor.conditioning.box_files import BoxObject
from imageconductor.conditioning.boxes import Boxes
from imageconductor.conditioning.checks import check_keys
from imageconductor.conditioning.first_frame import cover_scale
from imageconductor.data.box_datasets import BoxClip, find_got10k, read_box_record, read_got10k, read_youtube_vis
from imageconductor.data.clip_index import Shard, find_clips, hash_keys
from imageconductor.data.clip_records import ClipRecord, CorruptClipError
from imageconductor.files import read_text

_MAX_ATTEMPTS = 100  # clips in a row that may be unusable
_DETECTION_KEYS = ("image", "caption", "objects", "note")


class BoxSamples:
    """An endless sequence of windows of clips with boxes; each clip comes once an epoch, in an order of its own.

    A sample holds pixel_values (3, T, H, W) uint8, no points, caption, key, and boxes of the largest objects.

    Args:
        sources: Folders of GOT-10k or YouTube-VIS 2021 with their splits; folders, shards or patterns of shards of
            clip records, of which those with boxes count; or JSON lines of pictures with detections:
            {"image": FILE, "caption": TEXT, "objects": [{"name": NAME, "box": [x1, y1, x2, y2]}]}.
        split: Of GOT-10k and YouTube-VIS.
        size: (W, H) that frames are cropped to.
        num_frames: Consecutive frames of a window.
        max_objects: Objects that are kept of a window, the largest.
        seed: Of order, windows, crops and flips.
        horizontal_flip: Probability that a window is mirrored.
        random_crop: Smallest size of a crop, as a fraction of the largest that fits; 1 = the largest, in the middle.
        min_box_area: Fraction of the frame's area; a smaller box is an absent object.
        reserved_clips: The first clips of YouTube-VIS, in the order of its `instances.json`, are left to an evaluation.
        held_out_clips: Clips, chosen by their keys, that are not among the samples.
        shows_held_out: Whether these are the samples instead, each once, with their first window, in the middle.

    Raises:
        FileNotFoundError: A source does not exist, or holds no clip of so many frames.
        ValueError: A source is malformed, or all clips are held out; of JSON lines the first picture is looked at,
            the others when their turn comes.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        split: str,
        size: tuple[int, int],
        num_frames: int,
        max_objects: int,
        *,
        seed: int = 0,
        horizontal_flip: float = 0.0,
        random_crop: float = 1.0,
        min_box_area: float = 0.0,
        reserved_clips: int = 0,
        held_out_clips: int = 0,
        shows_held_out: bool = False,
    ):
        parts = [part for one in sources for part in _list_clips(Path(one), split, num_frames, reserved_clips)]
        entries = _Entries(parts)
        self.entries = entries.select(slice(held_out_clips) if shows_held_out else slice(held_out_clips, None))
        if not self.entries:
            raise ValueError(f"held_out_clips is {held_out_clips}, and there are {len(entries)} clips; none is left")
        self.size, self.num_frames, self.max_objects = size, num_frames, max_objects
        self.seed, self.is_fixed = seed, shows_held_out
        self.horizontal_flip, self.random_crop, self.min_box_area = horizontal_flip, random_crop, min_box_area
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Sample `position`; clips that cannot be read are left out, and `skipped` says why.

        Raises:
            CorruptClipError: A hundred clips in a row cannot be read.
        """
        if self.is_fixed:
            return self._sample(self.entries[position], None)
        skipped: list[str] = []
        random = np.random.default_rng([self.seed, position])
        epoch, turn = divmod(position, len(self.entries))
        order = self._permutation(epoch)
        for attempt in range(_MAX_ATTEMPTS):
            try:
                entry = self.entries[int(order[(turn + attempt) % len(order)])]
                return {**self._sample(entry, random), "skipped": skipped}
            except (CorruptClipError, ValueError, OSError) as error:
                skipped.append(str(error))
        raise CorruptClipError(f"{_MAX_ATTEMPTS} clips in a row cannot be read; the last: {skipped[-1]}")

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of the clips in an epoch; the last one is kept, since that of millions takes a second."""
        if self._order is None or self._order[0] != epoch:
            random = np.random.default_rng([self.seed, 1, epoch])
            self._order = (epoch, random.permutation(len(self.entries)))
        return self._order[1]

    def _sample(self, entry: _Entry, random: np.random.Generator | None) -> dict[str, Any]:
        clip = _read(entry)
        last = len(clip.pictures) - self.num_frames
        if last < 0:
            raise CorruptClipError(f"{clip.key}: {len(clip.pictures)} frames, {self.num_frames} are needed")
        start = 0 if random is None else int(random.integers(last + 1))
        chosen = range(start, start + self.num_frames)
        frames, boxes = _crop(clip, chosen, self.size, self.random_crop, self.min_box_area, random)
        if random is not None and random.random() < self.horizontal_flip:
            frames, boxes = frames[:, :, ::-1].copy(), boxes.flip_horizontal()
        return {
            "pixel_values": torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous(),
            "points": torch.zeros(0, self.num_frames, 2),
            "visible": torch.zeros(0, self.num_frames, dtype=torch.bool),
            "caption": clip.caption,
            "key": clip.key,
            "boxes": keep_largest(boxes, self.max_objects),
        }


def keep_largest(boxes: Boxes, count: int) -> Boxes:
    """The objects that are in the frame at all, at most `count`: those of the largest mean area, in their order."""
    sides = boxes.xyxy[..., 2:] - boxes.xyxy[..., :2]
    areas = (sides.prod(-1) * boxes.present).mean(-1)
    seen = [n for n in range(boxes.num_objects) if boxes.present[n].any()]
    return boxes.select(sorted(sorted(seen, key=lambda n: -float(areas[n]))[:count]))


def _crop(
    clip: BoxClip,
    chosen: Sequence[int],
    size: tuple[int, int],
    smallest: float,
    min_area: float,
    random: np.random.Generator | None,
) -> tuple[np.ndarray, Boxes]:
    """Frames (T, H, W, 3) of a clip and their boxes, cropped to a size: in the middle, or at random."""
    pictures, whole = clip.frames(chosen), clip.boxes.at_frames(chosen)
    height, width = pictures.shape[1:3]
    if (width, height) != whole.size:
        raise ValueError(f"{clip.key} is {width}x{height}, its boxes are of {whole.size[0]}x{whole.size[1]}")
    zoom = 1.0 if random is None or smallest == 1 else 1 / random.uniform(smallest, 1)
    scale = cover_scale(whole.size, size) * zoom
    free = (width * scale - size[0], height * scale - size[1])
    at = (0.5, 0.5) if random is None or smallest == 1 else (random.random(), random.random())
    offset = (-free[0] * at[0], -free[1] * at[1])
    box = tuple((side - shift) / scale for side, shift in zip((0, 0, *size), (*offset, *offset), strict=True))
    resized = [
        Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC, box=cast("Any", _within(box, width, height)))
        for picture in pictures
    ]
    return np.stack([np.asarray(frame) for frame in resized]), whole.crop((scale, scale), offset, size, min_area)


def _within(box: tuple[float, ...], width: int, height: int) -> tuple[float, ...]:
    """A part of a picture without what rounding puts outside."""
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))


@dataclass(frozen=True, slots=True)
class _Detection:
    """A line of a file of pictures with detections; its picture is opened when the sample is drawn."""

    key: str
    caption: str
    picture: Path
    objects: tuple[BoxObject, ...]
    where: str

    def read(self) -> BoxClip:
        """The picture as a clip.

        Raises:
            FileNotFoundError: There is no picture.
            ValueError: It cannot be read, or an object is not in it.
        """
        try:
            with Image.open(self.picture) as image:
                size = image.size
            boxes = Boxes.from_objects(self.objects, size, 1)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.where}: no picture at {self.picture}") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where}: {error}") from error
        return BoxClip(self.key, self.caption, (self.picture,), 1.0, boxes)


_Entry = BoxClip | Path | ClipRecord | _Detection


def _read(entry: _Entry) -> BoxClip:
    if isinstance(entry, ClipRecord):
        return read_box_record(entry)
    if isinstance(entry, Path):
        return read_got10k(entry)
    return entry.read() if isinstance(entry, _Detection) else entry


class _Entries:
    """The clips of several sources in the order of their keys' SHA-256; records are made as they are asked for.

    Args:
        parts: The clips, in lists and shards.
    """

    def __init__(self, parts: Sequence[Sequence[_Entry] | Shard]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.order = np.argsort(np.concatenate([_hash_keys(part) for part in parts]), kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> _Entry:
        number = int(self.order[place])
        part = int(np.searchsorted(self.ends, number, side="right"))
        return self.parts[part][number - int(self.ends[part])]  # Counted from the part's end.

    def select(self, places: slice) -> _Entries:
        """The clips at these places of the order."""
        chosen = copy(self)
        chosen.order = self.order[places]
        return chosen


def _hash_keys(part: Sequence[_Entry] | Shard) -> NDArray[np.uint64]:
    if isinstance(part, Shard):
        return part.hash_keys()
    return hash_keys((entry.name if isinstance(entry, Path) else entry.key).encode() for entry in part)


def _list_clips(source: Path, split: str, num_frames: int, reserved: int) -> Sequence[Sequence[_Entry] | Shard]:
    if source.is_file() and source.suffix != ".tar":
        if num_frames > 1:
            raise ValueError(f"{source} holds single pictures; num_frames must be 1, not {num_frames}")
        return [_read_detections(source)]
    if (source / split / "instances.json").is_file():
        return [read_youtube_vis(source, split, min_frames=num_frames, first=reserved)]
    if (source / split).is_dir():
        return [find_got10k(source, split, num_frames)]
    try:
        shards = [shard.select(shard.have("boxes.json")) for shard in find_clips([source])]
    except FileNotFoundError:
        shards = []
    if not any(len(shard) for shard in shards):
        raise FileNotFoundError(
            f"no clips with boxes at {source}: expected a folder of GOT-10k or YouTube-VIS with its split {split}, "
            "clip records with KEY.boxes.json, or JSON lines"
        )
    return shards


def _read_detections(path: Path) -> list[_Detection]:
    """Pictures with detections, a JSON object a line; files are named relative to it."""
    found: list[_Detection] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            check_keys(content, _DETECTION_KEYS, where)
            picture = path.parent / content["image"]
            objects = [(str(one["name"]), [float(value) for value in one["box"]]) for one in content["objects"]]
            placed = tuple(BoxObject(name, np.array([box]), np.array([True])) for name, box in objects)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{where} must be {_DETECTION_FORM}: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        found.append(_Detection(str(content["image"]), str(content.get("caption", "")), picture, placed, where))
    if not found:
        raise ValueError(f"{path} holds no picture")
    found[0].read()  # a wrong folder is so told before the training
    return found


_DETECTION_FORM = '{"image": FILE, "caption": TEXT, "objects": [{"name": NAME, "box": [x1, y1, x2, y2]}]}'
