"""Where clip records lie: the clips of shards and folders, as one array each.

Beside a shard `NAME.tar` lies `NAME.index.npz`, so that the headers of the shard are read once and not by every
process of every run: `clips`, the array of a `Shard`, and `shard_bytes`, the size of the shard that it belongs to. The
curation writes it; where it is missing, one process of a machine writes it and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imageconductor.data.clip_records import PARTS, ClipRecord, Part
from imageconductor.files import atomic_write, read_text

logger = logging.getLogger(__name__)

CACHE_RECORD = "made_with.json"
"""Beside the shards of a cache of latents: what they depend on, and `num_shards`, how many there are in the end."""


@dataclass(frozen=True, eq=False)
class Shard:
    """The clips of a shard or of a plain folder, whose records are made as they are asked for.

    Attributes:
        path: The tar file, or the folder.
        clips: (n,) array with the field `key`, and for each kind of file a field (offset, size); size -1 = missing.
        is_folder: Whether it is a folder.
    """

    path: Path
    clips: NDArray[np.void]
    is_folder: bool = False

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> ClipRecord:
        clip = self.clips[number]
        key = clip["key"].decode("utf-8", "surrogateescape")
        parts = {}
        for name in self._part_names:
            offset, size = clip[name].tolist()
            if size >= 0:
                parts[name] = (
                    Part(self.path / f"{key}.{name}", size) if self.is_folder else Part(self.path, size, offset)
                )
        return ClipRecord(key, parts)

    def __iter__(self) -> Iterator[ClipRecord]:
        return (self[number] for number in range(len(self)))

    @property
    def _part_names(self) -> tuple[str, ...]:
        return (self.clips.dtype.names or ())[1:]

    @property
    def sizes(self) -> list[int]:
        """Numbers of clips that are read together: all of a shard, each of a folder by itself."""
        return [1] * len(self) if self.is_folder else [len(self)]

    def have(self, part: str) -> NDArray[np.bool_]:
        """Whether each record holds a part, such as "boxes.json": (n,)."""
        return self.clips[part][:, 1] >= 0 if part in self._part_names else np.zeros(len(self), np.bool_)

    def hash_keys(self) -> NDArray[np.uint64]:
        """The first eight bytes of each key's SHA-256 as a number: (n,)."""
        return hash_keys(self.clips["key"].tolist())

    def select(self, chosen: NDArray[np.bool_]) -> Shard:
        """The clips where `chosen` (n,) is true."""
        return Shard(self.path, self.clips[chosen], self.is_folder)


class ClipList:
    """The clips of several shards one after the other."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        self.ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> ClipRecord:
        if not 0 <= number < len(self):
            raise IndexError(f"clip {number} is outside 0..{len(self) - 1}")
        place = int(np.searchsorted(self.ends, number, side="right"))
        return self.shards[place][number - int(self.ends[place])]  # Counted from the shard's end.

    def __iter__(self) -> Iterator[ClipRecord]:
        return (record for shard in self.shards for record in shard)


def hash_keys(keys: Iterable[bytes]) -> NDArray[np.uint64]:
    """The first eight bytes of each key's SHA-256 as a number, which sorts as the SHA-256 does: (n,)."""
    digests = b"".join(hashlib.sha256(key).digest()[:8] for key in keys)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def find_clips(sources: Sequence[str | Path]) -> list[Shard]:
    """The shards and folders of clips that are not empty.

    Args:
        sources: Folders of shards or of records, shards, or patterns of shards such as `train-{000..099}.tar`.

    Raises:
        FileNotFoundError: A source holds no clip.
        ValueError: A folder, or that of a pattern, is still being filled; shards that are named are read.
    """
    shards: list[Shard] = []
    for source in sources:
        named = _expand_braces(str(source))
        paths = [match for path in named for match in ([path] if path.exists() else _glob(path))]
        for folder in [path.parent for path in named if not path.exists()] + [path for path in paths if path.is_dir()]:
            _check_complete(folder)
        found: list[Shard] = []
        for path in paths:
            tars = [path] if path.is_file() else _glob(path / "*.tar")
            found += _read_shards(tars) if tars else [_list_folder(path)]
        if not any(len(shard) for shard in found):
            raise FileNotFoundError(
                f"no clips at {source}: expected .tar shards, or a folder of KEY.mp4, KEY.tracks.npz and KEY.json"
            )
        shards += [shard for shard in found if len(shard)]
    return shards


def _check_complete(folder: Path) -> None:
    """Refuses the output of a curation or of `scripts/cache_latents.py` that lacks shards, which may come later.

    Raises:
        ValueError: It lacks some.
    """
    if (folder / ".sources").exists() and not (folder / "index.parquet").exists():  # as of `curation.run_folder.Run`
        kind = "curation"
    elif len(_glob(folder / "clips-*.tar")) < _count_planned_shards(folder / CACHE_RECORD):
        kind = "cache of latents"
    else:
        return
    raise ValueError(
        f"{folder} is an unfinished {kind}, to which clips would be added during the training: let its command end, or "
        "start it again to go on, and train then"
    )


def _count_planned_shards(record: Path) -> int:
    """Number of shards of a finished cache; 0 for other folders and caches of earlier versions, which do not say."""
    return json.loads(read_text(record)).get("num_shards", 0) if record.is_file() else 0


def _expand_braces(pattern: str) -> list[Path]:
    """The paths that braces in a pattern stand for."""
    if "{" not in pattern:
        return [Path(pattern)]
    from braceexpand import braceexpand  # Here, as a machine that is lent for a while may lack it.

    return [Path(name) for name in braceexpand(pattern)]


def index_path(shard: Path) -> Path:
    """The index beside a shard."""
    return shard.with_suffix(".index.npz")


def write_index(shard: Path) -> NDArray[np.void]:
    """Reads the headers of a shard and writes its index, unless the shard is damaged.

    Returns:
        `Shard.clips`.

    Raises:
        OSError: The shard cannot be read.
    """
    shard_bytes = shard.stat().st_size
    files: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(shard, "r:") as tar:  # Clips of compressed archives could not be found by their offsets.
            for member in tar:
                if member.isfile():
                    files.append((member.name.removeprefix("./"), member.offset_data, member.size))
    except tarfile.TarError as error:
        logger.warning("%s is damaged (%s); %d files before the damage are used", shard, error, len(files))
        return _build_table(files)
    clips = _build_table(files)
    try:
        with atomic_write(index_path(shard)) as file:
            np.savez(file, clips=clips, shard_bytes=shard_bytes)
    except OSError as error:
        logger.warning("%s cannot be written (%s); every process reads the shard's headers", index_path(shard), error)
    return clips


def _read_shards(paths: Sequence[Path]) -> list[Shard]:
    """Shards by their indices; those that are missing are written by one process of this machine."""
    tables = [_load_index(path) for path in paths]
    if missing := [number for number, clips in enumerate(tables) if clips is None]:
        with _lock_folder(paths[0].parent):
            for number in missing:  # Unless another process has written it meanwhile.
                clips = _load_index(paths[number])
                tables[number] = write_index(paths[number]) if clips is None else clips
    return [Shard(path, clips) for path, clips in zip(paths, tables, strict=True) if clips is not None]


def _load_index(shard: Path) -> NDArray[np.void] | None:
    """`Shard.clips` from the index beside a shard; None if there is none that belongs to it."""
    try:
        with np.load(index_path(shard)) as arrays:
            clips = arrays["clips"]
            names = clips.dtype.names or ()
            is_current = arrays["shard_bytes"] == shard.stat().st_size
            return clips if is_current and names[:1] == ("key",) and {*names[1:]} <= {*PARTS} else None
    except Exception:  # A file that is missing or damaged is written anew.
        return None


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Lets one process of this machine at a time index a folder, except under Windows, which has no such locks."""
    if os.name == "nt":
        yield
        return
    import fcntl

    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f"imageconductor-index-{os.getuid()}-{name}.lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _list_folder(path: Path) -> Shard:
    files = sorted(_walk(path, "", {path.resolve()}), key=lambda file: file[0].split("/"))
    return Shard(path, _build_table((name, 0, size) for name, size in files), is_folder=True)


def _walk(folder: Path | str, prefix: str, roots: set[Path]) -> Iterator[tuple[str, int]]:
    """Names and sizes of the files below a folder, each of which is asked about once: a network's disk takes its time.

    Links to folders are followed where they lead away: no clip is there twice.

    Args:
        folder: Folder.
        prefix: Of the names.
        roots: The folder where the walk began, and those that links have led to.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        logger.warning("%s cannot be read, and is left out", folder)
        return
    for entry in entries:
        name = f"{prefix}{entry.name}"
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link that leads to itself
            continue
        if is_folder and entry.is_symlink():
            target = Path(entry.path).resolve()
            if not any(target.is_relative_to(root) or root.is_relative_to(target) for root in roots):
                roots.add(target)
                yield from _walk(entry.path, f"{name}/", roots)
        elif is_folder:
            yield from _walk(entry.path, f"{name}/", roots)
        elif is_file:
            yield name, entry.stat().st_size


def _build_table(files: Iterable[tuple[str, int, int]]) -> NDArray[np.void]:
    """`Shard.clips` of files (name, offset, size); the key is the name up to the first dot, as in WebDataset."""
    clips: dict[bytes, dict[str, tuple[int, int]]] = {}
    for name, offset, size in files:
        folder, _, base = name.rpartition("/")
        key, _, ending = base.partition(".")
        if ending in PARTS:
            full = f"{folder}/{key}" if folder else key
            clips.setdefault(full.encode("utf-8", "surrogateescape"), {})[ending] = (offset, size)
    names = [name for name in PARTS if any(name in parts for parts in clips.values())]
    key_bytes = max(map(len, clips), default=1)
    table = np.empty(len(clips), [("key", f"S{key_bytes}"), *((name, "<i8", (2,)) for name in names)])
    table["key"] = list(clips)
    for name in names:
        table[name] = [parts.get(name, (0, -1)) for parts in clips.values()]
    return table


def _glob(pattern: Path) -> list[Path]:
    """Matches in the pattern's folder, sorted, without hidden files, which `files.atomic_path` may have left."""
    matches = pattern.parent.glob(pattern.name) if pattern.parent.is_dir() else ()
    return sorted(path for path in matches if not path.name.startswith("."))
