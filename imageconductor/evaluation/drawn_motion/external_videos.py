"""Checks the videos that other methods hand in: nothing is missing, the format is right, the names are not mixed up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from imageconductor.evaluation.drawn_motion.requests import Request
from imageconductor.evaluation.drawn_motion.video_format import VideoFormat
from imageconductor.evaluation.video_files import read_video


def check_complete(method: str, expected: Sequence[Path]) -> None:
    """Makes sure that every expected video of a method is there.

    Raises:
        FileNotFoundError: Videos are missing.
    """
    if missing := [path for path in expected if not path.is_file()]:
        raise FileNotFoundError(
            f"method {method} lacks {len(missing)} of {len(expected)} videos, the first one is {missing[0]}; "
            "imageconductor evaluate export-requests writes what they are made from: name them TASK/KEY.mp4"
        )


class FirstFrames:
    """The first frames of a set's requests, as thumbnails.

    Args:
        requests: All requests of the set, in the method's format.
    """

    def __init__(self, requests: Sequence[Request]):
        self.keys = [request.key for request in requests]
        self.thumbnails = np.stack([_make_thumbnail(request.image) for request in requests])

    def check(self, path: Path, request: Request, wanted: VideoFormat) -> None:
        """Makes sure that a video is in its method's format and begins with the picture of its own request.

        Args:
            path: File of the video.
            request: The request that the video answers, by its name.
            wanted: The method's format.

        Raises:
            ValueError: The file cannot be read, has another format, or begins with another request's picture.
        """
        frame = wanted.select_judged(read_video(path, wanted.size, wanted.num_frames))[0]
        thumbnail = _make_thumbnail(frame)
        distances = np.abs(self.thumbnails - thumbnail).mean(axis=(1, 2, 3))
        nearest = int(distances.argmin())
        if 2 * distances[nearest] + 0.02 < np.abs(_make_thumbnail(request.image) - thumbnail).mean():
            raise ValueError(
                f"{path} begins with the picture of {self.keys[nearest]}, not of {request.key}; are the names mixed up?"
            )


def _make_thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(16, 16, 3) in [0, 1]: enough to tell one picture from another."""
    return cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float64) / 255
