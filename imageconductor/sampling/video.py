"""Videos as files: mp4, trajectories drawn over them, and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from imageconductor.conditioning import Trajectories
from imageconductor.files import atomic_path

Frames = NDArray[np.uint8]  # (T, H, W, 3)

_COLOURS = ((255, 64, 64), (64, 160, 255), (255, 200, 40), (90, 220, 120), (220, 110, 255), (255, 140, 60))
_WATCHABLE_PX = 256


def to_uint8(frames: NDArray[np.floating]) -> Frames:
    """Frames in [0, 1] as bytes."""
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def upscale_for_viewing(frames: Frames) -> tuple[Frames, int]:
    """Frames enlarged by a whole factor until the shorter side is 256 pixels, and that factor."""
    height, width = frames.shape[1:3]
    factor = max(1, -(-_WATCHABLE_PX // min(height, width)))
    if factor == 1:
        return frames, 1
    size = (width * factor, height * factor)
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in frames]), factor


def write_mp4(path: Path, frames: Frames, fps: int) -> None:
    """H.264 that every browser plays; odd sizes lose their last row or column to the codec's rule."""
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    iio.imwrite(path, even, plugin="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2)


def draw_trajectories(frames: Frames, trajectories: Trajectories, factor: int = 1) -> Frames:
    """Frames with the tracks drawn on them: the path thin, the part travelled so far thick, the position as a dot.

    Args:
        frames: (T, H, W, 3).
        trajectories: With T frames, of the frames' size before they were enlarged by `factor`.
        factor: By which the frames were enlarged.
    """
    points = (trajectories.points.numpy() + 0.5) * factor - 0.5
    visible = trajectories.visible.numpy()
    scale = max(1, round(min(frames.shape[1:3]) / 256))
    drawn = frames.copy()
    for t, frame in enumerate(drawn):
        for n in range(trajectories.num_tracks):
            colour = _COLOURS[n % len(_COLOURS)]
            _path(frame, points[n], visible[n], colour, scale)
            _path(frame, points[n, : t + 1], visible[n, : t + 1], colour, 3 * scale)
            if not visible[n, t]:
                continue
            x, y = np.round(points[n, t]).astype(int).tolist()
            cv2.circle(frame, (x, y), 5 * scale, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(frame, (x, y), 4 * scale, colour, -1, cv2.LINE_AA)
            if trajectories.still[n]:
                cv2.circle(frame, (x, y), 9 * scale, colour, 2 * scale, cv2.LINE_AA)
    return drawn


def _path(frame: Frames, points: NDArray[np.floating], visible: NDArray[np.bool_], colour: tuple, width: int) -> None:
    for start, end, seen in zip(points[:-1], points[1:], visible[:-1] & visible[1:], strict=True):
        if seen:
            first, last = (np.round(p).astype(int).tolist() for p in (start, end))
            cv2.line(frame, first, last, colour, width, cv2.LINE_AA)


def contact_sheet(path: Path, rows: Sequence[tuple[str, Frames]], columns: int = 6) -> None:
    """A PNG with one row a video: its name, then `columns` frames from first to last."""
    strips = []
    for name, frames in rows:
        large, _ = upscale_for_viewing(frames)
        chosen = large[np.linspace(0, len(large) - 1, min(columns, len(large))).round().astype(int)]
        strip = np.concatenate([np.pad(f, ((2, 2), (2, 2), (0, 0)), constant_values=255) for f in chosen], axis=1)
        title = np.full((24, strip.shape[1], 3), 255, np.uint8)
        cv2.putText(title, name, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        strips.append(np.concatenate([title, strip]))
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    with atomic_path(path) as temporary:
        iio.imwrite(temporary, np.concatenate(padded), extension=".png")
