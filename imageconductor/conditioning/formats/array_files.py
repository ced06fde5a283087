"""Tracks as NumPy arrays: Wan-Move, WanGP's Motion Designer, CoTracker's output as it is saved, SG-I2V.

Sources: ali-vilab/Wan-Move `wan/wan_move.py` and `gradio_app.py`, deepbeepmeep/Wan2GP
`plugins/motion_designer/assets/app.js`, facebookresearch/co-tracker `cotracker/predictor.py`, Kmcode1/SG-I2V
`inference.py`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from imageconductor.conditioning.formats.numpy_data import Array, describe_arrays, load_arrays, npz_bytes
from imageconductor.conditioning.formats.track_file import (
    Hints,
    TrackFile,
    check_counts,
    find_relative_size,
    find_size,
    measured_tracks,
    read_flags,
)
from imageconductor.conditioning.trajectory_json import Track
from imageconductor.files import atomic_write

_TRACK_KEYS = ("tracks", "pred_tracks")
_VISIBILITY_KEYS = ("visibility", "pred_visibility")


def recognise_arrays(arrays: Mapping[str, Array]) -> str:
    """Name of the form of an npz archive or of an npy file; positions up to 1 are WanGP's.

    Wan-Move's npy and one of CoTracker's tracks are the same: pixels, frames first.
    """
    if "" not in arrays:
        return "cotracker"
    array = arrays[""]
    return "wangp" if array.ndim in (3, 4) and array.size and np.nanmax(array) <= 1 else "wan-move"


def read_wan_move(path: Path, arrays: Mapping[str, Array], hints: Hints) -> TrackFile:
    """Wan-Move's NAME_tracks.npy, (1, T, N, 2) or (T, N, 2) in pixels of the picture, with NAME_visibility.npy."""
    tracks = _only_array(path, arrays, "wan-move")
    beside = visibility_path(path)
    seen = _visible(load_arrays(beside).get(""), tracks, beside) if beside and beside.is_file() else None
    return _read_pixels(path, tracks, seen, hints, "wan-move")


def read_cotracker(path: Path, arrays: Mapping[str, Array], hints: Hints) -> TrackFile:
    """CoTracker's (B, T, N, 2) tracks with B = 1 and their visibility, in an npz archive or alone in an npy file."""
    name = next((key for key in ("", *_TRACK_KEYS) if key in arrays), None)
    if name is None:
        metres = "; TAPVid-3D's are metres: project them with its intrinsics" if _has_metres(arrays) else ""
        raise ValueError(
            f"{path} is a NumPy file with {describe_arrays(arrays)}; an array named tracks or pred_tracks is "
            f"read, (T, N, 2) or (1, T, N, 2) in pixels{metres}"
        )
    tracks = _frames_first(path, arrays[name], name)
    flags = next((arrays[key] for key in _VISIBILITY_KEYS if key in arrays), None)
    seen = None if flags is None else _visible(flags, tracks, path)
    return _read_pixels(path, tracks, seen, hints, "cotracker")


def read_wangp(path: Path, arrays: Mapping[str, Array], hints: Hints) -> TrackFile:
    """WanGP's (T, N, 2) positions from 0 to 1, with (-1, -1) outside the time range of a track."""
    tracks = _only_array(path, arrays, "wangp")
    if tracks.size and not np.nanmax(tracks) <= 1:
        raise ValueError(f"{path}: wangp positions are at most 1, found {np.nanmax(tracks):g}")
    size = find_relative_size(path, hints, "wangp")
    visible = ~(tracks == -1).all(-1)
    _check_axes(path, tracks, hints)
    points = tracks.transpose(1, 0, 2)
    measured = measured_tracks(points, visible.T, hints, str(path), scale=size)
    return TrackFile("wangp", measured, size)


def read_sg_i2v(path: Path, arrays: Mapping[str, Array], hints: Hints) -> TrackFile:
    """SG-I2V's (N, 2 + F, 2): two corners of a box, then its centre in each frame, in pixels of the picture."""
    array = arrays.get("")
    if array is None or array.ndim != 3 or array.shape[-1] != 2 or array.shape[1] < 3:
        raise ValueError(f"{path}: sg-i2v files are (N, 2 + F, 2), found {describe_arrays(arrays)}")
    size, notes = find_size(path, hints, "sg-i2v")
    centres = array[:, 2:]
    visible = np.ones(centres.shape[:2], np.bool_)
    notes += (f"{path}: the boxes of sg-i2v were left out, their centres are the tracks",)
    return TrackFile("sg-i2v", measured_tracks(centres, visible, hints, str(path)), size, notes)


def visibility_path(tracks: Path) -> Path | None:
    """The file of visibility that belongs to a NAME_tracks.npy or tracks.npy; None for other names."""
    stem = tracks.stem
    return tracks.with_name(f"{stem[:-6]}visibility.npy") if stem.endswith("tracks") else None


def write_wan_move(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:  # noqa: ARG001
    """Writes NAME_tracks.npy and NAME_visibility.npy."""
    points, visible = _stack(tracks)
    paths = wan_move_paths(path)
    with atomic_write(paths[0]) as first, atomic_write(paths[1]) as second:  # np.save would add a suffix to a path
        np.save(first, points[None].astype(np.float32))
        np.save(second, visible[None])
    return paths


def wan_move_paths(path: Path) -> list[Path]:
    """The two files that are written for a NAME.npy or NAME_tracks.npy."""
    tracks = path if path.stem.endswith("tracks") else path.with_name(f"{path.stem}_tracks.npy")
    return [tracks, tracks.with_name(f"{tracks.stem[:-6]}visibility.npy")]


def write_cotracker(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:  # noqa: ARG001
    """Writes an npz archive with `tracks` (1, T, N, 2) float32 and `visibility` (1, T, N) bool."""
    points, visible = _stack(tracks)
    with atomic_write(path) as file:
        file.write(npz_bytes(tracks=points[None].astype(np.float32), visibility=visible[None]))
    return [path]


def write_wangp(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:
    """Writes WanGP's form, which has no points outside the picture: they are hidden."""
    points, visible = _stack(tracks)
    relative = (points / np.asarray(size)).astype(np.float32)
    kept = visible & (relative >= 0).all(-1) & (relative <= 1).all(-1)
    with atomic_write(path) as file:
        np.save(file, np.where(kept[..., None], relative, np.float32(-1)))
    return [path]


def _stack(tracks: Sequence[Track]) -> tuple[Array, Array]:
    """(T, N, 2) points and (T, N) visibility of tracks of the same length."""
    points, visible = np.stack([track.points for track in tracks]), np.stack([track.visible for track in tracks])
    return points.transpose(1, 0, 2), visible.T


def _has_metres(arrays: Mapping[str, Array]) -> bool:
    return any(key.lower() == "tracks_xyz" for key in arrays)


def _only_array(path: Path, arrays: Mapping[str, Array], name: str) -> Array:
    if "" not in arrays:
        raise ValueError(f"{path}: {name} files are npy arrays, found an archive with {describe_arrays(arrays)}")
    return _frames_first(path, arrays[""], "")


def _frames_first(path: Path, array: Array, name: str) -> Array:
    """The (T, N, 2) of (T, N, 2) or (1, T, N, 2)."""
    tracks = array[0] if array.ndim == 4 and array.shape[0] == 1 else array
    if tracks.ndim != 3 or tracks.shape[-1] != 2 or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{path} is a NumPy file with {describe_arrays({name: array})}; tracks are read as (T, N, 2) or "
            "(1, T, N, 2) x and y, frames first"
        )
    return tracks


def _visible(flags: Array | None, tracks: Array, path: Path) -> tuple[Array, tuple[str, ...]]:
    """(T, N) visibility of (1, T, N), (T, N) or (1, T, N, 1), and what was assumed of it."""
    wanted = tracks.shape[:2]
    if (
        flags is None
        or flags.size != wanted[0] * wanted[1]
        or tuple(s for s in flags.shape if s > 1) != tuple(s for s in wanted if s > 1)
    ):
        raise ValueError(
            f"{path}: visibility must be {wanted} as the tracks are, got {None if flags is None else flags.shape}"
        )
    return read_flags(flags.reshape(wanted), f"{path}: visibility")


def _read_pixels(
    path: Path, tracks: Array, seen: tuple[Array, tuple[str, ...]] | None, hints: Hints, name: str
) -> TrackFile:
    size, notes = find_size(path, hints, name)
    without = f"{path} comes without visibility; every point was taken as visible"
    visible, assumed = seen or (np.ones(tracks.shape[:2], np.bool_), (without,))
    _check_axes(path, tracks, hints)
    points = tracks.transpose(1, 0, 2)
    return TrackFile(name, measured_tracks(points, visible.T, hints, str(path)), size, notes + assumed)


def _check_axes(path: Path, tracks: Array, hints: Hints) -> None:
    """Refuses a (T, N, 2) whose second axis is the frames, unless the form is named.

    Points move less from frame to frame than from track to track, and more evenly.
    """
    num_frames, num_tracks = tracks.shape[:2]
    check_counts((num_tracks, num_frames), hints, str(path))
    if hints.is_named or num_tracks == 1:
        return
    finite = np.where(np.abs(tracks.astype(np.float64)) < 1e9, tracks, 0.0)
    step, across = (_mean_difference(finite, axis) for axis in (0, 1))
    unevenness = _mean_difference(np.diff(finite, axis=0), 0) / max(step, 1e-9) if num_frames > 2 else np.inf
    if num_frames == 1 or (step > 2 * across and unevenness > 0.5):
        raise ValueError(
            f"{path} is a NumPy file with {describe_arrays({'': tracks})} whose second axis seems to be the frames; "
            "frames come first: save tracks.transpose(1, 0, 2), or convert it by --from wan-move if they do; "
            "a file of SG-I2V is converted by --from sg-i2v"
        )


def _mean_difference(values: Array, axis: int) -> float:
    return float(np.abs(np.diff(values, axis=axis)).mean())
