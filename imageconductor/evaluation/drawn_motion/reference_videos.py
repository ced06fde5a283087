"""The videos that Fréchet distances compare with: a folder of footage, or clips of the sprite world."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imageconductor.conditioning import cover_crop
from imageconductor.data.sprite_world import SpriteSet
from imageconductor.data.sprites import sample_scene
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.drawn_motion.requests import build_world, render_frames

logger = logging.getLogger(__name__)


def list_reference_files(config: EvaluateConfig) -> list[Path]:
    """`num_reference` of the mp4 files below the folder `reference`, in the order of their names.

    They are those whose names within the folder have the smallest hashes: a draw at random, since the beginning of a
    folder may be of one kind, which is the same everywhere. Links to folders are followed. What the folder holds is
    looked up once: it may be large, and grow meanwhile.

    Raises:
        FileNotFoundError: There is none.
    """
    return list(_draw_files(config.reference or "", config.num_reference))


def forget_reference_files() -> None:
    """Lets the next evaluation of this process look into its folder."""
    _draw_files.cache_clear()


@lru_cache
def _draw_files(reference: str, count: int) -> tuple[Path, ...]:
    walk = os.walk(reference, followlinks=True)
    paths = [Path(folder, name) for folder, _, names in walk for name in names if name.lower().endswith(".mp4")]
    if not paths:
        raise FileNotFoundError(f"reference: no mp4 file in {reference}")
    drawn = sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(reference).as_posix().encode()).digest())
    return tuple(sorted(drawn[:count]))


def count_references(config: EvaluateConfig) -> int:
    """Number of reference videos."""
    return config.num_reference if config.reference is None else len(list_reference_files(config))


def read_references(
    config: EvaluateConfig, size: tuple[int, int], num_frames: int, numbers: Sequence[int]
) -> Iterator[NDArray[np.uint8]]:
    """Reference videos (T, H, W, 3), one at a time; no request shows a clip of the sprite world that is among them.

    Files that are too short are left out, with a warning.

    Args:
        config: Settings of the evaluation.
        size: (W, H).
        num_frames: T.
        numbers: Which of the reference videos.
    """
    if config.reference is not None:
        paths = list_reference_files(config)
        for path in (paths[number] for number in numbers):
            frames = _read_footage(path, size, num_frames, config.reference_stride)
            if len(frames) == num_frames:
                yield frames
            else:
                logger.warning("reference: %s is left out: %d of %d frames", path, len(frames), num_frames)
        return
    world = build_world(config, SpriteSet.MIXED, size, num_frames, seed=config.world_seed + 1)
    for number in numbers:
        yield render_frames(sample_scene(world, number))


def _read_footage(path: Path, size: tuple[int, int], num_frames: int, stride: int) -> NDArray[np.uint8]:
    """The first frames of a file, every `stride`-th, as many as it has, cropped about their centre to a `size`."""
    needed = (num_frames - 1) * stride + 1
    frames = list(islice(iio.imiter(path, plugin="FFMPEG"), needed))[::stride]
    return np.stack([np.asarray(cover_crop(Image.fromarray(frame), size)) for frame in frames])
