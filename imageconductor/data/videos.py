"""Video files read by random access, and the names under which videos, pictures and their captions lie in a folder.

Torch is not imported here: the curation's processes start faster without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

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
        from decord import VideoReader

        self.name = name
        try:
            self._reader = VideoReader(str(file) if isinstance(file, Path) else file, num_threads=1)
        except Exception as error:  # decord reports damage by many kinds of exceptions.
            raise CorruptClipError(f"{name} is not a readable video") from error

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def fps(self) -> float:
        """Frames per second, on average over the file; 0 or not a number if it does not say."""
        return float(self._reader.get_avg_fps())

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
            return self._reader.get_batch(list(numbers)).asnumpy()
        except Exception as error:
            which = f"frame {numbers[0]}" if len(numbers) == 1 else f"frames {numbers[0]} to {numbers[-1]}"
            raise CorruptClipError(f"{self.name}: {which} cannot be decoded") from error


def read_caption_beside(path: Path) -> str:
    """The text of `NAME.txt` beside a video or picture `NAME.*`, on one line; empty if there is no such file.

    Raises:
        ValueError: It is in another encoding than Unicode's.
    """
    text = path.with_suffix(".txt")
    return " ".join(read_text(text).split()) if text.is_file() else ""
