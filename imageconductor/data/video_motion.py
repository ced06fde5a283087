"""Trajectories taken from footage: points of the first frame, followed through a video by a tracker."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import torch
from numpy.typing import NDArray

from imageconductor.conditioning import Trajectories, camera_motion
from imageconductor.conditioning.first_frame import cover_scale
from imageconductor.data.trackers import LucasKanadeTracker, Tracker

MAX_FRAMES = 512
"""Frames that are held in memory and followed at most."""

_MAX_SIDE_PX = 384  # shorter side in which points are followed; larger frames would be slower and no more exact
_CHUNK = 8  # frames between two reports of progress


def _ignore(_count: int) -> None:
    pass


@dataclass(frozen=True)
class Footage:
    """Adjacent frames of a video.

    Attributes:
        frames: (T, H, W, 3) uint8, reduced to a shorter side of at most 384 pixels.
        size: (W, H) of the video.
        source: name in messages.
    """

    frames: NDArray[np.uint8]
    size: tuple[int, int]
    source: str


def read_video_size(path: Path) -> tuple[int, int]:
    """(W, H) of a video, upright.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read as a video.
    """
    frames = _iterate_frames(path)
    first = next(frames, None)
    frames.close()
    if first is None:
        raise ValueError(f"{path} has no frames")
    return first.shape[1], first.shape[0]


def read_footage(
    path: Path, start_frame: int = 0, num_frames: int | None = None, on_frames: Callable[[int], object] = _ignore
) -> Footage:
    """Frames of a video, from `start_frame` on.

    Args:
        path: the file.
        start_frame: counted from 0.
        num_frames: how many; None = up to the last.
        on_frames: is told how many further frames have been read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read as a video, is too short, or more than `MAX_FRAMES` frames are asked for.
    """
    if num_frames is not None and num_frames > MAX_FRAMES:
        raise ValueError(f"{num_frames} frames of {path} are asked for, at most {MAX_FRAMES} can be followed")
    kept: list[NDArray[np.uint8]] = []
    size, count = (0, 0), 0
    frames = _iterate_frames(path)
    for frame in frames:
        count += 1
        on_frames(1)
        if count <= start_frame:
            continue
        if len(kept) == MAX_FRAMES:
            frames.close()
            raise ValueError(
                f"{path} goes on for more than {MAX_FRAMES} frames, which is too long to follow; cut it, or take a "
                "part of it with the options --start-frame and --frames of the tracks command"
            )
        size = (frame.shape[1], frame.shape[0])
        kept.append(_reduce(frame))
        if len(kept) == num_frames:
            frames.close()
            break
    needed = start_frame + (2 if num_frames is None else num_frames)
    if count < needed:
        raise ValueError(f"{path} has {count} frames, {needed} are needed; ask for fewer, or start earlier")
    return Footage(np.stack(kept), size, str(path))


def place_grid(video: tuple[int, int], size: tuple[int, int], side: int) -> NDArray[np.float64]:
    """A side x side grid over the part of a video's frame that a cover crop to `size` (W, H) shows.

    Returns:
        (side^2, 2), pixels of the video.
    """
    scale = cover_scale(video, size)
    points = camera_motion(size, 1, grid=(side, side)).points[:, 0].numpy()
    left_top = (np.asarray(video) - np.asarray(size) / scale) / 2
    return (points + 0.5) / scale + left_top - 0.5


def check_points(points: NDArray[np.float64], video: tuple[int, int], size: tuple[int, int], source: str) -> None:
    """Makes sure that points lie in a video's frame, and in the part of it that a cover crop to `size` (W, H) shows.

    Args:
        points: (N, 2), pixels of the video.
        video: (W, H) of the video.
        size: (W, H) of the crop.
        source: name of the video in messages.

    Raises:
        ValueError: a point does not; names it.
    """
    placed = Trajectories(torch.from_numpy(points)[:, None], torch.ones(len(points), 1, dtype=torch.bool), video)
    is_shown = placed.cover_crop(size).visible[:, 0]
    for n, (x, y) in enumerate(points.tolist()):
        where = f"point {n} at ({x:g}, {y:g}) lies outside the {video[0]}x{video[1]} frame of {source}"
        if not (0 <= x < video[0] and 0 <= y < video[1]):
            raise ValueError(f"{where}; x must be in [0, {video[0]}) and y in [0, {video[1]})")
        if not is_shown[n]:
            raise ValueError(
                f"point {n} at ({x:g}, {y:g}) lies outside the part of {source} that {size[0]}x{size[1]} shows"
            )


def track_footage(
    footage: Footage,
    points: NDArray[np.float64],
    tracker: Tracker | None = None,
    on_frames: Callable[[int], object] = _ignore,
) -> Trajectories:
    """The points in every frame; where one could not be followed it is invisible and stays where it was seen last.

    Args:
        footage: frames of a video.
        points: (N, 2), pixels of the video.
        tracker: None = Lucas-Kanade.
        on_frames: is told how many further frames have been tracked.

    Returns:
        N tracks over T frames, in pixels of the video.

    Raises:
        ValueError: no point could be followed beyond the first frame.
    """
    frames, (width, height) = footage.frames, footage.size
    tracker = tracker or LucasKanadeTracker()
    scale = np.array([frames.shape[2] / width, frames.shape[1] / height])
    start = (points + 0.5) * scale - 0.5
    if isinstance(tracker, LucasKanadeTracker):
        positions, seen = _track_in_chunks(tracker, frames, start, on_frames)
    else:
        positions, seen = tracker.track(frames, start)
        on_frames(len(frames))
    if not seen[:, 1:].any():
        raise ValueError(
            f"{footage.source}: none of the {len(points)} points could be followed; take points on edges or texture"
        )
    for t in range(1, len(frames)):
        positions[:, t] = np.where(seen[:, t, None], positions[:, t], positions[:, t - 1])
    small = Trajectories(torch.from_numpy(positions), torch.from_numpy(seen), (frames.shape[2], frames.shape[1]))
    return small.resize(footage.size)


def take_motion(path: Path, size: tuple[int, int], num_frames: int, grid: int = 3) -> Trajectories:
    """The motion of a whole video in a video of another size and length.

    A grid of points over the part that a cover crop shows is followed by Lucas-Kanade.

    Args:
        path: the file.
        size: (W, H) of the result, to which the video is cropped as an image is.
        num_frames: T of the result, over which the motion is spread.
        grid: points along each side.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read as a video, is too short or too long, or no point could be followed.
    """
    footage = read_footage(path)
    tracks = track_footage(footage, place_grid(footage.size, size, grid))
    return tracks.resample(num_frames).cover_crop(size)


def every_nth(tracks: Trajectories, stride: int) -> Trajectories:
    """The tracks in every `stride`-th frame, from the first on."""
    return replace(tracks, points=tracks.points[:, ::stride], visible=tracks.visible[:, ::stride])


def _track_in_chunks(
    tracker: LucasKanadeTracker,
    frames: NDArray[np.uint8],
    points: NDArray[np.float64],
    on_frames: Callable[[int], object],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What `tracker.track` gives, which goes from frame to frame, with reports on the way."""
    positions = np.repeat(points[:, None], len(frames), axis=1)
    seen = np.ones(positions.shape[:2], np.bool_)
    for first in range(0, len(frames) - 1, _CHUNK):
        part = slice(first, first + _CHUNK + 1)
        positions[:, part], followed = tracker.track(frames[part], positions[:, first])
        seen[:, part] = followed & seen[:, first, None]
        on_frames(followed.shape[1] - 1)
    return positions, seen


def _iterate_frames(path: Path) -> Generator[NDArray[np.uint8]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file")
    count = 0
    try:
        for frame in iio.imiter(path, plugin="FFMPEG"):
            yield np.asarray(frame, np.uint8)
            count += 1
    except Exception as error:  # Whatever ffmpeg and its wrapper raise.
        reason = str(error).strip().splitlines()[-1]
        where = f" after {count} frames" if count else ""
        raise ValueError(f"{path} cannot be read as a video{where}: {reason}") from error


def _reduce(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = frame.shape[:2]
    factor = _MAX_SIDE_PX / min(height, width)
    if factor >= 1:
        return frame
    size = (round(width * factor), round(height * factor))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
