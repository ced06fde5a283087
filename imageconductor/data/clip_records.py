"""Clip records: the files of each clip, in a plain folder or in WebDataset shards; `clip_index.py` finds them.

A record consists of the files of one key (docs/data.md): `KEY.mp4`, `KEY.tracks.npz` (points (N, F, 2) in the video's
pixels, visible (N, F)) and `KEY.json` (caption and provenance); `KEY.boxes.json` holds boxes of objects in our JSON
form (`conditioning.box_files`), if there are any. In a cache made by `scripts/cache_latents.py`,
`KEY.latents.npz` (mean and std, (F, C, h, w)) and `KEY.text.npz` (text, (L, D)) replace the mp4.

Torch is not imported here: the curation's processes, which write records, start faster without it.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PARTS = ("mp4", "tracks.npz", "json", "latents.npz", "text.npz", "boxes.json")
"""Endings of the files of a record."""

_HEADER_BYTES = 512


class CorruptClipError(ValueError):
    """A clip that cannot be used; the message names it and the reason."""


@dataclass(frozen=True)
class Part:
    """Location of one file of a record: a file, or the bytes from `offset` on in a shard."""

    path: Path
    size: int
    offset: int | None = None  # behind the file's header in the shard; None = a file of its own

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            CorruptClipError: The file ends early, is missing, or is not where the shard's index says.
        """
        skipped = 0 if self.offset is None else _HEADER_BYTES
        try:
            with self.path.open("rb") as file:
                file.seek((self.offset or 0) - skipped)
                content = file.read(skipped + self.size)
        except OSError as error:
            raise CorruptClipError(f"{self.path}: {error.strerror}") from error
        if len(content) != skipped + self.size:
            raise CorruptClipError(f"{self.path}: ends inside a file")
        if skipped and _size_in_header(content[:skipped]) != self.size:
            raise CorruptClipError(f"{self.path}: has changed since its .index.npz was written; delete that file")
        return content[skipped:]


def _size_in_header(header: bytes) -> int | None:
    """Size of the file that a tar header announces; None if it is no header."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.TarError:
        return None


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
        """Points (N, F, 2) in pixels of the video, and visible (N, F); points that are not finite are hidden.

        They stay as they are: a number in their place would be a start from which displacements are counted.
        """
        with np.load(io.BytesIO(self.read("tracks.npz"))) as arrays:
            points, visible = arrays["points"].astype(np.float64), arrays["visible"].astype(np.bool_)
        return points, visible & np.isfinite(points).all(-1)


def encode_tracks(points: NDArray[np.floating], visible: NDArray[np.bool_]) -> bytes:
    """The content of `KEY.tracks.npz`, of points (N, F, 2) in pixels and visible (N, F).

    Points are stored as float32: float16 rounds to 0.25 px from x = 256 on, and int16 in 1/64 px ends at 512 px.
    """
    file = io.BytesIO()
    np.savez(file, points=points.astype(np.float32), visible=visible)
    return file.getvalue()
