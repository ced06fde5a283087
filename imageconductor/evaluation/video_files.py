"""The files of an evaluation: videos brought to the shape that is compared, and files that appear whole."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imageconductor.conditioning import cover_crop
from imageconductor.sampling.video import write_mp4

_SAME_ASPECT = 0.02
_FPS = 8
_PARTIAL = ".partial"


def read_video(path: Path, size: tuple[int, int], num_frames: int) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) of a file, resized to `size` if it has another one: by area if larger, else bicubic.

    Raises:
        ValueError: It cannot be read, is of another shape, or has not exactly `num_frames` frames.
    """
    try:
        frames = iio.imread(path, plugin="FFMPEG")
    except Exception as error:  # Whatever ffmpeg and its wrapper raise.
        raise ValueError(f"{path} cannot be read as a video: {str(error).strip().splitlines()[-1]}") from error
    if len(frames) != num_frames:
        raise ValueError(f"{path} has {len(frames)} frames, {num_frames} were asked for; a video is not cut to fit")
    height, width = frames.shape[1:3]
    if abs(width / height * size[1] / size[0] - 1) > _SAME_ASPECT:
        raise ValueError(f"{path} is {width}x{height}, which is not the shape of {size[0]}x{size[1]}")
    return np.stack([_resize(frame, size) for frame in frames])


def read_reference(path: Path, size: tuple[int, int], num_frames: int, stride: int) -> NDArray[np.uint8]:
    """The first frames of footage, every `stride`-th, their centre in the shape of `size`: (T, H, W, 3).

    Raises:
        ValueError: It is too short.
    """
    needed = (num_frames - 1) * stride + 1
    frames = list(islice(iio.imiter(path, plugin="FFMPEG"), needed))[::stride]
    if len(frames) < num_frames:
        raise ValueError(f"{path} has fewer than the {needed} frames that are needed; take it out of the folder")
    return np.stack([np.asarray(cover_crop(Image.fromarray(frame), size)) for frame in frames])


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(16, 16, 3) in [0, 1]: enough to tell one picture from another."""
    return cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float64) / 255


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """Frames (T, H, W, 3) as an mp4 file that appears whole, as large as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{_PARTIAL}.mp4")  # The suffix tells ffmpeg the format.
    write_mp4(temporary, frames, _FPS)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """A text file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def remove_partial(folder: Path) -> None:
    """Deletes what a killed run left half-written; nothing may be writing there."""
    for path in folder.rglob(f".*{_PARTIAL}*"):
        path.unlink()


def _resize(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if frame.shape[1::-1] == size:
        return frame
    larger = frame.shape[1] > size[0]
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA if larger else cv2.INTER_CUBIC), np.uint8)
