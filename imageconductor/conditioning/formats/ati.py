"""ATI's pth files: an npz archive as bytes in a torch file, points and visibility times 8.

Source: bytedance/ATI `tools/trajectory_editor/app.py`, `wan/utils/motion.py`. ATI samples by coordinates from the edge
of the picture (`wan/modules/motion_patch.py`, align_corners=False), so its x is half a pixel more than ours.
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imageconductor.conditioning.formats.numpy_data import MAX_ARRAY_BYTES, NpzArrays, describe_arrays, npz_bytes
from imageconductor.conditioning.formats.track_file import Hints, TrackFile, find_size, measured_tracks
from imageconductor.conditioning.trajectory_json import Track, abbreviate
from imageconductor.files import atomic_path

_FACTOR = 8.0


def read_ati(path: Path, content: object, hints: Hints) -> TrackFile:  # noqa: ARG001
    """ATI's (N, T, 1, 3) x, y, visible; between x, y and the visibility may stand more channels."""
    arrays = NpzArrays(io.BytesIO(_load_bytes(path)), str(path))
    array = arrays.get("array")
    if array is None or array.ndim != 4 or array.shape[2] != 1 or array.shape[3] < 3 or array.dtype.kind != "f":
        raise ValueError(f"{path}: ati files hold 'array' as (N, T, 1, 3) floats, found {describe_arrays(arrays)}")
    size, notes = find_size(path, hints, "ati")
    visible = array[:, :, 0, -1] > _FACTOR / 2
    points = array[:, :, 0, :2]
    scale = (1 / _FACTOR, 1 / _FACTOR)
    return TrackFile("ati", measured_tracks(points, visible, hints, str(path), scale=scale, shift=-0.5), size, notes)


def write_ati(path: Path, tracks: Sequence[Track], size: tuple[int, int]) -> list[Path]:  # noqa: ARG001
    """Writes ATI's form; hidden points are zeros."""
    import torch

    points, visible = np.stack([track.points for track in tracks]), np.stack([track.visible for track in tracks])
    channels = np.concatenate([points + 0.5, np.ones((*visible.shape, 1))], axis=-1) * visible[..., None] * _FACTOR
    with atomic_path(path) as temporary:
        torch.save(npz_bytes(array=channels[:, :, None].astype(np.float32)), temporary)
    return [path]


def _load_bytes(path: Path) -> bytes:
    import torch

    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise ValueError(f"{path}: more than 256 MiB are not read: keep fewer tracks")
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"  # as torch tells them apart
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("it is compressed, as torch writes none")  # and may be any size in memory
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files and for those that would run code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no ATI file, or holds more than data: {abbreviate(reason)}") from error
    if not isinstance(content, bytes):
        raise ValueError(f"{path}: ati files hold the bytes of an npz archive, found {type(content).__name__}")
    return content
