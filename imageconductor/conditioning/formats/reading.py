"""From a path to the tracks of what it holds: kind of data, form, reader."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imageconductor.conditioning.formats import array_files, json_files, tora
from imageconductor.conditioning.formats.numpy_data import load_arrays
from imageconductor.conditioning.formats.registry import FORMATS, Format, find_format
from imageconductor.conditioning.formats.track_file import DEFAULT_FRAMES, Hints, TrackFile
from imageconductor.conditioning.trajectory_json import ADVICE, MAX_FILE_TRACKS
from imageconductor.files import natural_order, read_text

_MAX_TEXT_BYTES = 32 << 20
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_KINDS = {
    "json": "JSON",
    "lines": "lines x,y",
    "npy": "a NumPy array",
    "npz": "an npz archive",
    "torch": "a torch file",
    "pickle": "a pickle",
}


def read_tracks(
    paths: str | Path | Sequence[str | Path],
    *,
    drawn_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
    published_size: tuple[int, int] | None = None,
    format: str | None = None,
    sample: str | None = None,
    num_frames: int = DEFAULT_FRAMES,
    max_tracks: int = MAX_FILE_TRACKS,
) -> TrackFile:
    """The tracks of a file of any known form, which its content tells.

    Args:
        paths: the file; or several text files or a folder of them, one track in each; or Wan-Move's two arrays.
        drawn_size: (W, H) of the frame in which the tracks were drawn, where the file does not say it.
        image_size: (W, H) of the picture, used without `drawn_size` for forms that refer to it.
        published_size: (W, H) of the frame of the published form where `drawn_size` is None; None = 384x256.
        format: name of the form, where the content leaves it in doubt; one of `FORMATS`.
        sample: name or index of the clip in a file of several.
        num_frames: frames of the video, in which the times of our form count where it does not state a number.
        max_tracks: largest number of tracks accepted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown form, malformed content, or a size that must be given; names the file.
    """
    form = None if format is None else find_format(format)
    hints = Hints(drawn_size, image_size, published_size, sample, form is not None, max_tracks, num_frames)
    files = _list_paths(paths)
    contents = [_load(path) for path in files]
    if len(files) > 1:
        return _read_several(files, contents, form, hints)
    path, (kind, content) = files[0], contents[0]
    form = form or FORMATS[_recognise(kind, content)]
    if kind not in form.kinds:
        raise ValueError(
            f"{path} holds {_KINDS[kind]}; {form.name} files are {' or '.join(_KINDS[kind] for kind in form.kinds)}"
        )
    if kind == "lines":
        content = [(path, content)]
    return form.read(path, content, hints)


def parse_tracks(
    text: str,
    *,
    drawn_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
    published_size: tuple[int, int] | None = None,
    num_frames: int = DEFAULT_FRAMES,
    max_tracks: int = MAX_FILE_TRACKS,
) -> TrackFile:
    """The tracks of a JSON text of any known form, such as a spline editor's; arguments as of `read_tracks`.

    Raises:
        ValueError: no JSON, malformed content, or a size that must be given.
    """
    source = Path("tracks")
    content = json_files.parse_json(text, source)
    hints = Hints(drawn_size, image_size, published_size, max_tracks=max_tracks, num_frames=num_frames)
    return FORMATS[json_files.recognise_json(content)].read(source, content, hints)


def read_drawing(
    fields: object, source: str, *, num_frames: int = DEFAULT_FRAMES, max_tracks: int = MAX_FILE_TRACKS
) -> TrackFile:
    """The tracks of a JSON object in our form, as of a file that holds it; arguments as of `read_tracks`.

    Raises:
        ValueError: malformed content; names `source`.
    """
    return json_files.read_ours(Path(source), fields, Hints(max_tracks=max_tracks, num_frames=num_frames))


def _list_paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    listed = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if len(listed) == 1 and listed[0].is_dir():
        listed = sorted(listed[0].glob("*.txt"), key=lambda path: natural_order(path.stem))
        if not listed:
            raise ValueError(
                f"{paths} is a folder without .txt files; a folder is read as tora tracks, one in each file"
            )
    for path in listed:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such trajectory file")
    if not listed:
        raise ValueError("no trajectory file was given")
    return listed


def _load(path: Path) -> tuple[str, Any]:
    """Kind of the data in a file, by its first bytes, and the data; None for those that their readers load."""
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_TORCH))
    if start.startswith(b"\x93NUMPY"):
        return "npy", load_arrays(path)
    if start.startswith(b"PK\x03\x04"):
        return ("torch", None) if _is_torch_archive(path) else ("npz", load_arrays(path))
    if start.startswith(b"\x80"):
        return ("torch" if start == _LEGACY_TORCH else "pickle"), None
    if path.stat().st_size > _MAX_TEXT_BYTES:
        raise ValueError(f"{path}: more than 32 MiB of text are not read; keep fewer tracks")
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"{error}; {ADVICE}") from error
    return ("lines", text) if tora.is_tora(text) else ("json", json_files.parse_json(text, path))


def _is_torch_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False  # the reader of npz says that it is damaged


def _recognise(kind: str, content: Any) -> str:
    if kind == "json":
        return json_files.recognise_json(content)
    if kind in ("npy", "npz"):
        return array_files.recognise_arrays(content)
    return {"lines": "tora", "torch": "ati", "pickle": "tapvid"}[kind]


def _read_several(
    files: Sequence[Path], contents: Sequence[tuple[str, Any]], form: Format | None, hints: Hints
) -> TrackFile:
    kinds = {kind for kind, _ in contents}
    if kinds == {"lines"} and form in (None, FORMATS["tora"]):
        texts = [(path, text) for path, (_, text) in zip(files, contents, strict=True)]
        return tora.read_tora(files[0].parent, texts, hints)
    if kinds == {"npy"} and len(files) == 2 and form in (None, FORMATS["wan-move"]):
        for n in (0, 1):
            if array_files.visibility_path(files[n]) == files[1 - n]:
                return array_files.read_wan_move(files[n], contents[n][1], hints)
    raise ValueError(
        f"{', '.join(map(str, files))}: several files are read as tora tracks, lines x,y with one track in each file, "
        "or as wan-move's NAME_tracks.npy and NAME_visibility.npy"
    )
