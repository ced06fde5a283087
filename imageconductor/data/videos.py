"""Video files read by random access, and the names under which videos, pictures and their captions lie in a folder.

Torch is not imported here: the curation's processes start faster without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from imageconductor.data.clip_records import CorruptClipError
from imageconductor.files import read_text

VIDEO_SUFFIXES = (
    ".mp4",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".wmv",
    ".ogv",
    ".gif",
    ".3gp",
)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Video:
    """A video of which only the requested frames are decoded.

    Args:
        file: Its path, or its bytes.
        name: At the start of messages.

    Raises:
        CorruptClipError: The file is not a readable video.
    """

    def __init__(self, file: Path | BinaryIO, name: str):
        open_reader = _find_reader()
        self.name = name
        try:
            self._reader = open_reader(str(file) if isinstance(file, Path) else file)
        except Exception as error:  # Decoders report damage by many kinds of exceptions.
            raise CorruptClipError(f"{name} is not a readable video") from error

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def fps(self) -> float:
        """Frames per second, on average over the file; 0 or not a number if it does not say."""
        return float(self._reader.fps)

    def size(self) -> tuple[int, int]:
        """(W, H) in pixels of the first frame, which is decoded.

        Raises:
            CorruptClipError: It cannot be.
        """
        height, width = self.frames([0]).shape[1:3]
        return width, height

    def frames(self, numbers: Sequence[int]) -> NDArray[np.uint8]:
        """The frames at `numbers`: (T, H, W, 3).

        Raises:
            CorruptClipError: They cannot be decoded, or there are fewer in the file.
        """
        try:
            return self._reader.read(list(numbers))
        except Exception as error:
            which = f"frame {numbers[0]}" if len(numbers) == 1 else f"frames {numbers[0]} to {numbers[-1]}"
            raise CorruptClipError(f"{self.name}: {which} cannot be decoded") from error


def _find_reader() -> Callable[[str | BinaryIO], _Decord | _PyAV]:
    """The installed one; decord has no wheels for macOS and Arm."""
    try:
        import decord  # noqa: F401
    except ImportError:
        import av  # noqa: F401

        return _PyAV
    return _Decord


class _Decord:
    def __init__(self, file: str | BinaryIO):
        from decord import VideoReader

        self._reader = VideoReader(file, num_threads=1)
        self.fps = self._reader.get_avg_fps()

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, numbers: list[int]) -> NDArray[np.uint8]:
        return self._reader.get_batch(numbers).asnumpy()


class _PyAV:
    """Reads the stream that players choose and turns its frames upright."""

    def __init__(self, file: str | BinaryIO):
        import av

        from imageconductor.data.video_streams import rank_stream

        self._container: Any = av.open(file)
        self._stream: Any = max(self._container.streams.video, key=rank_stream)
        self.fps = self._stream.average_rate or 0
        packets = self._container.demux(self._stream)  # not decoded
        self._times = sorted({packet.pts for packet in packets if packet.size and packet.pts is not None})

    def __len__(self) -> int:
        return len(self._times)

    def read(self, numbers: list[int]) -> NDArray[np.uint8]:
        from imageconductor.data.video_streams import read_orientation, turn_upright

        wanted = [self._times[number] for number in numbers]
        found: dict[int, NDArray[np.uint8]] = {}
        self._container.seek(min(wanted), stream=self._stream)  # to the last key frame before
        for frame in self._container.decode(self._stream):
            if frame.pts in wanted:
                found[frame.pts] = turn_upright(frame.to_ndarray(format="rgb24"), read_orientation(frame))
            if frame.pts is not None and frame.pts >= max(wanted):
                break
        return np.stack([found[time] for time in wanted])


def read_caption_beside(path: Path) -> str:
    """The text of `NAME.txt` beside a video or picture `NAME.*`, on one line; empty if there is no such file.

    Raises:
        ValueError: It is in another encoding than Unicode's.
    """
    text = path.with_suffix(".txt")
    return " ".join(read_text(text).split()) if text.is_file() else ""
