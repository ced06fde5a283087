"""Videos as files: mp4, trajectories and boxes drawn over them, and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from imageconductor.conditioning import TRACK_CONTROLS, Boxes, Trajectories
from imageconductor.files import atomic_path

Frames = NDArray[np.uint8]  # (T, H, W, 3)
Colour = tuple[int, int, int]

_COLOURS = ((255, 64, 64), (64, 160, 255), (255, 200, 40), (90, 220, 120), (220, 110, 255), (255, 140, 60))
_CONTROL_COLOURS = {"camera": (64, 160, 255), "object": (255, 64, 64)}
_WHITE = (255, 255, 255)
_FARTHEST_PX = 2.0**20  # OpenCV counts in 32 bits
_SUBPIXEL_BITS = 4  # OpenCV draws at sixteenths of a pixel
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


def write_mp4(path: str | Path, frames: Frames, fps: int) -> None:
    """H.264 that every browser plays; odd sizes lose their last row or column to the codec's rule."""
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    iio.imwrite(path, even, plugin="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2)


def draw_trajectories(frames: Frames, trajectories: Trajectories, factor: int = 1) -> Frames:
    """Frames with the tracks drawn on them, which show where each point is and how fast it moves.

    The path is thin, the part travelled so far thick. Each frame's position is a dot on it: where the dots are far
    apart, the point is fast. The present position is a larger dot; a point that holds still has a ring.

    Args:
        frames: (T, H, W, 3).
        trajectories: With T frames, of the frames' size before they were enlarged by `factor`. Tracks that state what
            they move are blue (camera) or red (object).
        factor: By which the frames were enlarged.
    """
    points = (trajectories.points.numpy() + 0.5) * factor - 0.5
    visible = trajectories.visible.numpy() & np.isfinite(points).all(axis=-1)
    colours = _choose_colours(trajectories)
    scale = max(1, round(min(frames.shape[1:3]) / 256))
    drawn = frames.copy()
    for t, frame in enumerate(drawn):
        for n, colour in enumerate(colours):
            past, now = slice(0, t + 1), slice(t, t + 1)
            if not trajectories.still[n]:
                _draw_path(frame, points[n], visible[n], colour, scale)
                _draw_dots(frame, points[n], visible[n], colour, 2.2 * scale)
                _draw_path(frame, points[n, past], visible[n, past], colour, 5 * scale)
                _draw_dots(frame, points[n, past], visible[n, past], _WHITE, 1.2 * scale)
            _draw_dots(frame, points[n, now], visible[n, now], _WHITE, 5 * scale)
            _draw_dots(frame, points[n, now], visible[n, now], colour, 4 * scale)
            if trajectories.still[n]:
                _draw_dots(frame, points[n, now], visible[n, now], colour, 9 * scale, 2 * scale)
    return drawn


def draw_boxes(frames: Frames, boxes: Boxes, factor: int = 1) -> Frames:
    """Frames with a rectangle around each object that is present, and its class name.

    Args:
        frames: (T, H, W, 3).
        boxes: With T frames, of the frames' size before they were enlarged by `factor`.
        factor: By which the frames were enlarged.
    """
    scale = max(1, round(min(frames.shape[1:3]) / 256))
    corners = (boxes.xyxy.numpy() * factor - 0.5).reshape(*boxes.xyxy.shape[:2], 2, 2)  # to centres of pixels
    drawn = frames.copy()
    for t, frame in enumerate(drawn):
        for n, name in enumerate(boxes.names):
            if not boxes.present[n, t]:
                continue
            colour = _COLOURS[n % len(_COLOURS)]
            first, second = (_subpixel(corner) for corner in corners[n, t])
            cv2.rectangle(frame, first, second, colour, 2 * scale, cv2.LINE_AA, _SUBPIXEL_BITS)
            _draw_label(frame, name, corners[n, t, 0], colour, scale)
    return drawn


def _draw_label(frame: Frames, text: str, corner: NDArray[np.floating], colour: Colour, scale: int) -> None:
    """A text on its own ground, above a corner where there is room, else below it."""
    text, font, size = text[:40], cv2.FONT_HERSHEY_SIMPLEX, 0.4 * scale
    (width, height), below = cv2.getTextSize(text, font, size, scale)
    x = int(np.clip(corner[0], 0, max(0, frame.shape[1] - width)))
    y = int(corner[1]) - 2 * scale if corner[1] >= height + 4 * scale else int(corner[1]) + height + 3 * scale
    cv2.rectangle(frame, (x, y - height - scale), (x + width, y + below // 2), colour, -1)
    cv2.putText(frame, text, (x, y), font, size, (0, 0, 0), scale, cv2.LINE_AA)


def _choose_colours(trajectories: Trajectories) -> list[Colour]:
    """A colour for each track: that of what it moves, or the next one of the palette."""
    if trajectories.control is None:
        return [_COLOURS[n % len(_COLOURS)] for n in range(trajectories.num_tracks)]
    others = [colour for colour in _COLOURS if colour not in _CONTROL_COLOURS.values()]
    return [
        _CONTROL_COLOURS[TRACK_CONTROLS[code]] if code >= 0 else others[n % len(others)]
        for n, code in enumerate(trajectories.control.tolist())
    ]


def _draw_path(
    frame: Frames, points: NDArray[np.floating], visible: NDArray[np.bool_], colour: Colour, width: int
) -> None:
    for start, end, seen in zip(points[:-1], points[1:], visible[:-1] & visible[1:], strict=True):
        if seen:
            cv2.line(frame, _subpixel(start), _subpixel(end), colour, width, cv2.LINE_AA, _SUBPIXEL_BITS)


def _draw_dots(
    frame: Frames,
    points: NDArray[np.floating],
    visible: NDArray[np.bool_],
    colour: Colour,
    radius: float,
    ring_width: int = -1,
) -> None:
    """Discs around the visible points, or rings."""
    size = round(radius * 2**_SUBPIXEL_BITS)
    for point in points[visible]:
        cv2.circle(frame, _subpixel(point), size, colour, ring_width, cv2.LINE_AA, _SUBPIXEL_BITS)


def _subpixel(point: NDArray[np.floating]) -> tuple[int, int]:
    near = np.clip(point, -_FARTHEST_PX, _FARTHEST_PX)  # measured points may be anywhere
    x, y = np.round(near * 2**_SUBPIXEL_BITS).astype(int).tolist()
    return x, y


def contact_sheet(path: str | Path, rows: Sequence[tuple[str, Frames]], columns: int = 6) -> None:
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
