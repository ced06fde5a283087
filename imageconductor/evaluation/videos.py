"""Videos as files, brought to the shape that is compared."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

_SAME_ASPECT = 0.02


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
    return np.stack([_cover(frame, size) for frame in frames])


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(16, 16, 3) in [0, 1]: enough to tell one picture from another."""
    return cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float64) / 255


def _resize(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if frame.shape[1::-1] == size:
        return frame
    larger = frame.shape[1] > size[0]
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA if larger else cv2.INTER_CUBIC), np.uint8)


def _cover(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The centre of a frame in the shape of `size`, resized to it."""
    height, width = frame.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    w, h = min(width, round(size[0] / scale)), min(height, round(size[1] / scale))
    x, y = (width - w) // 2, (height - h) // 2
    return _resize(np.ascontiguousarray(frame[y : y + h, x : x + w]), size)
