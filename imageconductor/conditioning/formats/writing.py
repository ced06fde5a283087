"""Tracks in the form of another tool, and what is lost in it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from imageconductor.conditioning.formats import array_files, tora
from imageconductor.conditioning.formats.registry import Format, find_format, written_formats
from imageconductor.conditioning.interpolation import place_track
from imageconductor.conditioning.timing import STEADY
from imageconductor.conditioning.trajectory_json import BORDER_PX, Track, check_size


@dataclass(frozen=True)
class Written:
    """Files that were written, and what they cannot hold, a line each."""

    paths: list[Path]
    notes: tuple[str, ...]


def write_tracks(
    path: str | Path,
    tracks: Sequence[Track],
    size: tuple[int, int],
    format: str,
    *,
    num_frames: int | None = None,
    drawn_frames: int | None = None,
) -> Written:
    """Writes tracks in the form of another tool; a form of several files gives them names like that of `path`.

    Args:
        path: the file.
        tracks: in pixels of `size`, such as `TrackFile.tracks` or `Trajectories.to_tracks()`.
        size: (W, H).
        format: one of `FORMATS`.
        num_frames: points per track; None = what the tracks have, or else `drawn_frames`, if the tool takes it, else
            what the tool expects.
        drawn_frames: frames of the clip that control points were drawn for; None = unknown.

    Raises:
        ValueError: a form that is only read, no tracks, or a point that is not finite.
    """
    path, form, size = Path(path), find_format(format), check_size(size)
    if form.write is None:
        raise ValueError(f"{form.name} files are read and not written; there are {', '.join(written_formats())}")
    if not tracks and form.num_frames is not None:
        raise ValueError(f"{path}: there are no tracks to write")
    if bad := [n for n, track in enumerate(tracks) if not np.isfinite(track.points).all()]:
        raise ValueError(f"{path}: track {bad[0]} has points that are not finite; drop or fill them before saving")
    kept, notes = _to_frames(form, tracks, num_frames, drawn_frames)
    kept, lost = _fit(form, kept, size)
    return Written(form.write(path, kept, size), (*notes, *lost))


def list_written(path: str | Path, num_tracks: int, format: str) -> list[Path]:
    """The files that `write_tracks` writes for a path."""
    path = Path(path)
    if format == "tora":
        return tora.tora_paths(path, num_tracks)
    return array_files.wan_move_paths(path) if format == "wan-move" else [path]


def takes_frames(form: Format, num_frames: int) -> bool:
    """Whether the tool reads tracks of so many points."""
    if form.frame_rule == "exact":
        return num_frames == form.num_frames
    return form.frame_rule == "" or num_frames % 4 == 1


def _to_frames(
    form: Format, tracks: Sequence[Track], num_frames: int | None, drawn_frames: int | None
) -> tuple[list[Track], list[str]]:
    """Tracks with as many points as the form takes, and notes of what that changed."""
    if form.num_frames is None and num_frames is None:
        return list(tracks), []
    lengths = {len(track.points) for track in tracks if track.per_frame}
    own = lengths.pop() if len(lengths) == 1 and all(len(t.points) == 1 or t.per_frame for t in tracks) else None
    known = own or drawn_frames
    count = num_frames or (known if known and takes_frames(form, known) else form.num_frames or 1)
    placed = [place_track(track, count) for track in tracks]
    notes: list[str] = []
    if count != own:
        notes.append(f"tracks were resampled to {count} points, the first and last point kept")
    if not takes_frames(form, count):
        notes.append(f"{form.name} takes {form.num_frames} frames{' or other 4n+1' if '4' in form.frame_rule else ''}")
    is_still = [len(track.points) == 1 and form.num_frames is None for track in tracks]
    return [
        track if still else replace(track, points=p, visible=v, timing=STEADY, per_frame=True)
        for track, (p, v), still in zip(tracks, placed, is_still, strict=True)
    ], notes


def _fit(form: Format, tracks: Sequence[Track], size: tuple[int, int]) -> tuple[list[Track], list[str]]:
    """Tracks that the form can hold, and notes of what it cannot."""
    notes: list[str] = []
    if not form.has_size:
        notes.append(f"{form.name} holds no frame size; this one is {size[0]}x{size[1]}")
    hidden = sum(int((~track.visible).sum()) for track in tracks)
    if hidden and not form.has_visibility:
        notes.append(f"{form.name} holds no visibility; {hidden} hidden points were written like visible ones")
    limit = np.asarray(size) - BORDER_PX
    outside = sum(_count_outside(track, size) for track in tracks)
    if outside and not form.has_outside:
        how = "hidden" if form.has_visibility else "moved to its border"
        notes.append(f"{form.name} holds no points outside the frame; {outside} were {how}")
    if any(track.control for track in tracks) and form.name != "imageconductor":
        notes.append(f"{form.name} does not say what a track moves; camera and object tracks are alike in it")
    if not form.has_fractions:
        notes.append(f"{form.name} holds whole steps; positions were rounded")
    if not form.has_visibility:
        tracks = [
            replace(track, points=np.clip(track.points, 0, limit), visible=np.ones(len(track.points), np.bool_))
            for track in tracks
        ]
    return list(tracks), notes


def _count_outside(track: Track, size: tuple[int, int]) -> int:
    is_inside = ((track.points >= 0) & (track.points < np.asarray(size))).all(axis=-1)
    return int(np.count_nonzero(track.visible & ~is_inside))
