"""Takes motion from footage: follows points through a video and writes them as a trajectory file.

The file is for the option --trajectories of sample.py. Points are in pixels of the video's own first frame.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from imageconductor.command_line import run_command
from imageconductor.conditioning.trajectory_json import parse_size
from imageconductor.files import check_writable

if TYPE_CHECKING:
    from imageconductor.conditioning import Trajectories
    from imageconductor.data.trackers import Tracker

_GRID = 3  # as of a camera preset
_MAX_GRID = 16  # 256 tracks, as many as a file may have
_BAR_AFTER_S = 2.0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("video", type=Path, metavar="VIDEO", help="the footage, in any format that ffmpeg reads")
    p.add_argument("output", type=Path, metavar="OUT.json", help="the trajectory file; one that is there is replaced")
    where = p.add_mutually_exclusive_group()
    where.add_argument("--points", nargs="+", type=_point, metavar="X,Y", help="points of the first frame, in pixels")
    where.add_argument(
        "--grid", type=_count, metavar="N", help=f"an N x N grid over the frame instead (1..{_MAX_GRID}; {_GRID})"
    )
    p.add_argument("--frames", type=_count, metavar="T", help="frames to take; default: up to the last")
    p.add_argument(
        "--size", type=_size, metavar="WxH", help="crop to this shape and size, as an image is; default: the video's"
    )
    p.add_argument("--start-frame", type=_number, default=0, metavar="F", help="the first frame, counted from 0 (0)")
    p.add_argument("--stride", type=_count, default=1, metavar="S", help="take every S-th frame (1)")
    p.add_argument(
        "--tracker",
        choices=("lucas_kanade", "cotracker"),
        default="lucas_kanade",
        help="lucas_kanade needs no weights and loses what is hidden; CoTracker's weights are CC-BY-NC (lucas_kanade)",
    )
    p.add_argument(
        "--cotracker",
        default="facebookresearch/co-tracker",
        metavar="REPOSITORY",
        help="torch.hub repository of CoTracker, or a local clone of it",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code: see `run_command`."""
    args = parser().parse_args(argv)

    def work() -> None:
        tracks = take_tracks(args)
        tracks.save(args.output)
        count, followed = tracks.num_tracks, int(tracks.visible.all(dim=1).sum())
        lost = "" if followed == count else f", {count - followed} were lost or left the frame"
        print(f"{args.output}: {followed} of {count} points followed through {tracks.num_frames} frames{lost}")

    return run_command(work)


def take_tracks(args: argparse.Namespace) -> Trajectories:
    """The tracks that the arguments ask for, in pixels of the size asked for."""
    if args.output.is_dir():
        raise ValueError(f"{args.output} is a folder; name a file such as {args.output / 'tracks.json'}")
    if args.grid is not None and args.grid > _MAX_GRID:
        raise ValueError(f"--grid must be at most {_MAX_GRID}, got {args.grid}")
    if args.points is not None and len(args.points) > _MAX_GRID**2:
        raise ValueError(f"--points: {len(args.points)} points, at most {_MAX_GRID**2} are accepted")
    if args.frames == 1:
        raise ValueError("--frames must be at least 2: there is no motion in one frame")
    check_writable(args.output.absolute().parent)

    import numpy as np  # The help should not wait for the libraries.
    from tqdm import tqdm

    from imageconductor.data.video_motion import (
        check_points,
        every_nth,
        place_grid,
        read_footage,
        read_video_size,
        track_footage,
    )

    video = read_video_size(args.video)
    size = args.size or video
    points = place_grid(video, size, args.grid or _GRID) if args.points is None else np.array(args.points, np.float64)
    check_points(points, video, size, str(args.video))
    tracker = _build_tracker(args)
    needed = None if args.frames is None else (args.frames - 1) * args.stride + 1
    with tqdm(unit=" frames", desc="reading", delay=_BAR_AFTER_S, disable=None) as bar:
        footage = read_footage(args.video, args.start_frame, needed, bar.update)
    if len(footage.frames) <= args.stride:
        raise ValueError(
            f"{args.video}: --stride {args.stride} leaves one of its {len(footage.frames)} frames; take a smaller one"
        )
    with tqdm(total=len(footage.frames), unit=" frames", desc="following", delay=_BAR_AFTER_S, disable=None) as bar:
        tracks = track_footage(footage, points, tracker, bar.update)
    return every_nth(tracks, args.stride).cover_crop(size)


def _build_tracker(args: argparse.Namespace) -> Tracker:
    from imageconductor.data.trackers import CoTracker, LucasKanadeTracker

    return LucasKanadeTracker() if args.tracker == "lucas_kanade" else CoTracker(args.cotracker)


def _point(text: str) -> tuple[float, float]:
    x, comma, y = text.partition(",")
    try:
        return float(x), float(y)
    except ValueError:
        hint = "" if comma else ", without a space after the comma"
        raise argparse.ArgumentTypeError(f"expected X,Y{hint}, got {text!r}") from None


def _size(text: str) -> tuple[int, int]:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    return _number(text, at_least=1)


def _number(text: str, at_least: int = 0) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < at_least:
        raise argparse.ArgumentTypeError(f"must be at least {at_least}, got {value}")
    return value
