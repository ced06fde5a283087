"""Reads and writes the mp4 files of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from imageconductor.files import atomic_path, read_text, write_text
from imageconductor.sampling.video import write_mp4

_SAME_ASPECT = 0.02  # largest relative difference of two aspect ratios that count as the same
_FPS = 8


def read_video(path: Path, size: tuple[int, int], num_frames: int) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) of a file, resized to `size` if it has another one: by area if larger, else bicubic.

    Raises:
        ValueError: The file cannot be read, has another aspect ratio, or has not exactly `num_frames` frames.
    """
    try:
        frames = iio.imread(path, plugin="FFMPEG")
    except Exception as error:  # Whatever ffmpeg and its wrapper raise.
        raise ValueError(f"{path} cannot be read as a video: {str(error).strip().splitlines()[-1]}") from error
    if len(frames) != num_frames:
        raise ValueError(
            f"{path} has {len(frames)} frames, {num_frames} were asked for; a video is not cut to fit, "
            "but num_frames and frames of a method say which videos it makes"
        )
    height, width = frames.shape[1:3]
    if abs(width / height * size[1] / size[0] - 1) > _SAME_ASPECT:
        raise ValueError(
            f"{path} is {width}x{height}, whose aspect ratio is not that of {size[0]}x{size[1]}; "
            "size of a method says which videos it makes"
        )
    return np.stack([_resize(frame, size) for frame in frames])


def count_frames(path: Path) -> float | None:
    """Number of frames by the file's header, rounded up; None if it is no video."""
    try:
        facts: dict[str, Any] = iio.immeta(path, plugin="FFMPEG")
        return float(np.ceil(facts["duration"] * facts["fps"] + 0.5))
    except Exception:  # Whatever ffmpeg and its wrapper raise.
        return None


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """Writes frames (T, H, W, 3) as an mp4 file of their size."""
    with atomic_path(path) as temporary:
        write_mp4(temporary, frames, _FPS)


def keep_video(path: Path, frames: NDArray[np.uint8], facts: Mapping[str, Any]) -> None:
    """Writes a video (T, H, W, 3) that a method has made, and beside it KEY.json with its facts.

    A former video goes first, so that facts of this one never stand beside it.
    """
    path.unlink(missing_ok=True)
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=1))
    write_video(path, frames)


def is_made(path: Path, request: str) -> bool:
    """Whether there is a video of this request; not if the `request` among its facts is another digest."""
    facts = path.with_suffix(".json")
    if not path.exists() or not facts.is_file():
        return path.exists()
    return json.loads(read_text(facts)).get("request", request) == request


def _resize(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if frame.shape[1::-1] == size:
        return frame
    larger = frame.shape[1] > size[0]
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA if larger else cv2.INTER_CUBIC), np.uint8)
