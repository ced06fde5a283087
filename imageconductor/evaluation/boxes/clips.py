"""Clips with boxes that an evaluation asks for again: their first frames, captions, boxes and true frames."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imageconductor.conditioning import Boxes, cover_crop
from imageconductor.data.box_datasets import find_got10k, read_got10k, read_youtube_vis
from imageconductor.data.box_samples import keep_largest
from imageconductor.data.scenes import Scene, render
from imageconductor.data.sprites import sample_scene
from imageconductor.evaluation.boxes.config import BoxEvaluateConfig

_SPRITE_SEED, _SPRITE_CLIPS = 10_000, 64  # added to a world's seed, as in the evaluation of drawn motion


class TrueClip(Protocol):
    """A clip with boxes: `data.box_datasets.BoxClip`, or one of the sprite world."""

    @property
    def key(self) -> str:
        """Name of the clip."""
        ...

    @property
    def caption(self) -> str:
        """What it shows."""
        ...

    @property
    def boxes(self) -> Boxes:
        """Of its objects, in each frame."""
        ...

    def frames(self, chosen: Sequence[int]) -> NDArray[np.uint8]:
        """Some of the frames (T, H, W, 3)."""
        ...


@dataclass(frozen=True, eq=False)
class SpriteClip:
    """A clip of the sprite world, rendered when its frames are asked for."""

    key: str
    caption: str
    boxes: Boxes
    scene: Scene

    def frames(self, chosen: Sequence[int]) -> NDArray[np.uint8]:
        """Some of the frames (T, H, W, 3)."""
        return render([self.scene], list(chosen))[0].permute(1, 2, 3, 0).numpy()


@dataclass(frozen=True, eq=False)
class BoxRequest:
    """What the methods are given of a clip.

    Attributes:
        key: Name of the clip and of its files.
        prompt: Its caption.
        seed: Of the video's noise.
        boxes: Of T frames, in pixels of the video; each object is in frame 0, where its tracker starts. They are what
            all methods are asked for and judged by.
        clip: Where the true frames come from.
        chosen: Numbers of the clip's frames that are asked for.
        size: (W, H) of the video.
    """

    key: str
    prompt: str
    seed: int
    boxes: Boxes
    clip: TrueClip
    chosen: range
    size: tuple[int, int]

    @cached_property
    def sha256(self) -> str:
        """Of all that a video is made of and judged by, hexadecimal: prompt, boxes and first frame."""
        boxes = [list(self.boxes.names), self.boxes.xyxy.tolist(), self.boxes.present.tolist()]
        digest = hashlib.sha256(json.dumps([self.prompt, boxes]).encode())
        digest.update(self.read_frames(1).tobytes())
        return digest.hexdigest()

    def read_frames(self, count: int | None = None) -> NDArray[np.uint8]:
        """The true frames (T, H, W, 3), or the first `count` of them, cropped to the video's size."""
        frames = self.clip.frames(self.chosen[:count])
        return np.stack([np.asarray(cover_crop(Image.fromarray(frame), self.size)) for frame in frames])


def list_requests(
    config: BoxEvaluateConfig, size: tuple[int, int], num_frames: int, max_objects: int | None = None
) -> list[BoxRequest]:
    """The requests of an evaluation, of clips that are long enough and begin with an object.

    Args:
        config: Settings of the evaluation.
        size: (W, H) of the videos.
        num_frames: T of the videos.
        max_objects: Objects of a clip that are asked for, the largest ones, as in training; None = all.

    Raises:
        FileNotFoundError: There is no such data set.
        ValueError: A file of it is malformed, or no clip serves.
    """
    span = (num_frames - 1) * config.frame_step + 1
    found: list[BoxRequest] = []
    for clip in _list_clips(config, size, span):
        if len(found) == config.num_clips:
            break
        chosen = range(0, span, config.frame_step)
        boxes = clip.boxes.at_frames(chosen).cover_crop(size)
        boxes = boxes.select([n for n in range(boxes.num_objects) if boxes.present[n, 0]])
        boxes = boxes if max_objects is None else keep_largest(boxes, max_objects)
        if boxes.num_objects:
            seed = config.seed + len(found)
            found.append(BoxRequest(clip.key, clip.caption, seed, boxes, clip, chosen, size))
    if not found:
        raise ValueError(f"{config.data}: no clip of {config.dataset} has {span} frames and an object in the first one")
    return found


def _list_clips(config: BoxEvaluateConfig, size: tuple[int, int], min_frames: int) -> Iterator[TrueClip]:
    root = Path(config.data or "")
    if config.dataset == "sprites":
        world = replace(config.world, size=size, seed=config.world.seed + _SPRITE_SEED, num_frames=min_frames)
        for index in range(config.num_clips or _SPRITE_CLIPS):
            scene = sample_scene(world, index)
            yield SpriteClip(f"{world.kind.value}-{index:04d}", scene.caption, scene.boxes(), scene)
    elif config.dataset == "got10k":
        yield from map(read_got10k, find_got10k(root, config.split, min_frames))
    else:
        yield from read_youtube_vis(root, config.split, captions=config.captions, min_frames=min_frames)
