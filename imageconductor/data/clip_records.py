"""Clip records on disk: the files of each clip, in a plain folder or in WebDataset shards.

A record consists of the files of one key (docs/data.md): `KEY.mp4`, `KEY.tracks.npz` (points (N, F, 2) in the video's
pixels, visible (N, F)) and `KEY.json` (caption and provenance). In a cache made by `scripts/cache_latents.py`,
`KEY.latents.npz` (mean and std, (F, C, h, w)) and `KEY.text.npz` (text, (L, D)) replace the mp4.

Torch is not imported here: the curation's processes, which write records, start faster without it.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_PARTS = ("mp4", "tracks.npz", "json", "latents.npz", "text.npz")


class CorruptClipError(ValueError):
    """A clip that cannot be used; the message names it and the reason."""


@dataclass(frozen=True)
class Part:
    """Location of one file of a record, which may lie inside a shard."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            CorruptClipError: The file ends early or is missing.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise CorruptClipError(f"{self.path}: {error.strerror}") from error
        if len(content) != self.size:
            raise CorruptClipError(f"{self.path}: ends inside a file")
        return content


@dataclass(frozen=True)
class ClipRecord:
    """Locations of the files of one clip."""

    key: str
    parts: dict[str, Part]

    @property
    def is_cached(self) -> bool:
        """Whether the record holds latents instead of a video."""
        return "latents.npz" in self.parts

    def read(self, part: str) -> bytes:
        """The bytes of a part, such as "mp4"."""
        if part not in self.parts:
            raise CorruptClipError(f"no {self.key}.{part}")
        return self.parts[part].read()

    def info(self) -> dict[str, Any]:
        """The record's JSON."""
        info = json.loads(self.read("json"))
        if not isinstance(info, dict) or not isinstance(info.get("caption"), str):
            raise CorruptClipError(f"{self.key}.json holds no caption")
        return info

    def tracks(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Points (N, F, 2) in pixels of the video, and visible (N, F); points that are not finite are hidden."""
        with np.load(io.BytesIO(self.read("tracks.npz"))) as arrays:
            points, visible = arrays["points"].astype(np.float64), arrays["visible"].astype(np.bool_)
        is_finite = np.isfinite(points)
        return np.where(is_finite, points, 0.0), visible & is_finite.all(-1)


def encode_tracks(points: NDArray[np.floating], visible: NDArray[np.bool_]) -> bytes:
    """The content of `KEY.tracks.npz`, of points (N, F, 2) in pixels and visible (N, F).

    Points are stored as float32: float16 rounds to 0.25 px from x = 256 on, and int16 in 1/64 px ends at 512 px.
    """
    file = io.BytesIO()
    np.savez(file, points=points.astype(np.float32), visible=visible)
    return file.getvalue()


def find_clips(sources: Sequence[str | Path]) -> list[list[ClipRecord]]:
    """Records grouped by shard; each clip of a plain folder forms a shard of its own.

    Args:
        sources: Folders of shards or of records, shards, or patterns of shards such as `train-{000..099}.tar`.

    Raises:
        FileNotFoundError: A source holds no clip.
    """
    shards: list[list[ClipRecord]] = []
    for source in sources:
        paths = [Path(name) for name in braceexpand(str(source))]
        paths = [match for path in paths for match in ([path] if path.exists() else _glob(path))]
        found: list[list[ClipRecord]] = []
        for path in paths:
            tars = [path] if path.is_file() else _glob(path / "*.tar")
            found += [_list_shard(tar) for tar in tars] or [[record] for record in _list_folder(path)]
        if not any(found):
            raise FileNotFoundError(
                f"no clips at {source}: expected .tar shards, or a folder of KEY.mp4, KEY.tracks.npz and KEY.json"
            )
        shards += [shard for shard in found if shard]
    return shards


def _glob(pattern: Path) -> list[Path]:
    """Matches in the pattern's folder, sorted, without hidden files, which `files.atomic_path` may have left."""
    matches = pattern.parent.glob(pattern.name) if pattern.parent.is_dir() else ()
    return sorted(path for path in matches if not path.name.startswith("."))


def _group_by_key(files: Iterable[tuple[str, Part]]) -> list[ClipRecord]:
    """Records of files; the key is the name up to the first dot, as in WebDataset."""
    parts: dict[str, dict[str, Part]] = {}
    for name, part in files:
        folder, _, base = name.rpartition("/")
        key, _, extension = base.partition(".")
        if extension in _PARTS:
            parts.setdefault(f"{folder}/{key}" if folder else key, {})[extension] = part
    return [ClipRecord(key, found) for key, found in parts.items()]


def _list_shard(path: Path) -> list[ClipRecord]:
    files: list[tuple[str, Part]] = []
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    files.append((member.name.removeprefix("./"), Part(path, member.offset_data, member.size)))
    except tarfile.TarError as error:
        logger.warning("%s is damaged (%s); %d files before the damage are used", path, error, len(files))
    return _group_by_key(files)


def _list_folder(path: Path) -> list[ClipRecord]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return _group_by_key((file.relative_to(path).as_posix(), Part(file, 0, file.stat().st_size)) for file in files)
