"""Finds reference clips, the few videos or pictures whose motion or appearance MotionDirector learns.

Only headers and first frames are read; `reference_clips.py` decodes the rest.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import ExifTags, Image

from imageconductor.data.clip_records import CorruptClipError
from imageconductor.data.reference_windows import (
    chunk_frames,
    fit_bucket,
    frame_stride,
    listed_frames,
    spaced_frames,
    window_frames,
)
from imageconductor.data.videos import PICTURE_SUFFIXES, VIDEO_SUFFIXES, Video, read_caption_beside
from imageconductor.files import natural_order, read_text

_MAX_KEY_LENGTH = 64
_LYING_ORIENTATIONS = (5, 6, 7, 8)  # of EXIF, in which width and height are exchanged


@dataclass(frozen=True)
class ReferenceClip:
    """A clip or picture to learn from.

    Attributes:
        key: Unique among the clips that were found together; letters, digits, "_" and "-".
        path: Video or picture.
        caption: The prompt that describes it.
        num_frames: T of a window.
        size: (W, H) in pixels in which it is trained.
        is_image: Whether it is a picture, whose window is T times frame 0.
        frames: Numbers of the frames in the file that windows are made of; a window is T consecutive ones of them.
        channels: Of the file's red, green and blue (0, 1, 2), those that are shown as red, green and blue.
    """

    key: str
    path: Path
    caption: str
    num_frames: int
    size: tuple[int, int]
    is_image: bool
    frames: range
    channels: tuple[int, ...] = (0, 1, 2)

    @property
    def is_recoloured(self) -> bool:
        """Whether it is a copy of another clip in other colours."""
        return self.channels != (0, 1, 2)

    def draw_window(self, random: Random) -> list[int]:
        """Numbers of T frames in the file, from a random start if there are more than T."""
        return [0] * self.num_frames if self.is_image else window_frames(self.frames, self.num_frames, random)


def find_reference_clips(
    data: Sequence[str],
    *,
    prompt: str | None,
    captions: str | None,
    size: tuple[int, int],
    num_frames: int,
    fps: float | None,
    frame_step: int,
    recolour: bool = False,
) -> list[ReferenceClip]:
    """The clips that files and folders hold, in the order of `data`, and within a folder by name with 2 before 10.

    | entry of `data` | clips |
    |---|---|
    | a video | consecutive chunks of T frames at about `fps`; a short last chunk is left out |
    | a picture | one, of T times the picture |
    | a folder of videos, pictures or both | one for each file; windows of videos start anywhere, at about `fps` |
    | a .json of MotionDirector's form | one for each entry: every `frame_step`-th frame from its `frame_index` on |

    MotionDirector's JSON is {"data": [{"video_path": file, "data": [{"frame_index": 0, "prompt": text}, ...]}, ...]}.
    An entry with a `clip_path` is that file instead of the video, from its beginning. Paths are relative to the JSON's
    folder, or to the working folder if nothing is there.

    Videos and pictures may be mixed. Sizes are those of `fit_bucket`.

    Args:
        data: Videos, pictures, folders, JSON files.
        prompt: Caption of all clips; prompts in a JSON take precedence. None or empty = see `captions`.
        captions: JSON file {file name with or without ending: caption} for files without `NAME.txt` beside them.
        size: (W, H) in pixels of square clips.
        num_frames: T.
        fps: Frames per second of windows; None = every `frame_step`-th frame.
        frame_step: Also of JSON files, whatever `fps` says.
        recolour: Each clip is followed by five copies, in the other orders of red, green and blue.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ValueError: There is nothing to read, a file is not readable or malformed, a video is shorter than a window, or
            a clip has no caption.
    """
    if not data:
        raise ValueError("data names no reference clips; name videos, pictures, folders of them or a .json")
    if num_frames < 1 or frame_step < 1 or (fps is not None and not fps > 0):
        raise ValueError(
            f"num_frames, frame_step and fps must be positive, got num_frames={num_frames}, frame_step={frame_step}, "
            f"fps={fps}"
        )
    texts = {} if captions is None else _read_captions(Path(captions))
    finder = _Finder(" ".join((prompt or "").split()), texts, size, num_frames, fps, frame_step)
    clips = [clip for entry in data for clip in finder.find(Path(entry))]
    return _make_keys_unique([copy for clip in clips for copy in _recolour(clip)] if recolour else clips)


@dataclass(frozen=True)
class _Finder:
    """Reads the entries of `data`; the clips' keys are their files' names without the ending.

    Attributes:
        prompt: Empty = none.
        texts: Captions by file name, with or without the ending.
        size, num_frames, fps, frame_step: As in `find_reference_clips`.
    """

    prompt: str
    texts: dict[str, str]
    size: tuple[int, int]
    num_frames: int
    fps: float | None
    frame_step: int

    def find(self, path: Path) -> Iterator[ReferenceClip]:
        """The clips of an entry."""
        suffix = path.suffix.lower()
        if path.is_dir():
            yield from self._find_in_folder(path)
        elif not path.is_file():
            raise FileNotFoundError(f"data: no such file or folder: {path}")
        elif suffix == ".json":
            yield from self._read_json(path)
        elif suffix in PICTURE_SUFFIXES:
            yield self._read_picture(path)
        elif suffix in VIDEO_SUFFIXES:
            yield from self._cut_video(path)
        else:
            known = ", ".join((*VIDEO_SUFFIXES, *PICTURE_SUFFIXES))
            raise ValueError(f"data: {path} is neither a video nor a picture nor a .json; known endings are {known}")

    def _find_in_folder(self, folder: Path) -> Iterator[ReferenceClip]:
        known = (*VIDEO_SUFFIXES, *PICTURE_SUFFIXES)
        files = [path for path in folder.iterdir() if path.suffix.lower() in known and path.is_file()]
        files = [path for path in files if not path.name.startswith(".")]  # leftovers of other programs
        if not files:
            raise ValueError(
                f"data: no videos or pictures in {folder}; name the folder that holds them, since its subfolders are "
                "not searched"
            )
        for path in sorted(files, key=lambda path: (natural_order(path.stem), path.name)):
            is_picture = path.suffix.lower() in PICTURE_SUFFIXES
            yield self._read_picture(path) if is_picture else self._read_whole_video(path)

    def _read_picture(self, path: Path) -> ReferenceClip:
        return self._clip(path, _picture_size(path), range(1), is_image=True)

    def _read_whole_video(self, path: Path) -> ReferenceClip:
        """A clip whose windows start anywhere."""
        available, native_fps, native = _read_header(path)
        stride, why, remedy = self._find_stride(path, native_fps)
        self._check_length(path, available, self.num_frames * stride, why, remedy)
        return self._clip(path, native, spaced_frames(available, stride))

    def _cut_video(self, path: Path) -> Iterator[ReferenceClip]:
        """A clip for each full chunk."""
        available, native_fps, native = _read_header(path)
        stride, why, remedy = self._find_stride(path, native_fps)
        self._check_length(path, available, (self.num_frames - 1) * stride + 1, why, remedy)
        for frames in chunk_frames(available, stride, self.num_frames):
            yield self._clip(path, native, frames)

    def _find_stride(self, path: Path, native_fps: float) -> tuple[int, str, str]:
        """Step between the frames of windows, why it is that, and what to change for a shorter window."""
        if self.fps is None:
            return self.frame_step, f"frame_step={self.frame_step}", "frame_step"
        try:
            stride = frame_stride(native_fps, self.fps)
        except ValueError as error:
            raise ValueError(f"{path} does not state its frame rate; set fps=null") from error
        return stride, f"fps={self.fps:g} of its {native_fps:g}, so one in {stride}", "raise fps"

    def _read_json(self, path: Path) -> Iterator[ReferenceClip]:
        for video, start, prompt in _read_entries(path):
            available, _, native = _read_header(video)
            needed = max(start, 0) + (self.num_frames - 1) * self.frame_step + 1
            why = f"frame_step={self.frame_step} from frame_index {start} on in {path}"
            self._check_length(video, available, needed, why, "frame_step")
            frames = listed_frames(available, start, self.frame_step, self.num_frames)
            yield self._clip(video, native, frames, prompt=prompt)

    def _check_length(self, path: Path, available: int, needed: int, why: str, remedy: str) -> None:
        if available < needed:
            raise ValueError(
                f"{path} has {available} frames, {needed} are needed for num_frames={self.num_frames} with {why}; "
                f"lower num_frames or {remedy}, or leave the video out"
            )

    def _clip(
        self, path: Path, native: tuple[int, int], frames: range, is_image: bool = False, prompt: str = ""
    ) -> ReferenceClip:
        caption = prompt or self._find_caption(path)
        return ReferenceClip(path.stem, path, caption, self.num_frames, fit_bucket(native, self.size), is_image, frames)

    def _find_caption(self, path: Path) -> str:
        caption = self.prompt or read_caption_beside(path)
        caption = caption or self.texts.get(path.name, "") or self.texts.get(path.stem, "")
        if not caption:
            raise ValueError(
                f"{path} has no prompt; set prompt for all clips, write one into {path.with_suffix('.txt')}, or name a "
                f'JSON file {{"{path.name}": "the prompt"}} as captions'
            )
        return caption


def _read_header(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Number of frames, frames per second, and (W, H) of a video, whose first frame is decoded."""
    try:
        video = Video(path, str(path))
        return len(video), video.fps, video.size()
    except CorruptClipError as error:
        raise ValueError(f"{error}; convert it to an mp4 of H.264, or leave it out") from error


def _picture_size(path: Path) -> tuple[int, int]:
    """(W, H) of a picture as viewers show it, which EXIF may turn."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            is_lying = image.getexif().get(ExifTags.Base.Orientation) in _LYING_ORIENTATIONS
            image.load()  # Else a file that is cut would be found out after the weights were loaded.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable picture; give a PNG, JPEG or WebP file, or leave it out") from error
    return (height, width) if is_lying else (width, height)


def _read_captions(path: Path) -> dict[str, str]:
    """Captions by file name, on one line each."""
    content = _parse_json(path, "captions")
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ValueError(f'captions: {path} must hold captions by file name, {{"NAME.mp4": "the prompt", ...}}')
    return {name: " ".join(text.split()) for name, text in content.items()}


def _read_entries(path: Path) -> Iterator[tuple[Path, int, str]]:
    """Video, first frame and prompt, perhaps empty, of each entry in a JSON file of MotionDirector's form."""
    content = _parse_json(path, "data")
    videos = content.get("data") if isinstance(content, dict) else None
    if not isinstance(videos, list) or not videos:
        raise ValueError(
            f'data: {path} must hold {{"data": [{{"video_path": "FILE", "data": [{{"frame_index": 0, "prompt": '
            '"TEXT"}]}]}'
        )
    for number, video in enumerate(videos):
        place = f"data: {path}: data[{number}]"
        entries = video.get("data") if isinstance(video, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{place} must hold a video_path and a list data of its clips")
        for index, entry in enumerate(entries):
            yield _read_entry(path, f"{place}.data[{index}]", video, entry)


def _read_entry(path: Path, place: str, video: dict[str, Any], entry: Any) -> tuple[Path, int, str]:
    """As `_read_entries`; `place` names the entry in messages."""
    if not isinstance(entry, dict):
        raise ValueError(f'{place} must be {{"frame_index": 0, "prompt": "TEXT"}}, got {entry!r}')
    name, start = entry.get("clip_path") or video.get("video_path"), entry.get("frame_index", 0)
    prompt = entry.get("prompt") or ""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place}: needs a clip_path, or the video_path above it, got {name!r}")
    if not isinstance(start, int) or isinstance(start, bool):
        raise ValueError(f"{place}: frame_index must be the number of a frame, got {start!r}")
    if not isinstance(prompt, str):
        raise ValueError(f"{place}: prompt must be text, got {prompt!r}")
    file = next((file for file in (path.parent / name, Path(name)) if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{place}: no such video: {name}, neither in {path.parent} nor in the working folder")
    return file, 0 if entry.get("clip_path") else start, " ".join(prompt.split())


def _parse_json(path: Path, setting: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: no such file: {path}")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{setting}: {path} is not valid JSON: {error}") from error


def _recolour(clip: ReferenceClip) -> Iterator[ReferenceClip]:
    """The clip, and its copies in the other orders of red, green and blue, whose keys end in -rbg to -bgr."""
    yield clip
    for order in list(itertools.permutations(range(3)))[1:]:
        yield replace(clip, channels=order, key=f"{clip.key}-{''.join('rgb'[channel] for channel in order)}")


def _make_keys_unique(clips: Sequence[ReferenceClip]) -> list[ReferenceClip]:
    """Clips whose keys are NAME, or NAME-0, NAME-1, ... where several have it, also if only capitals differ."""
    names = [re.sub(r"[^A-Za-z0-9_-]+", "-", clip.key).strip("-")[:_MAX_KEY_LENGTH] or "clip" for clip in clips]
    counts = Counter(name.lower() for name in names)
    taken = {name for name, count in counts.items() if count == 1}
    numbers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    unique = []
    for clip, name in zip(clips, names, strict=True):
        key = name
        if counts[name.lower()] > 1:
            numbered = (f"{name}-{number}" for number in numbers[name.lower()])
            key = next(key for key in numbered if key.lower() not in taken)
        taken.add(key.lower())
        unique.append(replace(clip, key=key))
    return unique
