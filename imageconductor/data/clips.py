"""Training samples from clip records (`clip_records.py`, `clip_index.py`), read by random access in a seeded order."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from imageconductor.conditioning import Trajectories, cover_crop
from imageconductor.data.batches import sample_frames
from imageconductor.data.clip_index import ClipList, Shard, find_clips
from imageconductor.data.clip_records import ClipRecord, CorruptClipError
from imageconductor.data.videos import Video

_SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|(counter|anti)?-?clockwise)\b", re.IGNORECASE)
_COLOURS = re.compile(
    r"\b(red|orange|yellow|green|blue|purple|violet|pink|brown|cyan|magenta|turquoise|teal|golden)\b", re.IGNORECASE
)
_ATTEMPTS = 20


class ShuffledOrder:
    """The clip at each position of an endless shuffled sequence, which holds every clip once per epoch.

    Shards are shuffled, and clips within windows of a few shards, as by a shuffle buffer. Unlike with a buffer, the
    clip is a pure function of the position: a run can resume anywhere, and however the positions are split over
    processes and workers, every clip is read exactly once.

    Args:
        shard_sizes: Number of clips in each shard.
        window: Number of shards whose clips are mixed.
        seed: Seed of the order in all epochs.
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


class MixedOrder:
    """Several orders mixed in fixed proportions: the clip at each position of an endless sequence.

    Within each thousand positions every order has its part to one position, and its clips come in its own order. As in
    `ShuffledOrder`, the clip is a pure function of the position.

    Args:
        orders: Of the sources, whose clips are numbered one source after the other.
        weights: How often each source is drawn, relative to each other.
        seed: Seed of the order of the sources.
    """

    PERIOD = 1000

    def __init__(self, orders: Sequence[ShuffledOrder], weights: Sequence[float], seed: int):
        self.orders, self.seed = orders, seed
        self.offsets = [0, *np.cumsum([len(order) for order in orders])]
        ends = np.rint(np.cumsum(weights) / sum(weights) * self.PERIOD).astype(np.int64)
        self.counts = np.diff(ends, prepend=0)  # of each source in a period
        if not self.counts.all():
            raise ValueError(f"weights of data must not be a thousand times as large as others, got {list(weights)}")

    def __getitem__(self, position: int) -> int:
        period, place = divmod(position, self.PERIOD)
        sources = np.random.default_rng([self.seed, period]).permutation(
            np.repeat(range(len(self.orders)), self.counts)
        )
        source = int(sources[place])
        drawn = period * int(self.counts[source]) + int((sources[:place] == source).sum())
        return int(self.offsets[source]) + self.orders[source][drawn]


def hold_out(shards: Sequence[Shard], count: int) -> tuple[list[Shard], list[ClipRecord]]:
    """Shards without the held-out clips, some perhaps empty now, and the held-out clips.

    Keys with the smallest hashes are held out: the same clips in every process and run, however the data are sorted
    into shards, and nearly the same ones when clips are added. A key that occurs several times is held out everywhere.

    Raises:
        ValueError: No other clip would be left.
    """
    if not count:
        return list(shards), []
    hashes = [shard.hash_keys() for shard in shards]
    distinct = np.unique(np.concatenate(hashes))
    if count >= len(distinct):
        raise ValueError(f"held_out_clips must be less than the {len(distinct)} clips of data, got {count}")
    largest = distinct[count - 1]
    held_out: dict[int, ClipRecord] = {}
    for shard, values in zip(shards, hashes, strict=True):
        for number in np.flatnonzero(values <= largest).tolist():
            held_out[int(values[number])] = shard[number]
    kept = [shard.select(values > largest) for shard, values in zip(shards, hashes, strict=True)]
    return kept, [held_out[value] for value in sorted(held_out)]


class ClipSamples:
    """An endless shuffled sequence of training samples from shards or folders of clips.

    A clip that cannot be read is replaced by another and named in the sample's `skipped`.

    Args:
        sources: As in `find_clips`; or weights by source, in whose proportions clips are drawn.
        size: (W, H) in pixels; clips of another size are resized and cropped with their tracks. A cache keeps its size.
        num_frames: T; that many evenly spaced frames are drawn from each clip.
        horizontal_flip: Probability of mirroring a clip; clips whose captions tell left from right are never mirrored.
        shuffle_shards: Window of `ShuffledOrder`.
        seed: Seed of the order, the frames and the flips.
        held_out_clips: Clips that are left out; see `hold_out`.
        shows_held_out: Gives the clips that are held out, and no others.

    Raises:
        FileNotFoundError: A source holds no clip.
        ValueError: `horizontal_flip` is not 0 for a cache, videos and caches are mixed, or all clips are held out.
    """

    def __init__(
        self,
        sources: Sequence[str | Path] | Mapping[str, float],
        size: tuple[int, int],
        num_frames: int,
        horizontal_flip: float = 0.0,
        shuffle_shards: int = 16,
        seed: int = 0,
        held_out_clips: int = 0,
        shows_held_out: bool = False,
    ):
        found = [find_clips([source]) for source in sources]
        shards, held_out = hold_out(list(itertools.chain(*found)), held_out_clips)
        self.records = held_out if shows_held_out else ClipList(shards)
        self.order: ShuffledOrder | MixedOrder
        if shows_held_out:
            self.order = ShuffledOrder([len(held_out)], shuffle_shards, seed)
        elif isinstance(sources, Mapping):
            rest = iter(shards)
            sizes = [_list_sizes(itertools.islice(rest, len(of_source))) for of_source in found]
            if empty := [str(source) for source, of_source in zip(sources, sizes, strict=True) if not sum(of_source)]:
                raise ValueError(f"held_out_clips={held_out_clips} leaves no clip of {', '.join(empty)}")
            orders = [ShuffledOrder(of_source, shuffle_shards, seed) for of_source in sizes]
            self.order = MixedOrder(orders, list(sources.values()), seed)
        else:
            self.order = ShuffledOrder(_list_sizes(shards), shuffle_shards, seed)
        self.size, self.num_frames, self.horizontal_flip, self.seed = size, num_frames, horizontal_flip, seed
        self.is_cached = self.records[0].is_cached
        if any((shard.have("latents.npz") != self.is_cached).any() for shard in shards):
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
                sample = self._read_latents(record, random) if self.is_cached else self._read_video(record, random)
                return sample | {"key": record.key, "skipped": skipped}
            except ImportError:
                raise
            except Exception as error:  # Decoders report damage by many kinds of exceptions.
                skipped.append(f"{record.key}: {error}")
                index = int(random.integers(len(self.records)))
        raise CorruptClipError(f"{_ATTEMPTS} clips in a row cannot be read, the last being {skipped[-1]}")

    def _read_video(self, record: ClipRecord, random: np.random.Generator) -> dict[str, Any]:
        caption = record.info()["caption"]
        video, (points, visible) = open_video(record), record.tracks()
        chosen = self._draw_frames(len(video), points.shape[1], random)
        pixels, tracks = fit_to_size(video.frames(chosen), points[:, chosen], visible[:, chosen], self.size)
        if random.random() < self.horizontal_flip and not tells_left_from_right(caption):
            pixels, tracks = pixels.flip(-1), tracks.flip_horizontal()
        return {"pixel_values": pixels, **_track_fields(tracks), "caption": caption}

    def _read_latents(self, record: ClipRecord, random: np.random.Generator) -> dict[str, Any]:
        caption = record.info()["caption"]
        with np.load(io.BytesIO(record.read("latents.npz"))) as arrays:
            mean, std, size = arrays["mean"], arrays["std"], arrays["size"]
        with np.load(io.BytesIO(record.read("text.npz"))) as arrays:
            text = torch.from_numpy(arrays["text"].astype(np.float32))
        width, height = (int(side) for side in size)
        points, visible = record.tracks()
        chosen = self._draw_frames(len(mean), points.shape[1], random)
        latents = {
            name: torch.from_numpy(values[chosen].astype(np.float32)).transpose(0, 1)
            for name, values in (("latent_mean", mean), ("latent_std", std))
        }
        size = torch.tensor([width, height])
        fields = _track_fields(to_trajectories(points[:, chosen], visible[:, chosen], (width, height)))
        return {**latents, "size": size, "text": text, **fields, "caption": caption}

    def _draw_frames(self, available: int, num_tracked: int, random: np.random.Generator) -> list[int]:
        if available != num_tracked:
            raise CorruptClipError(f"{available} frames but tracks over {num_tracked}")
        if available < self.num_frames:
            raise CorruptClipError(f"{available} frames, {self.num_frames} are needed")
        return sample_frames(available, self.num_frames, random)


def open_video(record: ClipRecord) -> Video:
    """The mp4 of a record.

    Raises:
        CorruptClipError: There is none, or it is not readable.
    """
    return Video(io.BytesIO(record.read("mp4")), f"{record.key}.mp4")


def fit_to_size(
    frames: NDArray[np.uint8], points: NDArray[np.float64], visible: NDArray[np.bool_], size: tuple[int, int]
) -> tuple[Tensor, Trajectories]:
    """Frames and their tracks, resized and cropped together.

    Args:
        frames: (T, H, W, 3).
        points: (N, T, 2) in pixels of these frames.
        visible: (N, T).
        size: The new (W, H).

    Returns:
        (3, T, H, W) uint8, and the tracks.
    """
    tracks = to_trajectories(points, visible, (frames.shape[2], frames.shape[1]))
    return crop_frames(frames, size), tracks.cover_crop(size)


def crop_frames(frames: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """Frames (T, H, W, 3), cover-cropped to `size` (W, H), which keeps their aspect: (3, T, H, W) uint8."""
    if (frames.shape[2], frames.shape[1]) != size:
        frames = np.stack([np.asarray(cover_crop(Image.fromarray(frame), size)) for frame in frames])
    return torch.from_numpy(frames).permute(3, 0, 1, 2)


def tells_left_from_right(caption: str) -> bool:
    """Whether a caption would be wrong of the mirrored clip."""
    return _SIDES.search(caption) is not None


def names_a_colour(caption: str) -> bool:
    """Whether a caption would be wrong of the clip in other colours."""
    return _COLOURS.search(caption) is not None


def _list_sizes(shards: Iterable[Shard]) -> list[int]:
    """Numbers of clips that are read together, without the empty ones."""
    return [size for shard in shards for size in shard.sizes if size]


def to_trajectories(points: NDArray[np.float64], visible: NDArray[np.bool_], size: tuple[int, int]) -> Trajectories:
    """Points (N, T, 2) and visible (N, T) of frames of `size` (W, H)."""
    return Trajectories(torch.from_numpy(points), torch.from_numpy(visible), size)


def _track_fields(tracks: Trajectories) -> dict[str, Tensor]:
    return {"points": tracks.points.float(), "visible": tracks.visible}
