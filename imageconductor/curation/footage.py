"""Frames of a video file or of a folder of pictures: upright, with their times, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
Resize = Callable[[tuple[int, int]], tuple[int, int]]
"""From the (W, H) that footage has, upright and with square pixels, to the (W, H) that is wanted."""

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_MISSING_SHARE = 0.1
_EPSILON_S = 1e-4


class Rejected(Exception):  # noqa: N818 - not an error: most footage is rejected for some reason
    """This footage gives no clip.

    Attributes:
        reason: One of a few, to be counted.
        detail: What was found.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Limits:
    """Sides in pixels within which footage is taken."""

    min_side_px: int
    max_side_px: int

    def check(self, size: tuple[int, int]) -> None:
        """Rejects footage of another size, before any of its frames is decoded."""
        if min(size) < self.min_side_px:
            raise Rejected("too small", f"{size[0]}x{size[1]}")
        if max(size) > self.max_side_px:
            raise Rejected("too large", f"{size[0]}x{size[1]}")


def frames(
    path: Path, resize: Resize, limits: Limits, start_s: float | None = None, end_s: float | None = None
) -> Iterator[tuple[float, Picture]]:
    """Frames from `start_s` to `end_s`, each with its time in seconds, resized as it is decoded.

    Raises:
        Rejected: It cannot be read, ends before it should, or is too small or too large.
    """
    if not path.exists():
        raise Rejected("missing", str(path))
    start, end = start_s or 0.0, math.inf if end_s is None else end_s
    reader = _pictures if path.is_dir() else _video
    yield from reader(path, resize, limits, start - _EPSILON_S, end + _EPSILON_S)


def frames_at(path: Path, times: Sequence[float], resize: Resize, limits: Limits) -> NDArray[np.uint8]:
    """The frames at `times`, which `frames` gave: (T, H, W, 3)."""
    wanted = [*times]
    chosen: list[Picture] = []
    # Frames between those that are wanted are decoded, as the codec demands, but neither converted nor resized.
    reader = _pictures if path.is_dir() else _video
    for time, picture in reader(path, resize, limits, times[0] - _EPSILON_S, times[-1] + _EPSILON_S, wanted):
        if abs(time - wanted[len(chosen)]) < _EPSILON_S:
            chosen.append(picture)
        if len(chosen) == len(wanted):
            return np.stack(chosen)
    raise Rejected("damaged", f"gave {len(chosen)} of the {len(wanted)} frames that it gave before")


def _video(
    path: Path,
    resize: Resize,
    limits: Limits,
    start: float,
    end: float,
    wanted: Sequence[float] | None = None,
) -> Iterator[tuple[float, Picture]]:
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError) as error:
        raise Rejected("unreadable", _words(error)) from error
    with container:
        if not container.streams.video:
            raise Rejected("no video", "only " + ", ".join(sorted({s.type for s in container.streams})))
        stream = container.streams.video[0]
        try:
            codec = stream.codec_context
        except (av.FFmpegError, AttributeError) as error:
            raise Rejected("unreadable", _words(error)) from error
        if codec is None or not codec.width or not codec.height:
            raise Rejected("unreadable", "no decoder, or no picture size")
        codec.thread_count = 1  # The clips are what is parallel.
        limits.check((codec.width, codec.height))
        size: tuple[int, int] | None = None
        origin = float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0
        count, place, last = 0, 0, -math.inf
        try:
            if start > 1.0 and stream.time_base:
                container.seek(max(0, int((start + origin) / stream.time_base)), stream=stream)
            for frame in container.decode(stream):
                if frame.time is None:
                    raise Rejected("unreadable", "frames without timestamps")
                time = frame.time - origin
                count += 1
                if time > end:
                    return
                if time < start or time <= last:
                    continue
                last = time
                if wanted is not None:
                    place = next((i for i in range(place, len(wanted)) if wanted[i] > time - _EPSILON_S), len(wanted))
                    if place == len(wanted) or wanted[place] > time + _EPSILON_S:
                        continue
                if size is None:
                    size = _shown_size(frame, stream)
                    limits.check(size)
                yield time, _picture(frame, resize(size))
        except (av.FFmpegError, ValueError) as error:
            raise Rejected("damaged", f"after {count} frames: {_words(error)}") from error
        if start <= 0.0 and stream.frames and count < (1 - _MISSING_SHARE) * stream.frames:
            raise Rejected("damaged", f"ends after {count} of {stream.frames} frames")


def _shown_size(frame: Any, stream: Any) -> tuple[int, int]:
    """(W, H) as a player shows it: pixels made square, turned upright."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = frame.width, frame.height
    if 0 < aspect < 100:
        width = max(1, round(width * float(aspect)))
    return (height, width) if frame.rotation % 180 else (width, height)


def _picture(frame: Any, size: tuple[int, int]) -> Picture:
    turns = round(frame.rotation / 90) % 4
    width, height = size[::-1] if turns % 2 else size
    shrinks = width * height < frame.width * frame.height
    interpolation = "AREA" if shrinks else "BICUBIC"
    picture = frame.reformat(width, height, "rgb24", interpolation=interpolation, threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, turns))


def _pictures(
    path: Path,
    resize: Resize,
    limits: Limits,
    start: float,
    end: float,
    wanted: Sequence[float] | None = None,
) -> Iterator[tuple[float, Picture]]:
    """Pictures named by their time in microseconds, as RealEstate10K's frames are."""
    files = [file for file in path.iterdir() if file.suffix.lower() in _PICTURES]
    try:
        timed = sorted((int(file.stem) / 1e6, file) for file in files)
    except ValueError as error:
        raise Rejected("unreadable", f"frames must be named by their microseconds: {error}") from error
    if not timed:
        raise Rejected("no video", "no pictures in the folder")
    for time, file in timed:
        if not start <= time <= end:
            continue
        if wanted is not None and not any(abs(time - other) < _EPSILON_S for other in wanted):
            continue
        picture = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if picture is None:
            raise Rejected("damaged", file.name)
        size = (picture.shape[1], picture.shape[0])
        limits.check(size)
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        target = resize(size)
        how = cv2.INTER_AREA if target[0] * target[1] < size[0] * size[1] else cv2.INTER_CUBIC
        yield time, np.asarray(cv2.resize(picture, target, interpolation=how), np.uint8)


def encode_mp4(clip: NDArray[np.uint8], fps: float) -> bytes:
    """H.264 of (T, H, W, 3), the same bytes every time; nearly without visible loss."""
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "17", "preset": "medium"}
        )
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def decode_mp4(content: bytes) -> NDArray[np.uint8]:
    """(T, H, W, 3) of what `encode_mp4` wrote."""
    with av.open(BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
