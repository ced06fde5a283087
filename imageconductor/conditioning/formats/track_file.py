"""What a reader is told and gives back, and the checks that readers share."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imageconductor.conditioning.camera import CameraMotion
from imageconductor.conditioning.trajectory_json import (
    FARTHEST_MEASURED_PX,
    MAX_FILE_FRAMES,
    MAX_FILE_TRACKS,
    PUBLISHED_SIZE,
    Track,
    check_count,
    check_size,
    check_tracks,
    fill_padding,
)

DEFAULT_FRAMES = 16
"""Frames of a clip where nothing is known of its length, as the published release makes them."""

_HOW = "as drawn_size=(W, H), sample.py --trajectories-size WxH or convert --size WxH"
_MIN_SAMPLED = 14  # Fewest frames of a model that reads points per frame; shorter lists are control points.


@dataclass(frozen=True)
class Hints:
    """What is known beside the file; sizes are (W, H) in pixels, None = unknown.

    Attributes:
        size: the frame in which the tracks were drawn, as the user states it.
        image_size: the picture that they belong to, for forms that refer to it.
        published_size: the frame of the published form where the user states none.
        sample: name or index of the clip, for files of several.
        is_named: whether the user named the form, which settles what the content leaves in doubt.
        max_tracks: largest number of tracks accepted.
        num_frames: frames of the video, in which the times of our form count where it does not state a number.
    """

    size: tuple[int, int] | None = None
    image_size: tuple[int, int] | None = None
    published_size: tuple[int, int] | None = None
    sample: str | None = None
    is_named: bool = False
    max_tracks: int = MAX_FILE_TRACKS
    num_frames: int = DEFAULT_FRAMES


@dataclass(frozen=True)
class TrackFile:
    """The content of a track file.

    Attributes:
        format: name of the form, a key of `FORMATS`.
        tracks: N tracks, in pixels of `size`; (0, 0) is the centre of the top-left pixel.
        size: (W, H) of the frame.
        notes: what was assumed because the file does not say it, a line each.
        num_frames: frames of the clip in which the tracks' times count; None = of the video, whatever it has.
        camera: motion of the camera, whose tracks come after the drawn ones; None = not stated.
    """

    format: str
    tracks: list[Track]
    size: tuple[int, int]
    notes: tuple[str, ...] = ()
    num_frames: int | None = None
    camera: CameraMotion | None = None


def find_size(path: Path, hints: Hints, name: str) -> tuple[tuple[int, int], tuple[str, ...]]:
    """(W, H) of the frame of a file in pixels that does not state it, and what was assumed.

    Raises:
        ValueError: nothing is known of it.
    """
    if hints.size:
        return check_size(hints.size), ()
    if name == "published":
        size = check_size(hints.published_size or PUBLISHED_SIZE)
    elif hints.image_size:
        size = check_size(hints.image_size)
    else:
        raise ValueError(f"{path}: {name} files state no frame size; give the one that was drawn in, {_HOW}")
    return size, (f"{path} ({name}) states no frame size; {size[0]}x{size[1]} was assumed",)


def find_relative_size(path: Path, hints: Hints, name: str, fallback: tuple[int, int] | None = None) -> tuple[int, int]:
    """(W, H) to scale positions to that are relative to the picture.

    Raises:
        ValueError: nothing is known of it, and there is no `fallback`.
    """
    known = hints.size or hints.image_size or hints.published_size
    if known:
        return check_size(known)
    if fallback is None:
        raise ValueError(f"{path}: {name} positions are relative to the picture; give its size, {_HOW}")
    return fallback


@contextmanager
def blame_assumed_size(notes: Sequence[str]) -> Generator[None]:
    """Adds to the error about a point outside that the size of the frame was assumed, if there is a note of it."""
    try:
        yield
    except ValueError as error:
        if notes and " lies outside the " in str(error):
            raise ValueError(f"{error}; that size was assumed, and another can be given, {_HOW}") from None
        raise


def stated_size(path: Path, stated: tuple[int, int], hints: Hints) -> tuple[str, ...]:
    """A note where the user says another frame size than the file, which wins."""
    if hints.size in (None, stated):
        return ()
    return (f"{path} states a frame of {stated[0]}x{stated[1]}, which is used in place of the size given",)


def check_length(num_points: int, where: str) -> None:
    """Makes sure that a track is not longer than is accepted.

    Raises:
        ValueError: it is; says how to thin it out.
    """
    if num_points > MAX_FILE_FRAMES:
        keep = -(-num_points // MAX_FILE_FRAMES)
        raise ValueError(f"{where} has {num_points} points, at most {MAX_FILE_FRAMES} are accepted; keep one in {keep}")


def drawn_tracks(
    lists: Sequence[Sequence[object]], size: tuple[int, int], hints: Hints, source: str, *, is_sampled: bool = True
) -> list[Track]:
    """Tracks of a form without visibility, whose points lie in the closed box from 0 to W and from 0 to H.

    Lists of fewer than 14 points are control points: no model reads so few. Of longer ones, if `is_sampled`, each point
    is that of a frame; lists that are shorter than the longest one end hidden, and one point holds still.

    Args:
        lists: a list of [x, y] for each track.
        size: (W, H).
        hints: for the number of tracks.
        source: name at the start of messages.
        is_sampled: whether points may be those of frames.

    Raises:
        ValueError: malformed points; names source, track and point.
    """
    check_count(len(lists), hints.max_tracks, source)
    for n, points in enumerate(lists):
        check_length(len(points), f"{source}: track {n}")
    tracks = check_tracks(list(lists), size, hints.max_tracks, source, is_closed=True)
    longest = max((len(track.points) for track in tracks), default=0)
    if not is_sampled or longest < _MIN_SAMPLED:
        return [_merge_still(track) for track in tracks] if is_sampled else tracks
    return [_merge_still(_end_hidden(track, longest)) for track in tracks]


def measured_tracks(
    points: npt.NDArray[np.floating],
    visible: npt.NDArray[np.bool_],
    hints: Hints,
    source: str,
    *,
    scale: tuple[float, float] = (1.0, 1.0),
    shift: float = 0.0,
) -> list[Track]:
    """Tracks of a form with a point for each frame, which may leave the picture.

    Padding is filled as `fill_padding` says. A track that is visible throughout and never moves is a single point.

    Args:
        points: (N, T, 2) xy in the units of the file.
        visible: (N, T) bool.
        hints: for the number of tracks.
        source: name at the start of messages.
        scale: pixels per unit, in x and y.
        shift: added to the pixels.

    Raises:
        ValueError: a visible point that is not finite, or too many tracks or frames.
    """
    check_counts(points.shape, hints, source)
    raw = points.astype(np.float64)
    finite = (np.abs(raw) < FARTHEST_MEASURED_PX).all(-1)  # False for NaN
    if (wrong := np.argwhere(visible & ~finite)).size:
        n, k = (int(index) for index in wrong[0])
        raise ValueError(f"{source}: track {n}, point {k} must be finite, got {raw[n, k].tolist()}")
    filled = [fill_padding(*track) * np.asarray(scale) + shift for track in zip(raw, visible, strict=True)]
    return [_merge_still(Track(p, v, per_frame=True)) for p, v in zip(filled, visible, strict=True)]


def read_flags(values: npt.NDArray[Any], name: str) -> tuple[npt.NDArray[np.bool_], tuple[str, ...]]:
    """Which flags are set, and what was assumed: of whole numbers those that are not 0, of fractions those above 1/2.

    Args:
        values: booleans or numbers, such as the confidence of a tracker.
        name: of the values, at the start of the note.
    """
    if values.dtype.kind != "f" or ((values == 0) | (values == 1)).all():
        return values != 0, ()
    return values > 0.5, (f"{name} is given in fractions; what is above 0.5 was taken as set",)


def check_counts(shape: Sequence[int], hints: Hints, source: str) -> None:
    """Makes sure that N tracks of T points, the first two of `shape`, are not more than is accepted.

    Raises:
        ValueError: they are, or there is no frame.
    """
    check_count(shape[0], hints.max_tracks, source)
    check_length(shape[1], f"{source}: each track")
    if shape[1] < 1:
        raise ValueError(f"{source}: the tracks have no points")


def _end_hidden(track: Track, num_frames: int) -> Track:
    missing = num_frames - len(track.points)
    if len(track.points) == 1:
        return track
    points = np.concatenate([track.points, np.repeat(track.points[-1:], missing, axis=0)])
    return Track(points, np.arange(num_frames) < num_frames - missing, per_frame=True)


def _merge_still(track: Track) -> Track:
    """A track as a single point if it is visible throughout and never moves, as tools write a held point."""
    if track.visible.all() and (track.points == track.points[0]).all():
        return Track(track.points[:1], track.visible[:1])
    return track
