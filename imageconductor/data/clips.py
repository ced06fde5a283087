"""Clip records on disk: a plain folder, or WebDataset shards, read at random places in an order fixed in advance.

A record is the files of one key (docs/data.md): `KEY.mp4`, `KEY.tracks.npz` (points (N, F, 2) in the video's pixels,
visible (N, F)) and `KEY.json` (caption and provenance). In a cache made by `scripts/cache_latents.py`,
`KEY.latents.npz` (mean and std, (F, C, h, w)) and `KEY.text.npz` (text, (L, D)) stand in for the mp4.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from braceexpand import braceexpand
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from imageconductor.conditioning import Trajectories, cover_crop
from imageconductor.data.batches import sample_frames

logger = logging.getLogger(__name__)

_PARTS = ("mp4", "tracks.npz", "json", "latents.npz", "text.npz")
_SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|(counter|anti)?-?clockwise)\b", re.IGNORECASE)
_ATTEMPTS = 20


class CorruptClipError(ValueError):
    """A clip cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Part:
    """Bytes of one file of a record, which may lie inside a shard."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            CorruptClipError: The file ends early or is gone.
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
    """Where the files of one clip are."""

    key: str
    parts: dict[str, Part]

    @property
    def is_cached(self) -> bool:
        """Whether it holds latents instead of a video."""
        return "latents.npz" in self.parts

    def read(self, part: str) -> bytes:
        """Bytes of a part, such as "mp4"."""
        if part not in self.parts:
            raise CorruptClipError(f"no {self.key}.{part}")
        return self.parts[part].read()

    def info(self) -> dict[str, Any]:
        """The record's JSON."""
        info = json.loads(self.read("json"))
        if not isinstance(info, dict) or not isinstance(info.get("caption"), str):
            raise CorruptClipError(f"{self.key}.json holds no caption")
        return info

    def tracks(self, size: tuple[int, int]) -> Trajectories:
        """Its tracks over all frames, on a frame of `size` (W, H); points that are not finite are hidden."""
        with np.load(io.BytesIO(self.read("tracks.npz"))) as arrays:
            points = torch.from_numpy(arrays["points"].astype(np.float64))
            visible = torch.from_numpy(arrays["visible"].astype(np.bool_))
        return Trajectories(points.nan_to_num(0.0, 0.0, 0.0), visible & points.isfinite().all(-1), size)


def find_clips(sources: Sequence[str | Path]) -> list[list[ClipRecord]]:
    """Records by shard; a clip of a plain folder is a shard of its own.

    Args:
        sources: Folders of shards or of records, shards, or patterns of shards such as `train-{000..099}.tar`.

    Raises:
        FileNotFoundError: A source holds no clip.
    """
    shards: list[list[ClipRecord]] = []
    for source in sources:
        paths = [Path(name) for name in braceexpand(str(source))]
        paths = [match for path in paths for match in ([path] if path.exists() else sorted(_glob(path)))]
        found: list[list[ClipRecord]] = []
        for path in paths:
            tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
            found += [_shard(tar) for tar in tars] or [[record] for record in _folder(path)]
        if not any(found):
            raise FileNotFoundError(
                f"no clips at {source}: expected .tar shards, or a folder of KEY.mp4, KEY.tracks.npz and KEY.json"
            )
        shards += [shard for shard in found if shard]
    return shards


def _glob(path: Path) -> Iterable[Path]:
    return path.parent.glob(path.name) if path.parent.is_dir() else ()


def _records(files: Iterable[tuple[str, Part]]) -> list[ClipRecord]:
    """Files grouped by key: what stands before the first dot of the name, as in WebDataset."""
    parts: dict[str, dict[str, Part]] = {}
    for name, part in files:
        folder, _, base = name.rpartition("/")
        key, _, extension = base.partition(".")
        if extension in _PARTS:
            parts.setdefault(f"{folder}/{key}" if folder else key, {})[extension] = part
    return [ClipRecord(key, found) for key, found in parts.items()]


def _shard(path: Path) -> list[ClipRecord]:
    files: list[tuple[str, Part]] = []
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    files.append((member.name.removeprefix("./"), Part(path, member.offset_data, member.size)))
    except tarfile.TarError as error:
        logger.warning("%s is damaged (%s); %d files before the damage are used", path, error, len(files))
    return _records(files)


def _folder(path: Path) -> list[ClipRecord]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return _records((file.relative_to(path).as_posix(), Part(file, 0, file.stat().st_size)) for file in files)


class ShuffledOrder:
    """Which clip stands at position p of an endless shuffled sequence: each clip once in every epoch.

    Shards are shuffled, and clips within windows of a few shards, which is what a shuffle buffer does. But position ->
    clip is a pure function: a run can go on anywhere, and any split of the positions over processes and workers reads
    every clip exactly once.

    Args:
        shard_sizes: Clips in each shard.
        window: Shards whose clips are mixed.
        seed: Of all epochs.
    """

    def __init__(self, shard_sizes: Sequence[int], window: int, seed: int):
        self.starts = [0, *itertools.accumulate(shard_sizes)]
        self.window = window
        self.seed = seed
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._permutation(epoch))
        return int(self._epoch[1][place])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        random = np.random.default_rng([self.seed, epoch])
        shards = random.permutation(len(self.starts) - 1)
        windows = []
        for first in range(0, len(shards), self.window):
            chosen = shards[first : first + self.window]
            clips = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in chosen])
            windows.append(random.permutation(clips))
        return np.concatenate(windows)


class ClipSamples:
    """Clips of shards or folders as training sees them, shuffled, without end.

    A clip that cannot be read is replaced by another; the sample's `skipped` says so.

    Args:
        sources: As `find_clips`.
        size: (W, H) in pixels; other clips are resized and cropped, their tracks with them. A cache keeps its size.
        num_frames: T, evenly spaced out of a clip's frames.
        horizontal_flip: How often a clip is mirrored; one whose caption tells left from right never is.
        shuffle_shards: Window of `ShuffledOrder`.
        seed: Of order, frames and flips.

    Raises:
        FileNotFoundError: A source holds no clip.
        ValueError: Flips are asked of a cache, or videos and caches are mixed.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        size: tuple[int, int],
        num_frames: int,
        horizontal_flip: float = 0.0,
        shuffle_shards: int = 16,
        seed: int = 0,
    ):
        shards = find_clips(sources)
        self.records = [record for shard in shards for record in shard]
        self.order = ShuffledOrder([len(shard) for shard in shards], shuffle_shards, seed)
        self.size, self.num_frames, self.horizontal_flip, self.seed = size, num_frames, horizontal_flip, seed
        self.is_cached = self.records[0].is_cached
        if any(record.is_cached != self.is_cached for record in self.records):
            raise ValueError("the sources mix videos and cached latents; train on one of the two")
        if self.is_cached and horizontal_flip:
            raise ValueError(f"cached latents cannot be mirrored; set horizontal_flip=0, got {horizontal_flip}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> dict[str, Any]:
        random = np.random.default_rng([self.seed, position])
        index, skipped = self.order[position], []
        while len(skipped) < _ATTEMPTS:
            record = self.records[index]
            try:
                sample = self._cached(record, random) if self.is_cached else self._decoded(record, random)
                return sample | {"key": record.key, "skipped": skipped}
            except Exception as error:  # Damage shows in as many ways as there are decoders.
                skipped.append(f"{record.key}: {error}")
                index = int(random.integers(len(self.records)))
        raise CorruptClipError(f"{_ATTEMPTS} clips in a row cannot be read, the last being {skipped[-1]}")

    def _decoded(self, record: ClipRecord, random: np.random.Generator) -> dict[str, Any]:
        caption = record.info()["caption"]
        video = Video(record)
        tracks = record.tracks(video.size)
        chosen = self._frames(len(video), tracks.num_frames, random)
        pixels, tracks = fit_to_size(video.frames(chosen), _at(tracks, chosen), self.size)
        if random.random() < self.horizontal_flip and not _SIDES.search(caption):
            pixels, tracks = pixels.flip(-1), tracks.flip_horizontal()
        return {"pixel_values": pixels, **_fields(tracks), "caption": caption}

    def _cached(self, record: ClipRecord, random: np.random.Generator) -> dict[str, Any]:
        caption = record.info()["caption"]
        with np.load(io.BytesIO(record.read("latents.npz"))) as arrays:
            mean, std, size = arrays["mean"], arrays["std"], arrays["size"]
        with np.load(io.BytesIO(record.read("text.npz"))) as arrays:
            text = torch.from_numpy(arrays["text"].astype(np.float32))
        width, height = (int(side) for side in size)
        tracks = record.tracks((width, height))
        chosen = self._frames(len(mean), tracks.num_frames, random)
        latents = {
            name: torch.from_numpy(values[chosen].astype(np.float32)).transpose(0, 1)
            for name, values in (("latent_mean", mean), ("latent_std", std))
        }
        size = torch.tensor([width, height])
        return {**latents, "size": size, "text": text, **_fields(_at(tracks, chosen)), "caption": caption}

    def _frames(self, available: int, tracked: int, random: np.random.Generator) -> list[int]:
        if available != tracked:
            raise CorruptClipError(f"{available} frames but tracks over {tracked}")
        if available < self.num_frames:
            raise CorruptClipError(f"{available} frames, {self.num_frames} are needed")
        return sample_frames(available, self.num_frames, random)


class Video:
    """The mp4 of a record, decoded where it is asked for.

    Raises:
        CorruptClipError: It is no video.
    """

    def __init__(self, record: ClipRecord):
        from decord import VideoReader

        content = record.read("mp4")
        try:
            self._reader = VideoReader(io.BytesIO(content), num_threads=1)
        except Exception as error:
            raise CorruptClipError(f"{record.key}.mp4 is not a readable video") from error

    def __len__(self) -> int:
        return len(self._reader)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(W, H)."""
        height, width = self._reader[0].shape[:2]
        return width, height

    def frames(self, numbers: Sequence[int]) -> NDArray[np.uint8]:
        """(T, H, W, 3)."""
        return self._reader.get_batch(list(numbers)).asnumpy()


def fit_to_size(frames: NDArray[np.uint8], tracks: Trajectories, size: tuple[int, int]) -> tuple[Tensor, Trajectories]:
    """(3, T, H, W) in [-1, 1] and tracks, from frames (T, H, W, 3), both resized and cropped to `size` (W, H)."""
    if tracks.size != size:
        frames = np.stack([np.asarray(cover_crop(Image.fromarray(frame), size)) for frame in frames])
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)
    return pixels, tracks.cover_crop(size)


def _at(tracks: Trajectories, frames: Sequence[int]) -> Trajectories:
    return Trajectories(tracks.points[:, list(frames)], tracks.visible[:, list(frames)], tracks.size)


def _fields(tracks: Trajectories) -> dict[str, Tensor]:
    return {"points": tracks.points.float(), "visible": tracks.visible}
