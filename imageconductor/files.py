"""Files and folders that appear whole: written under another name beside their place, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_PARTIAL = ".partial"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to; what is written there replaces `path` when the block ends, and is deleted if it raises.

    The suffix stays, since it tells libraries the format. A block that deletes what it wrote leaves no file at `path`.
    The folder is made if it is not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_partial_name(path.stem) + path.suffix)
    try:
        yield temporary
        if temporary.exists():
            _flush(temporary)
            temporary.replace(path)
        else:
            path.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` when the block ends."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder of the same name to fill, which stands at `path` when the block ends, or is deleted if it raises.

    Args:
        path: New, or an empty folder.
        replace: Whether a folder that is there gives way, at the moment when the new one is complete.

    Raises:
        ValueError: No folder can be written there.
        FileExistsError: Something lies at `path`.
        OSError: At the end, something has appeared at `path`, or nothing can be moved there. What was written is kept,
            and the message says where.
    """
    path = path.absolute()
    _check_free(path, replace)
    root = path.with_name(_partial_name(path.name))
    temporary = root / path.name
    shutil.rmtree(root, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    try:
        _check_free(path, replace)
        replace_folder(temporary, path)
    except OSError as error:
        kind = FileExistsError if isinstance(error, FileExistsError) else OSError
        raise kind(f"{error}; the new one is in {temporary}") from None
    shutil.rmtree(root, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Makes sure that a folder can be made at a path, or that files can be written into the one that is there.

    Raises:
        ValueError: It cannot, in one line with the reason.
    """
    folder = folder.absolute()
    try:
        above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not above.is_dir():
            raise ValueError(f"{folder} cannot be written: {above} is no folder")
        with tempfile.TemporaryDirectory(dir=above, prefix=".", suffix=_PARTIAL) as trial:
            (Path(trial) / folder.relative_to(above)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from error


def check_new_folder(folder: Path) -> None:
    """Makes sure, before the work, that `atomic_folder` can put a folder at a path.

    Raises:
        ValueError: Something is there, or nothing can be written.
    """
    check_writable(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; name another --output")


def replace_folder(complete: Path, path: Path) -> None:
    """Moves a complete folder to `path`, on the same disk; one that is there is deleted afterwards."""
    old = complete.with_name(f"{complete.name}.old")
    if path.exists():
        path.rename(old)
    try:
        complete.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Deletes what killed processes left half-written below a folder; nothing may be writing there."""
    for path in sorted(folder.rglob(f".*{_PARTIAL}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _partial_name(name: str) -> str:
    """A hidden name for a file or folder while it is written; it fits file systems with 255 bytes for a name."""
    if len(os.fsencode(name)) > 100:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{name}.{platform.node()}.{os.getpid()}{_PARTIAL}"


def _check_free(path: Path, replace: bool) -> None:
    if path.exists() and (not path.is_dir() or (not replace and any(path.iterdir()))):
        raise FileExistsError(f"{path} exists and is not an empty folder")


def _flush(path: Path) -> None:
    """The rename must not reach the disk before the content; some network file systems cannot promise that."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
