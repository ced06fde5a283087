"""Batches that are a pure function of their number, so that a resumed run sees the same data.

Sample p of a source depends on p alone, and batch i holds samples i*B .. (i+1)*B - 1. One process with a batch of 4,
two with 2 each, and one that accumulates over 4 batches of 1 therefore see the same samples in a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import SpriteDataset

_CLIPS = ("pixel_values", "latent_mean", "latent_std", "text")
"""Parts of a batch that only the networks read; what the step's random choices depend on stays on the CPU."""


class Samples(Protocol):
    """An endless sequence of samples, of which training takes each once."""

    def __getitem__(self, position: int) -> dict[str, Any]:
        """pixel_values (3, T, H, W) uint8, points (N, T, 2) px, visible (N, T) bool, caption, key."""
        ...


class Batches(Dataset[dict[str, Any]]):
    """Batch i of a source of samples."""

    def __init__(self, samples: Samples, batch_size: int):
        self.samples = samples
        self.batch_size = batch_size

    @property
    def num_clips(self) -> int | None:
        """Number of clips that the samples are taken from; None = no end of them, as of the sprite world."""
        return len(self.samples) if isinstance(self.samples, Sized) else None

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = index * self.batch_size
        return collate([self.samples[position] for position in range(first, first + self.batch_size)])


class SpriteSamples:
    """An endless sequence of sprite clips; consecutive samples come from alternating sets.

    Args:
        world: Settings of the clips; `kind` is replaced by each of the sets.
        sets: Sets to alternate between.
        num_frames: Number of frames drawn from each clip; None = all.
        max_frame_spacing: Largest step between them; None = as large as the clip allows.
        has_boxes: Whether samples hold `boxes`, those of the sprites, too.
    """

    def __init__(
        self,
        world: SpriteWorldConfig,
        sets: Sequence[SpriteSet],
        num_frames: int | None = None,
        max_frame_spacing: int | None = None,
        has_boxes: bool = False,
    ):
        self.datasets = [SpriteDataset(replace(world, kind=SpriteSet(kind)), 2**40, has_boxes) for kind in sets]
        self.seed = world.seed
        self.num_frames = world.num_frames if num_frames is None else num_frames
        self.max_frame_spacing = max_frame_spacing
        if not 1 <= self.num_frames <= world.num_frames:
            raise ValueError(f"num_frames must lie in 1..{world.num_frames}, the frames of a clip; got {num_frames}")

    def __getitem__(self, position: int) -> dict[str, Any]:
        turn, choice = divmod(position, len(self.datasets))
        data = self.datasets[choice]
        random = np.random.default_rng([self.seed, position])
        frames = sample_frames(data.config.num_frames, self.num_frames, random, self.max_frame_spacing)
        return {name: value[0] for name, value in data.batch([turn], frames).items()}


def sample_frames(
    available: int, wanted: int, random: np.random.Generator, max_spacing: int | None = None
) -> list[int]:
    """Indices of `wanted` evenly spaced frames out of `available`, with the spacing and the first index drawn."""
    widest = max(1, (available - 1) // max(1, wanted - 1))
    stride = int(random.integers(1, min(widest, max_spacing or widest) + 1))
    first = int(random.integers(available - stride * (wanted - 1)))
    return [first + stride * i for i in range(wanted)]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples stacked along a new first axis; texts become lists, and clips with fewer tracks get hidden ones added."""
    most = max(len(sample["points"]) for sample in samples)
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if name in ("points", "visible"):
            values = [_pad_tracks(value, most) for value in values]
        batch[name] = torch.stack(values) if isinstance(first, Tensor) else values
    return batch


def sample_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """A generator for each of `count` samples; sample p's depends on (seed, p) alone, not on process or batch."""
    keys = [np.random.SeedSequence((seed, first + i)).generate_state(1, np.uint64)[0] >> 1 for i in range(count)]
    return [torch.Generator().manual_seed(int(key)) for key in keys]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; on the way to a GPU through pinned memory, so that the CPU does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def send_clips(batches: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """The batches with their clips on a device; a GPU copies them beside the work that it was given before."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            sent = {name: send(batch[name], device) for name in _CLIPS if name in batch}
        step = torch.cuda.current_stream(device)
        step.wait_stream(copies)
        for tensor in sent.values():
            tensor.record_stream(step)  # Else its memory could be given away before the step has read it.
        yield {**batch, **sent}


def scale_pixels(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1], x / 127.5 - 1, on their device and to the same bits on each.

    Samples hold uint8, a quarter of the bytes that float32 takes in workers, shared memory and on the way to a GPU.

    Raises:
        ValueError: The pixels are not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, got {pixels.dtype}")
    divisor = torch.full((), 127.5, device=pixels.device)  # By a Python number, CUDA would multiply with its inverse.
    return pixels.float().div_(divisor).sub_(1.0)


def _pad_tracks(tracks: Tensor, count: int) -> Tensor:
    return torch.cat([tracks, tracks.new_zeros(count - len(tracks), *tracks.shape[1:])])
