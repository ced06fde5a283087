"""TAP-Vid's pickles: points from 0 to 1 and their occlusion, beside the video.

Source: google-deepmind/tapnet `tapnet/tapvid/README.md`. (0, 0) is the upper left corner of the upper left pixel, so
x W is half a pixel more than our x.

Reading a pickle can run code. Here it can make plain containers, numbers, text and bytes, and stand-ins of NumPy's
arrays; every other name in it is refused before anything is called. NumPy's own code sees bytes and shapes alone,
checked.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import io
import math
import mmap
import pickle
import pickletools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from imageconductor.conditioning.formats.numpy_data import MAX_ARRAY_BYTES, Array
from imageconductor.conditioning.formats.track_file import (
    Hints,
    TrackFile,
    check_counts,
    find_relative_size,
    measured_tracks,
    read_flags,
    stated_size,
)
from imageconductor.conditioning.trajectory_json import Track
from imageconductor.files import atomic_write

_MAX_OPCODES = 2_000_000


def read_tapvid(path: Path, content: object, hints: Hints) -> TrackFile:  # noqa: ARG001
    """TAP-Vid's `points` (N, T, 2) and `occluded` (N, T) of one clip: a dict or list of clips, or a clip alone."""
    clip, notes = _choose_clip(path, load_pickle(path), hints.sample)
    points, occluded = (_as_array(path, clip, key) for key in ("points", "occluded"))
    if points.ndim != 3 or points.shape[-1] != 2 or occluded.shape != points.shape[:2]:
        raise ValueError(
            f"{path}: tapvid clips have points (N, T, 2) and occluded (N, T), got {points.shape} and {occluded.shape}"
        )
    check_counts(points.shape, hints, str(path))
    is_occluded, assumed = read_flags(occluded, f"{path}: occluded")
    visible = ~(is_occluded | np.isnan(occluded))
    if (points[visible] > 2).any():
        raise ValueError(f"{path}: tapvid points are relative to the picture, from 0 to 1, got {points[visible].max()}")
    stated = _video_size(clip.get("video"))
    if stated is None:
        size = find_relative_size(path, hints, "tapvid")
    else:
        size, assumed = stated, (*assumed, *stated_size(path, stated, hints))
    tracks = measured_tracks(points, visible, hints, str(path), scale=size, shift=-0.5)
    return TrackFile("tapvid", tracks, size, (*notes, *assumed))


def write_tapvid(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:
    """Writes a dict with one clip, named as the file, that has `points` and `occluded` but no `video`."""
    points, visible = np.stack([track.points for track in tracks]), np.stack([track.visible for track in tracks])
    clip = {"points": ((points + 0.5) / np.asarray(size)).astype(np.float32), "occluded": ~visible}
    with atomic_write(path) as file:
        pickle.dump({path.stem: clip}, file, protocol=4)
    return [path]


def load_pickle(path: Path) -> object:
    """The content of a pickle of containers, numbers, text, bytes and NumPy arrays, which are `_Array`s.

    Raises:
        ValueError: it names anything else, or is damaged.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _check_opcodes(data)
            data.seek(0)
            return _Unpickler(cast("Any", data), encoding="latin1").load()
        except _RefusedError as error:
            raise ValueError(f"{path}: {error}") from error
        except Exception as error:  # a damaged pickle raises almost anything
            raise ValueError(f"{path}: damaged pickle ({type(error).__name__})") from error


class _RefusedError(ValueError):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}".replace("numpy.core.", "numpy._core.")
        if name not in _STAND_INS:
            shown = f"{module_name}.{global_name}"[:80]
            raise _RefusedError(
                f"the pickle names {shown!r}, and only NumPy arrays and plain containers are read; nothing was run"
            )
        return _STAND_INS[name]


def _check_opcodes(data: mmap.mmap) -> None:
    """Refuses what would take memory or time out of proportion to the file."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(cast("Any", data))):
        if count > _MAX_OPCODES:
            raise _RefusedError(f"the pickle has more than {_MAX_OPCODES} parts; keep fewer clips in a file")
        if "PUT" in opcode.name and isinstance(argument, int) and argument > count:
            raise _RefusedError("damaged pickle: a memo beyond its parts")


class _DType:
    """Stands for numpy.dtype: numbers and booleans."""

    def __init__(self, code: object, *_: object) -> None:
        dtype = np.dtype(code) if isinstance(code, str) and len(code) <= 3 else None
        if dtype is None or dtype.kind not in "biuf":
            raise _RefusedError(f"the pickle holds an array of {str(code)[:20]}; only numbers and booleans are read")
        self.dtype = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray: a shape, a type and bytes, which `to_numpy` checks."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.dtype = np.dtype("u1")
        self.order, self.data = "C", b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: object, dtype: object, shape: object, order: str) -> "_Array":
        sides = (shape,) if isinstance(shape, int) else shape
        raw = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(dtype, _DType) or not isinstance(raw, (bytes, bytearray)) or not isinstance(sides, tuple):
            raise _RefusedError("damaged pickle: an array without its type, shape or bytes")
        checked = cast("tuple[object, ...]", sides)
        if not all(isinstance(side, int) and side >= 0 for side in checked):
            raise _RefusedError("damaged pickle: an array with a wrong shape")
        self.shape, self.dtype = cast("tuple[int, ...]", sides), dtype.dtype
        self.order, self.data = ("F" if order == "F" else "C"), bytes(raw)
        if math.prod(self.shape) * self.dtype.itemsize != len(self.data):
            raise _RefusedError(f"damaged pickle: an array of shape {self.shape} with {len(self.data)} bytes")
        return self

    def to_numpy(self) -> Array:
        if len(self.data) > MAX_ARRAY_BYTES:
            raise ValueError(f"an array of shape {self.shape}; more than 256 MiB are not read")
        return np.frombuffer(self.data, self.dtype).reshape(self.shape, order=cast("Any", self.order))


def _start_array(*_: object) -> _Array:
    return _Array()


def _fill_array(data: object, dtype: object, shape: object, order: str) -> _Array:
    return _Array().fill(data, dtype, shape, order)


def _make_scalar(dtype: object, data: object) -> object:
    return _Array().fill(data, dtype, (), "C").to_numpy().item()


def _encode(text: object, encoding: object) -> bytes:
    """As `_codecs.encode`, by which pickles of protocol 2 make bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _RefusedError("damaged pickle: bytes that are not latin-1")
    return text.encode("latin1")


class _StandIn:
    """A function that a pickle can call and not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise _RefusedError("damaged pickle: a state for a function")


def _refuse_call(*_: object) -> object:
    raise _RefusedError("damaged pickle: an array without _reconstruct")


_STAND_INS = {
    "numpy._core.multiarray._reconstruct": _StandIn(_start_array),
    "numpy._core.numeric._frombuffer": _StandIn(_fill_array),
    "numpy._core.multiarray.scalar": _StandIn(_make_scalar),
    "numpy.dtype": _StandIn(_DType),
    "numpy.ndarray": _StandIn(_refuse_call),  # only ever an argument of _reconstruct
    "_codecs.encode": _StandIn(_encode),
}


def _choose_clip(path: Path, content: object, sample: str | None) -> tuple[dict[str, object], tuple[str, ...]]:
    if isinstance(content, dict) and "points" in content:
        return cast("dict[str, object]", content), ()
    clips: dict[str, object] = {}
    if isinstance(content, dict):
        clips = {str(key)[:80]: value for key, value in cast("dict[object, object]", content).items()}
    elif isinstance(content, list):
        clips = {str(n): value for n, value in enumerate(cast("list[object]", content))}
    name = next(iter(clips), None) if sample is None else sample
    if name is None or name not in clips:
        some = ", ".join(list(clips)[:8]) or "none"
        raise ValueError(f"{path}: no clip {sample!r} among its {len(clips)}: {some}")
    clip = clips[name]
    if not isinstance(clip, dict):
        raise ValueError(f"{path}: tapvid clips are dicts with points and occluded, found {type(clip).__name__}")
    note = (
        (f"{path} holds {len(clips)} clips; {name!r}, the first, was taken",) if len(clips) > 1 and not sample else ()
    )
    return cast("dict[str, object]", clip), note


def _as_array(path: Path, clip: Mapping[str, object], key: str) -> Array:
    value = clip.get(key)
    if not isinstance(value, _Array):
        raise ValueError(f"{path}: tapvid clips have an array {key!r}, found {type(value).__name__}")
    return value.to_numpy()


def _video_size(video: object) -> tuple[int, int] | None:
    """(W, H) of a clip's video, an array (T, H, W, 3) or a list of JPEG pictures; None if it has none."""
    if isinstance(video, _Array) and len(video.shape) == 4 and min(video.shape) > 0:
        return video.shape[2], video.shape[1]
    frames = cast("list[object]", video) if isinstance(video, list) else []
    if frames and isinstance(frames[0], bytes):
        try:
            return Image.open(io.BytesIO(frames[0])).size
        except OSError:
            return None
    return None
