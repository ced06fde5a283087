"""Track files of one tool as those of another.

The form of IN is told by its content, that of OUT by --to, or by its suffix: .json is imageconductor, .npz cotracker,
.pth ati, .txt tora, .pkl tapvid. The command prints what it read, what it assumed because IN does not say it, and what
OUT cannot hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from imageconductor.command_line import run_command
from imageconductor.conditioning.formats import FORMATS, TrackFile, list_written, read_tracks, write_tracks
from imageconductor.conditioning.formats import written_formats as list_targets
from imageconductor.conditioning.formats.track_file import DEFAULT_FRAMES
from imageconductor.conditioning.formats.writing import takes_frames
from imageconductor.conditioning.trajectory_json import Track, parse_size

_SUFFIXES = {".json": "imageconductor", ".npz": "cotracker", ".pth": "ati", ".txt": "tora", ".pkl": "tapvid"}

_EXAMPLES = """examples:
  imageconductor convert spline.json drawn.json --size 512x512       KJNodes' coordinates, drawn on a mask of 512x512
  imageconductor convert drawn.json tracks.npy --to wan-move         81 frames: tracks.npy and visibility.npy
  imageconductor convert circle.txt coaster.txt both.json --size 720x480
  imageconductor convert tracks.npz thin.json --size 1280x720 --every 4 --frames 16
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    rows = "\n".join(
        f"  {name:<15}{form.holds}{'' if form.write else ' (read only)'}" for name, form in FORMATS.items()
    )
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"forms:\n{rows}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="IN",
        help="the file to read; several .txt files or a folder of them for tora, two .npy files for wan-move",
    )
    p.add_argument("output", type=Path, metavar="OUT", help="the file to write; tora writes one for each track")
    p.add_argument("--from", dest="source", choices=list(FORMATS), metavar="NAME", help="form of IN, where in doubt")
    p.add_argument("--to", dest="target", choices=list_targets(), metavar="NAME", help="form of OUT")
    p.add_argument("--size", metavar="WxH", help="frame in which IN was drawn, where the file does not state it")
    p.add_argument("--frames", type=int, metavar="T", help="points per track in OUT; default: what IN has or OUT needs")
    p.add_argument("--every", type=int, default=1, metavar="N", help="keep one track in N")
    p.add_argument("--sample", metavar="NAME", help="clip of a tapvid file of several: its name, or its number from 0")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code: see `run_command`."""
    args = parser().parse_args(argv)
    return run_command(lambda: _convert(args))


def _convert(args: argparse.Namespace) -> None:
    target = args.target or _SUFFIXES.get(args.output.suffix.lower())
    if target is None:
        raise ValueError(
            f"{args.output}: name the form with --to, one of {', '.join(list_targets())}; only the suffixes "
            f"{', '.join(_SUFFIXES)} tell it"
        )
    for name in ("every", "frames"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 4096:
            raise ValueError(f"--{name} must be from 1 to 4096, got {value}")
    size = None if args.size is None else parse_size(args.size, "--size")
    paths: list[Path] = args.inputs
    form = FORMATS[target]
    num_frames = args.frames or form.num_frames or DEFAULT_FRAMES
    file = read_tracks(paths, drawn_size=size, format=args.source, sample=args.sample, num_frames=num_frames)
    if args.sample is not None and file.format != "tapvid":
        raise ValueError(f"--sample chooses a clip of a tapvid file, and this one is {file.format}")
    if not args.frames and file.num_frames and takes_frames(form, file.num_frames):
        num_frames = file.num_frames
    listed = _place_timed(file, num_frames)
    tracks = listed[:: args.every]
    outputs = list_written(args.output, len(tracks), target)
    _check_outputs(outputs, paths, args.overwrite)
    print(f"read {', '.join(map(str, paths))}: {_describe(file)}")
    for note in file.notes:
        print(f"assumed: {note}")
    if listed is not file.tracks:
        print(f"placed: {len(listed[0].points)} points for each track, in which times, corners and the camera are kept")
    if args.every > 1:
        print(f"kept {len(tracks)} of {len(listed)} tracks")
    written = write_tracks(args.output, tracks, file.size, target, num_frames=args.frames, drawn_frames=num_frames)
    for note in written.notes:
        print(f"note: {note}")
    print(f"wrote {', '.join(map(str, written.paths))}: {target}")


def _place_timed(file: TrackFile, num_frames: int) -> list[Track]:
    """The tracks; those of a drawing that states times, corners, or the camera's motion as a point for each frame."""
    is_plain = all(t.timing.is_default and t.interpolation == "pchip" and not t.hides_outside for t in file.tracks)
    if file.camera is None and is_plain:
        return file.tracks
    from imageconductor.conditioning import Trajectories

    return Trajectories.from_file(file, num_frames).to_tracks()


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], is_replacing: bool) -> None:
    for path in outputs:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
        if path.exists() and (not is_replacing or any(path.samefile(source) for source in inputs)):
            remedy = "name another" if is_replacing else "name another, or pass --overwrite"
            raise ValueError(f"{path} exists; {remedy}")


def _describe(file: TrackFile) -> str:
    lengths = sorted({len(track.points) for track in file.tracks if track.per_frame})
    kind = f"points of {' to '.join(map(str, {lengths[0]: 0, lengths[-1]: 0}))} frames" if lengths else "control points"
    still = sum(len(track.points) == 1 for track in file.tracks)
    hidden = sum(int((~track.visible).sum()) for track in file.tracks)
    more = [f"{still} hold still"] * bool(still) + [f"{hidden} points hidden"] * bool(hidden)
    count = f"{len(file.tracks)} tracks"
    if file.camera is not None:
        count += f" and {file.camera.num_tracks} of the camera"
    return ", ".join([file.format, count, kind, f"{file.size[0]}x{file.size[1]}", *more])
