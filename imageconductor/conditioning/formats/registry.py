"""The forms of track files by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imageconductor.conditioning.formats import array_files, ati, json_files, spline_editors, tapvid, tora
from imageconductor.conditioning.formats.track_file import Hints, TrackFile
from imageconductor.conditioning.trajectory_json import Track


@dataclass(frozen=True)
class Format:
    """A form of track files.

    Attributes:
        name: as in `FORMATS`, `--from` and `--to`.
        kinds: of data that hold it: "json", "lines", "npy", "npz", "torch" or "pickle".
        read: the tracks of (path, content, hints).
        holds: what is in it, for tables.
        write: writes (path, tracks, size) and gives the files; None if it is only read.
        num_frames: points per track that the tool reads; None = control points, of any number.
        frame_rule: of the number of frames, "" = any, "4n+1" or "exact".
        has_size, has_visibility, has_outside, has_fractions: whether the frame size, hidden points, points outside the
            frame and positions between pixels can be told.
    """

    name: str
    kinds: tuple[str, ...]
    read: Callable[[Path, Any, Hints], TrackFile]
    holds: str
    write: Callable[[Path, Sequence[Track], tuple[int, int]], list[Path]] | None = None
    num_frames: int | None = None
    frame_rule: str = ""
    has_size: bool = False
    has_visibility: bool = False
    has_outside: bool = False
    has_fractions: bool = True


FORMATS = {
    entry.name: entry
    for entry in (
        Format(
            "imageconductor", ("json",), json_files.read_ours, "json; control points, frame size, visibility",
            json_files.write_ours, has_size=True, has_visibility=True, has_outside=True,
        ),
        Format(
            "published", ("json",), json_files.read_published,
            "json; bare list of control points (published release, DragNUWA, MOFA-Video)", json_files.write_published,
        ),
        Format(
            "boxes", ("json",), json_files.read_box_centres, "json; boxes of objects, whose centres are the tracks",
        ),
        Format(
            "motionpro", ("json",), json_files.read_motionpro, "json; traj_key_points, control points",
            json_files.write_motionpro,
        ),
        Format(
            "kjnodes", ("json",), spline_editors.read_kjnodes, "json; spline editor's x, y objects or points_store",
            spline_editors.write_kjnodes, num_frames=16, has_fractions=False,
        ),
        Format(
            "ltx", ("json",), spline_editors.read_ltx, "json; sparse track editor's x, y objects",
            spline_editors.write_ltx, num_frames=121, has_fractions=False,
        ),
        Format(
            "draganything", ("json",), json_files.read_draganything, "json; objects with a trajectory, per frame",
        ),
        Format(
            "wan-move", ("npy",), array_files.read_wan_move,
            "npy pair NAME_tracks, NAME_visibility; a point per frame, pixels", array_files.write_wan_move,
            num_frames=81, frame_rule="4n+1", has_visibility=True, has_outside=True,
        ),
        Format(
            "wangp", ("npy",), array_files.read_wangp,
            "npy; a point per frame from 0 to 1, (-1, -1) = hidden (Motion Designer)", array_files.write_wangp,
            num_frames=81, has_visibility=True,
        ),
        Format(
            "cotracker", ("npz", "npy"), array_files.read_cotracker,
            "npz with tracks and visibility (or pred_...); a point per frame", array_files.write_cotracker,
            num_frames=16, has_visibility=True, has_outside=True,
        ),
        Format("sg-i2v", ("npy",), array_files.read_sg_i2v, "npy; box corners, then centres; read if named"),
        Format(
            "ati", ("torch",), ati.read_ati, "pth; a point per frame with visibility, times 8", ati.write_ati,
            num_frames=121, frame_rule="exact", has_visibility=True, has_outside=True,
        ),
        Format(
            "tora", ("lines",), tora.read_tora, "txt, a file for each track; lines x,y on 256x256 (MotionCtrl too)",
            tora.write_tora, num_frames=49, has_fractions=False,
        ),
        Format(
            "tapvid", ("pickle",), tapvid.read_tapvid, "pkl; points from 0 to 1 and occluded", tapvid.write_tapvid,
            num_frames=16, has_visibility=True, has_outside=True,
        ),
    )
}  # fmt: skip


def find_format(name: str) -> Format:
    """The form of that name.

    Raises:
        ValueError: there is none; lists them.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown form {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def written_formats() -> list[str]:
    """Names of the forms that can be written."""
    return [name for name, form in FORMATS.items() if form.write is not None]
