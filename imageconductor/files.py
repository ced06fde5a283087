"""Files and folders that appear whole, and text files that people wrote.

What is written appears under another name beside its place and is renamed. Text of any editor is read in the encoding
that its first bytes show (UTF-8 with and without a byte order mark, UTF-16, UTF-32), and refused in any other.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO

try:
    import fcntl
except ImportError:  # under Windows
    fcntl = None

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_SHIPPED = ("configs", "models", "assets")  # folders of the repository that an installed package has too


def find_shipped(path: str | Path) -> Path:
    """A path as it is given, or where nothing is there, that of what the package brings along by this name.

    The repository's `configs/...`, `models/sprites` and `assets/...` so have the same name in any working folder.
    """
    given = Path(path)
    if given.parts[:1] and given.parts[0] in _SHIPPED and not given.exists():
        package = Path(__file__).parent
        for root in (package / "shipped", package.parent):  # of a wheel, of a checkout
            if (root / given).exists():
                return root / given
    return given


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path to write to; what is written there replaces `path` when the block ends, and is deleted if it raises.

    The suffix stays, since it tells libraries the format. A block that deletes what it wrote leaves no file at `path`.
    The folder is made if it is not there.
    """
    path = Path(path)
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
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` when the block ends."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file that people wrote, opened for reading.

    Args:
        path: The file.
        newline: As `open`'s.

    Raises:
        ValueError: The block meets bytes of another encoding; names the line.
    """
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
    try:
        with path.open(encoding=encoding, newline=newline) as file:
            yield file
    except UnicodeError as error:
        place = _find_undecodable_line(path) if encoding.startswith("utf-8") else None
        where = f" (line {place})" if place else ""
        raise ValueError(f"{path}: not {encoding.upper()} text{where}; save it in the encoding UTF-8") from error


def read_text(path: Path) -> str:
    """The content of a text file that people wrote.

    Raises:
        ValueError: It is in another encoding than Unicode's.
    """
    with open_text(path) as file:
        return file.read()


def _find_undecodable_line(path: Path) -> int | None:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeError:
                return number
    return None


def read_csv(path: Path) -> Iterator[list[str]]:
    """The rows of a CSV file that people wrote, header first, without empty lines.

    Raises:
        ValueError: Quotation marks do not balance, or a row has more or fewer columns than the header; names the line.
    """
    with open_text(path, newline="") as file:
        lines: list[str] = []  # of the present row

        def remember() -> Iterator[str]:
            for line in file:
                lines.append(line)
                yield line

        reader = csv.reader(remember(), strict=True)
        width, first = 0, 1
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{path}, line {first}: quotation marks do not balance: {error}") from error
            if row is None:
                return
            # A row of several lines each of which could be a row: a mark was left open, and a later one closed it.
            if len(lines) > 1 and all(line.count(",") >= width - 1 for line in lines):
                raise ValueError(
                    f"{path}, line {first}: quotation marks do not balance: the row goes on to line {reader.line_num}; "
                    "add the missing one, or put the row on one line"
                )
            width = width or len(row)
            if row and len(row) != width:
                raise ValueError(f"{path}, line {first}: {len(row)} columns, but the header has {width}")
            if row:
                yield row
            first = reader.line_num + 1
            lines.clear()


def list_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, each once; links to folders are followed, also those that lead back to one above."""
    folders, links, seen = [folder] if folder.is_dir() else [], list[Path](), set[tuple[int, int]]()
    while folders or links:
        place = (folders or links).pop(0)  # what lies in a folder and in a link to it is listed in the folder
        status = place.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in sorted(place.iterdir()):
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            else:
                yield path


def natural_order(name: str) -> tuple[list[int | str], str]:
    """Sort key of names: clip2 comes before clip10, and capitals count as small letters."""
    parts = re.split(r"(\d+)", name)  # Text and digits in turn, so numbers are compared with numbers.
    return [int(part) if place % 2 else part.casefold() for place, part in enumerate(parts)], name


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


def check_record(record: Path, settings: Mapping[str, Any], results: Path | None = None) -> None:
    """Refuses to go on with results that were made with other settings than these, which `write_record` has noted.

    Args:
        record: JSON beside the results; without it nothing is known of them, and they are taken as they are.
        settings: What the results depend on.
        results: File or folder with them, without which there is nothing to check; None = the record's folder.

    Raises:
        ValueError: Names the first setting that differs, and both values.
    """
    results = record.parent if results is None else results
    if not record.is_file() or not results.exists():
        return
    before, now = json.loads(read_text(record)), json.loads(json.dumps(settings, default=str))
    if different := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        values = " and now ".join(str(values.get(different[0]))[:80] for values in (before, now))
        more = f", and {', '.join(different[1:])}" if len(different) > 1 else ""
        raise ValueError(
            f"{results} holds results of other settings: {different[0]} was {values}{more}; name another output, or "
            "delete it"
        )


def write_record(record: Path, settings: Mapping[str, Any]) -> None:
    """Notes what results depend on, for `check_record`."""
    write_text(record, json.dumps(settings, default=str, indent=1))


def replace_folder(complete: Path, path: Path) -> None:
    """Moves a complete folder to `path`, on the same disk; one that is there is deleted afterwards.

    What it holds is on the disk before its name is.
    """
    for part in (*complete.rglob("*"), complete):
        if not part.is_symlink():
            _flush(part)
    old = complete.with_name(f"{complete.name}.old")
    if path.exists():
        path.rename(old)
    try:
        complete.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    with suppress(OSError):  # It is in its place already.
        _flush(path.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_partial(folder: Path, below: bool = True) -> None:
    """Deletes what killed processes left half-written in a folder; nothing may be writing there.

    Args:
        folder: Of the files; it need not be there.
        below: Whether also in the folders within it; not where those may be of others.
    """
    name = f".*{_PARTIAL}*"
    for path in sorted(folder.rglob(name) if below else folder.glob(name)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def lock(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Inside the block no other process can lock the same file, which stays.

    Where a file system has no locks this warns, and under Windows nothing is locked.

    Args:
        path: Of the file; its folder is made if it is not there.
        patience_s: Seconds to wait for another process that may be ending.

    Raises:
        ValueError: Another process has locked it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        end = time.monotonic() + patience_s
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise ValueError(
                        f"another process is writing into {path.parent}; wait for its end, or name another output"
                    ) from None
                time.sleep(0.2)
                continue
            except OSError as error:
                logger.warning("%s cannot be locked (%s): start nothing else that writes there", path.parent, error)
            break
        yield


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
    if os.name == "nt" and path.is_dir():  # which cannot be opened there
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
