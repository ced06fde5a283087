"""NumPy's npy and npz data, read by their headers alone: nothing is unpickled, and no header is believed unchecked."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import io
import lzma
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from imageconductor.conditioning.trajectory_json import abbreviate

Array = npt.NDArray[Any]

MAX_ARRAY_BYTES = 1 << 28


def read_npy(file: IO[bytes], source: str) -> Array:
    """The array of an npy file, of numbers or booleans.

    Raises:
        ValueError: another kind of data, such as pickled objects; a header that promises more than the file holds, or
            more than 256 MiB.
    """
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(file)
    except Exception as error:  # NumPy parses it as Python, by way of its tokenizer, whose errors come out
        raise ValueError(f"{source}: damaged NumPy header: {abbreviate(str(error))}") from error
    if dtype.hasobject:
        raise ValueError(
            f"{source} holds pickled Python objects, which can run code when they are read (Diffusion as Shader and "
            "FlexTraj write such files); save the arrays alone: np.savez(FILE, tracks=..., visibility=...)"
        )
    if dtype.kind not in "biuf" or any(side < 0 for side in shape):
        raise ValueError(f"{source} holds {dtype} of shape {shape}, and not numbers")
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > MAX_ARRAY_BYTES:
        raise ValueError(f"{source} holds {dtype} of shape {shape}; more than 256 MiB are not read: keep fewer tracks")
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        raise ValueError(f"{source} is cut short: its header promises {num_bytes} bytes of data, it has {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


_DAMAGES = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError),
    *(NotImplementedError, RuntimeError, OSError, EOFError),
)


def read_npz(file: IO[bytes], source: str) -> dict[str, Array]:
    """The arrays of an npz archive by their names.

    Raises:
        ValueError: a damaged archive, or as `read_npy`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            arrays: dict[str, Array] = {}
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as member:
                        arrays[name[:-4]] = read_npy(member, f"{source}, {name[:-4]}")
            return arrays
    except _DAMAGES as error:
        raise ValueError(f"{source}: damaged archive: {error}") from error


def npz_bytes(**arrays: Array) -> bytes:
    """A compressed npz archive."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **cast("dict[str, Any]", arrays))
    return buffer.getvalue()


def describe_arrays(arrays: dict[str, Array]) -> str:
    """Names, types and shapes for messages."""
    return ", ".join(f"{name} {array.dtype} {array.shape}".strip() for name, array in arrays.items()) or "no arrays"


def load_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an npz file by name, or that of an npy file as ""."""
    with path.open("rb") as file:
        is_single = file.read(6) == b"\x93NUMPY"
        file.seek(0)
        return {"": read_npy(file, str(path))} if is_single else read_npz(file, str(path))
