"""NumPy's npy and npz data, read by their headers alone: nothing is unpickled, and no header is believed unchecked."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import io
import lzma
import math
import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from imageconductor.conditioning.trajectory_json import abbreviate

Array = npt.NDArray[Any]

MAX_ARRAY_BYTES = 1 << 28

_MOST_DESCRIBED = 8


def read_npy(file: IO[bytes], source: str) -> Array:
    """The array of an npy file, of numbers or booleans.

    Raises:
        ValueError: another kind of data, such as pickled objects; a header that promises more than the file holds, or
            more than 256 MiB.
    """
    shape, is_fortran, dtype = _read_header(file, source)
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


class NpzArrays(Mapping[str, Array]):
    """The arrays of an npz archive by their names, each read when it is asked for; others may hold anything.

    Args:
        file: the archive.
        source: its name in messages.

    Raises:
        ValueError: a damaged archive; where an array is asked for, as `read_npy`.
    """

    def __init__(self, file: Path | IO[bytes], source: str) -> None:
        self._file, self._source = file, source
        with self._open() as archive:
            self._names = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]

    def __getitem__(self, name: str) -> Array:
        if name not in self:
            raise KeyError(name)
        with self._open() as archive, archive.open(f"{name}.npy") as member:
            return read_npy(member, f"{self._source}, {name}")

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def describe(self) -> list[str]:
        """Names, types and shapes, of which no more than the headers is read."""
        described: list[str] = []
        with self._open() as archive:
            for name in self:
                with archive.open(f"{name}.npy") as member:
                    shape, _, dtype = _read_header(member, f"{self._source}, {name}")
                described.append(f"{name} {dtype} {shape}")
        return described

    @contextmanager
    def _open(self) -> Generator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self._file) as archive:
                yield archive
        except _DAMAGES as error:
            raise ValueError(f"{self._source}: damaged archive: {error}") from error


def npz_bytes(**arrays: Array) -> bytes:
    """A compressed npz archive."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **cast("dict[str, Any]", arrays))
    return buffer.getvalue()


def describe_arrays(arrays: Mapping[str, Array]) -> str:
    """Names, types and shapes for messages."""
    if isinstance(arrays, NpzArrays):
        described = arrays.describe()
    else:
        described = [f"{name} {array.dtype} {array.shape}".strip() for name, array in arrays.items()]
    more = [f"{len(described) - _MOST_DESCRIBED} more"] * (len(described) > _MOST_DESCRIBED)
    return ", ".join([one[:80] for one in described[:_MOST_DESCRIBED]] + more) or "no arrays"


def load_arrays(path: Path) -> Mapping[str, Array]:
    """The arrays of an npz file by name, or that of an npy file as ""."""
    with path.open("rb") as file:
        is_single = file.read(6) == b"\x93NUMPY"
        file.seek(0)
        return {"": read_npy(file, str(path))} if is_single else NpzArrays(path, str(path))


def _read_header(file: IO[bytes], source: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type."""
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read_header(file)
    except Exception as error:  # NumPy parses it as Python, by way of its tokenizer, whose errors come out
        raise ValueError(f"{source}: damaged NumPy header: {abbreviate(str(error))}") from error
