"""Reads the frames of a video file or of a folder of pictures one at a time, upright and with their times."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

from imageconductor.data.video_streams import rank_stream, read_orientation, turn_upright
from imageconductor.data.videos import PICTURE_SUFFIXES

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
Resize = Callable[[tuple[int, int]], tuple[int, int]]
"""Maps the (W, H) of footage, upright and with square pixels, to the (W, H) that its frames are resized to."""

STORAGE_FAULTS = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
"""Numbers of an OSError that say nothing of a file but of the disk, the network or the machine."""

MISSING = "missing"
"""Reason of rejection where no file is there."""

_MAX_MISSING_FRACTION = 0.1  # of the stated duration, at its end
_EPSILON_S = 1e-4
_SEEK_MARGIN_S = 3.0  # seeks go to this long before the wanted time
_MAX_STEPS_BACK = 3  # frames that are not later than the one before, as at the joints of a recording


class Rejected(Exception):  # noqa: N818 - not an error: much footage is rejected
    """The footage gives no clip.

    Attributes:
        reason: One of a few fixed texts, which are counted.
        detail: The facts behind it, such as a size.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Limits:
    """Bounds on the sides of footage in pixels."""

    min_side_px: int
    max_side_px: int

    def check(self, size: tuple[int, int]) -> None:
        """Rejects a (W, H) outside the bounds."""
        if min(size) < self.min_side_px:
            raise Rejected("too small", f"{size[0]}x{size[1]}")
        if max(size) > self.max_side_px:
            raise Rejected("too large", f"{size[0]}x{size[1]}")


def read_frames(
    path: Path, resize: Resize, limits: Limits, start_s: float | None = None, end_s: float | None = None
) -> Iterator[tuple[float, Picture]]:
    """The frames from `start_s` to `end_s`, resized, each with its time in seconds.

    Raises:
        Rejected: The footage cannot be read, ends before its stated duration, or is too small or too large.
        OSError: The storage fails (`STORAGE_FAULTS`).
    """
    if not path.exists():
        raise Rejected(MISSING, str(path))
    start, end = start_s or 0.0, math.inf if end_s is None else end_s
    reader = _read_pictures if path.is_dir() else _read_video
    yield from reader(path, resize, limits, start - _EPSILON_S, end + _EPSILON_S)


def read_frames_at(
    path: Path, times: Sequence[float], resize: Resize, limits: Limits, crop: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """The frames at `times`, which `read_frames` gave, cropped to their central `crop` (W, H): (T, H, W, 3).

    Raises:
        Rejected, OSError: As `read_frames`.
    """
    reader = _read_pictures if path.is_dir() else _read_video
    # Seeking is imprecise in some containers. If frames are missing afterwards, decoding restarts from the beginning.
    for seeks in (True, False):
        chosen: list[Picture] = []
        # The codec needs the frames in between as well; they are decoded, but neither converted nor resized.
        first, last = times[0] - _EPSILON_S, times[-1] + _EPSILON_S
        for time, picture in reader(path, resize, limits, first, last, wanted=times, seeks=seeks):
            if abs(time - times[len(chosen)]) < _EPSILON_S:
                chosen.append(picture if crop is None else _crop_centre(picture, crop))
            if len(chosen) == len(times):
                return np.stack(chosen)
    raise Rejected("damaged", f"gave {len(chosen)} of the {len(times)} frames that it gave before")


def _crop_centre(picture: Picture, size: tuple[int, int]) -> Picture:
    left, top = (picture.shape[1] - size[0]) // 2, (picture.shape[0] - size[1]) // 2
    return np.ascontiguousarray(picture[top : top + size[1], left : left + size[0]])


def _read_video(
    path: Path,
    resize: Resize,
    limits: Limits,
    start: float,
    end: float,
    wanted: Sequence[float] | None = None,
    seeks: bool = True,
) -> Iterator[tuple[float, Picture]]:
    """The frames of a video file from `start` to `end` in seconds, or those of them at the times `wanted`."""
    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        _check_storage(error, path)
        raise Rejected("unreadable", _error_text(error)) from error
    with container:
        stream = _find_stream(container, limits)
        tick = float(stream.time_base or 0)
        origin = (stream.start_time or 0) * tick
        is_untimed = container.format.name == "avi" and stream.codec_context.has_b_frames
        size: tuple[int, int] | None = None
        count, place, last, before, steps_back = 0, 0, -math.inf, -math.inf, 0
        has_sought = seeks and start > _SEEK_MARGIN_S and tick > 0 and not is_untimed
        try:
            if has_sought:
                container.seek(int((start - _SEEK_MARGIN_S + origin) / tick), stream=stream)
            frames = container.decode(stream)
            for time, frame in _time_untimed(frames, tick) if is_untimed else _time_frames(frames, origin):
                count += 1
                steps_back += time <= before
                before = time
                if steps_back > _MAX_STEPS_BACK:
                    raise Rejected("unreadable", "timestamps out of order")
                if has_sought and count == 1 and time > start:
                    break  # The seek went too far: frames may be missing.
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
                    size = _display_size(frame, stream)
                    limits.check(size)
                yield time, _convert_frame(frame, resize(size))
            else:
                duration = (stream.duration or 0) * tick
                if count and min(end, duration) - last > max(1.0, _MAX_MISSING_FRACTION * duration):
                    raise Rejected("damaged", f"ends after {max(last, 0):.1f} of {duration:.1f} s")
                if count or not has_sought:
                    return
        except (av.FFmpegError, ValueError) as error:
            _check_storage(error, path)
            raise Rejected("damaged", f"after {count} frames: {_error_text(error)}") from error
    yield from _read_video(path, resize, limits, start, end, wanted, seeks=False)


def _time_frames(frames: Iterator[Any], origin: float) -> Iterator[tuple[float, Any]]:
    """Frames with their times in seconds, counted from `origin`."""
    for frame in frames:
        if frame.time is None:
            raise Rejected("unreadable", "frames without timestamps")
        yield frame.time - origin, frame


def _time_untimed(frames: Iterator[Any], tick: float) -> Iterator[tuple[float, Any]]:
    """Frames with their times in seconds, counted from the first; decoding must begin with the file.

    AVI knows when packets are decoded, but not when frames are shown, and FFmpeg's guess is wrong where frames are
    reordered. The decoding times are those of a constant rate, so frames in their order are shown at the same steps.
    """
    origin, last, step = math.nan, -tick, tick
    for frame in frames:
        # The last frames leave the decoder without a packet, and so without a time.
        time = last + step if frame.dts is None else frame.dts * tick
        origin = time if math.isnan(origin) else origin
        yield time - origin, frame
        last, step = time, time - last


def _find_stream(container: Any, limits: Limits) -> Any:
    """The video stream of a container that players choose, which has a decoder and a size within the limits."""
    if not container.streams.video:
        raise Rejected("no video", "only " + ", ".join(sorted({s.type for s in container.streams})))
    stream: Any = max(container.streams.video, key=rank_stream)
    codec = stream.codec_context
    if codec is None or not codec.width or not codec.height:
        raise Rejected("unreadable", "no decoder, or no picture size")
    codec.thread_count = 1  # Clips are decoded in parallel, not frames.
    limits.check((codec.width, codec.height))
    return stream


def _display_size(frame: Any, stream: Any) -> tuple[int, int]:
    """(W, H) of a frame as players display it: upright and with square pixels."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = frame.width, frame.height
    if 0 < aspect < 100:
        width = max(1, round(width * float(aspect)))
    return (height, width) if read_orientation(frame)[0] else (width, height)


def _convert_frame(frame: Any, size: tuple[int, int]) -> Picture:
    """A decoded frame as an upright RGB picture of `size` (W, H)."""
    orientation = read_orientation(frame)
    if frame.interlaced_frame:
        frame = _top_field(frame)
    width, height = size[::-1] if orientation[0] else size
    shrinks = width * height < frame.width * frame.height
    interpolation = "AREA" if shrinks else "BICUBIC"
    # One thread: with several, a new context would be made for every frame.
    picture = frame.reformat(width, height, "rgb24", interpolation=interpolation, threads=1).to_ndarray()
    return turn_upright(picture, orientation)


def _top_field(frame: Any) -> Any:
    """Every other row of an interlaced frame, which all belong to one moment."""
    graph: Any = Graph()
    graph.threads = 1
    format_ = {"width": frame.width, "height": frame.height, "format": frame.format, "time_base": frame.time_base}
    graph.link_nodes(graph.add_buffer(**format_), graph.add("field", "top"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def _read_pictures(
    path: Path,
    resize: Resize,
    limits: Limits,
    start: float,
    end: float,
    wanted: Sequence[float] | None = None,
    seeks: bool = True,  # noqa: ARG001 - the signature of `_read_video`
) -> Iterator[tuple[float, Picture]]:
    """The pictures of a folder, whose names are their times in microseconds, as RealEstate10K's frames."""
    from imageconductor.conditioning import load_image  # brings torch, which processes that read videos do without

    files = [file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES]
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
        try:
            image = load_image(file)
        except ValueError as error:
            _check_storage(error.__cause__, file)
            raise Rejected("damaged", str(error)) from error
        size = image.size
        limits.check(size)
        target = resize(size)
        interpolation = cv2.INTER_AREA if target[0] * target[1] < size[0] * size[1] else cv2.INTER_CUBIC
        yield time, np.asarray(cv2.resize(np.asarray(image), target, interpolation=interpolation), np.uint8)


def encode_mp4(clip: NDArray[np.uint8], fps: float) -> bytes:
    """H.264 of (T, H, W, 3) without visible loss; equal clips give equal bytes.

    x264's macroblock tree may read uninitialised memory at widths that are no multiple of 128, and then chooses
    slightly different quantisers. There it is off, which made a test clip half as large again.
    """
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": "17", "preset": "medium"} | ({"x264-params": "mbtree=0"} if clip.shape[2] % 128 else {})
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in clip:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode())
    return file.getvalue()


def decode_mp4(content: bytes) -> NDArray[np.uint8]:
    """The frames (T, H, W, 3) of a file that `encode_mp4` made."""
    with av.open(BytesIO(content)) as container:
        pictures = [f.reformat(format="rgb24", threads=1).to_ndarray() for f in container.decode(video=0)]
        return np.stack(pictures)


def _check_storage(error: BaseException | None, path: Path) -> None:
    """Makes sure that reading a file failed because of the file.

    Raises:
        OSError: It was the storage.
    """
    number = getattr(error, "errno", None)
    if number == errno.EIO:  # FFmpeg also says so of some broken files; reading them tells.
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
    elif number in STORAGE_FAULTS:
        raise OSError(number, os.strerror(number), str(path)) from error


def _error_text(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
