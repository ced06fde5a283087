"""Text files of Tora and MotionCtrl: one track in a file, a line "x,y" for each point, on a 256x256 canvas.

Sources: alibaba/Tora `diffusers-version/tora/traj_utils.py`, TencentARC/MotionCtrl `gradio_utils/traj_utils.py`. The
canvas is stretched over the picture, x and y apart. Tracks of different length are stretched to the clip, each by
itself.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imageconductor.conditioning.formats.track_file import Hints, TrackFile, drawn_tracks, find_relative_size
from imageconductor.conditioning.trajectory_json import Track, check_count
from imageconductor.files import write_text

_CANVAS = 256
_NUMBER = r"[+-]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][+-]?\d{1,2})?"
_LINE = re.compile(rf"\s*({_NUMBER})\s*,\s*({_NUMBER})\s*")


def is_tora(text: str) -> bool:
    """Whether a text is lines "x,y" alone."""
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and all(_LINE.fullmatch(line) for line in lines)


def read_tora(path: Path, texts: Sequence[tuple[Path, str]], hints: Hints) -> TrackFile:
    """The tracks of text files, in the order of the files; `path` is named for all of them."""
    check_count(len(texts), hints.max_tracks, str(path))
    size = find_relative_size(path, hints, "tora", (_CANVAS, _CANVAS))
    notes = (f"{path} (tora): its canvas of 256x256 was stretched over {size[0]}x{size[1]}",)
    tracks: list[Track] = []
    for file, text in texts:
        points: list[list[float]] = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                match = _LINE.fullmatch(line)
                if match is None:
                    raise ValueError(f"{file}, line {number}: tora files have lines x,y, got {line[:40]!r}")
                points.append([float(match[1]), float(match[2])])
        if not points:
            raise ValueError(f"{file} has no points; tora files have lines x,y")
        on_canvas = drawn_tracks([points], (_CANVAS, _CANVAS), hints, str(file), is_sampled=False)[0].points
        is_still = bool((on_canvas == on_canvas[0]).all())
        pixels = (on_canvas[:1] if is_still else on_canvas) * np.asarray(size) / _CANVAS
        tracks.append(Track(pixels, np.ones(len(pixels), np.bool_), per_frame=not is_still))
    return TrackFile("tora", tracks, size, notes)


def tora_paths(path: Path, num_tracks: int) -> list[Path]:
    """The files that are written: NAME.txt for one track, NAME_0.txt, NAME_1.txt and so on for several."""
    digits = len(str(num_tracks - 1))
    names = [path.with_name(f"{path.stem}_{n:0{digits}}{path.suffix or '.txt'}") for n in range(num_tracks)]
    return [path] if num_tracks == 1 else names


def write_tora(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:
    """Writes a file for each track, in whole steps of the canvas."""
    paths = tora_paths(path, len(tracks))
    for file, track in zip(paths, tracks, strict=True):
        steps = np.clip(np.rint(track.points * _CANVAS / np.asarray(size)), 0, _CANVAS - 1).astype(int)
        write_text(file, "".join(f"{x},{y}\n" for x, y in steps.tolist()))
    return paths
