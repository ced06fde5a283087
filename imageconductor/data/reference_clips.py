"""Training samples of MotionDirector: latents of a few reference clips (`reference_files.py`), encoded once.

A clip is encoded frame by frame when training begins and kept in memory, so that each step draws a new window and new
posterior noise without decoding a video again. The release keeps one window and one noise of each clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from imageconductor.conditioning import load_image
from imageconductor.data.clips import crop_frames, tells_left_from_right
from imageconductor.data.reference_files import ReferenceClip
from imageconductor.data.videos import Video

EncodeFrames = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From frames (3, T, H, W) uint8 to mean and standard deviation (C, T, h, w) of their latents."""

_FRAMES_PER_CALL = 16


class ReferenceClips:
    """An endless sequence of samples that takes the clips in turn; call `encode` before drawing any.

    Sample p depends on the seed and p alone. Samples of clips of several sizes do not fit into one batch: take them
    one by one.

    Args:
        clips: From `find_reference_clips`.
        seed: Of windows and flips.
        horizontal_flip: Probability of mirroring a picture. Videos are never mirrored, which would turn their motion
            around, nor pictures whose captions tell left from right.

    Raises:
        ValueError: There are no clips.
    """

    def __init__(self, clips: Sequence[ReferenceClip], seed: int, horizontal_flip: float = 0.0):
        if not clips:
            raise ValueError("no reference clips were given")
        self.clips = list(clips)
        self.seed, self.horizontal_flip = seed, horizontal_flip
        self._encoded: list[tuple[Tensor, Tensor]] = []
        self._mirrored: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.clips)

    @torch.no_grad()
    def encode(self, encode_frames: EncodeFrames) -> None:
        """Encodes every frame that a window can hold, once, and pictures that may be mirrored a second time.

        Latents are kept as float32 on the CPU: at 384x384 and four channels, 74 kB a frame.

        Args:
            encode_frames: Called with at most 16 consecutive frames of a clip, in the clip's size.

        Raises:
            FileNotFoundError: A file is gone.
            ValueError: A frame cannot be decoded; names file and frame.
        """
        mirrors = [self.horizontal_flip > 0 and _may_be_mirrored(clip) for clip in self.clips]
        total = sum(len(clip.frames) for clip in self.clips) + sum(mirrors)
        encoded, mirrored = [], {}
        with tqdm(total=total, desc="reference clips", unit="frame", dynamic_ncols=True) as bar:
            for index, clip in enumerate(self.clips):
                encoded.append(_encode_parts(read_frames(clip), encode_frames, bar))
                if mirrors[index]:
                    parts = (pixels.flip(-1) for pixels in read_frames(clip))
                    mirrored[index] = _encode_parts(parts, encode_frames, bar)
        self._encoded, self._mirrored = encoded, mirrored

    def latents(self, clip_index: int, frames: Sequence[int], is_mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (C, T, h, w) float32, of latents as the autoencoder gives them.

        Args:
            clip_index: Number of the clip in `clips`.
            frames: T numbers of frames, as from its `draw_window`.
            is_mirrored: Those of the mirrored picture.

        Raises:
            RuntimeError: `encode` was not called.
        """
        if not self._encoded:
            raise RuntimeError("the reference clips must be encoded before they are used")
        mean, std = self._mirrored[clip_index] if is_mirrored else self._encoded[clip_index]
        clip = self.clips[clip_index]
        if clip.is_image:
            return mean.expand(-1, len(frames), -1, -1), std.expand(-1, len(frames), -1, -1)
        places = [clip.frames.index(frame) for frame in frames]
        return mean[:, places], std[:, places]

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The fields of a cached clip: latent_mean and latent_std (C, T, h, w), size, caption, key, and no tracks."""
        index = position % len(self.clips)
        clip, random = self.clips[index], Random(f"{self.seed}/{position}")
        frames = clip.draw_window(random)
        is_mirrored = index in self._mirrored and random.random() < self.horizontal_flip
        mean, std = self.latents(index, frames, is_mirrored)
        return {
            "latent_mean": mean,
            "latent_std": std,
            "size": torch.tensor(clip.size),
            "points": torch.zeros(0, clip.num_frames, 2),
            "visible": torch.zeros(0, clip.num_frames, dtype=torch.bool),
            "caption": clip.caption,
            "key": clip.key,
            "skipped": [],
        }


def read_frames(clip: ReferenceClip) -> Iterator[Tensor]:
    """The frames that windows of a clip can hold, in order and 16 at a time: (3, T, H, W) uint8, cropped to its size.

    They have the clip's order of colours.

    Raises:
        FileNotFoundError: The file is gone.
        ValueError: A frame cannot be decoded.
    """
    if not clip.path.is_file():
        raise FileNotFoundError(f"the reference clip {clip.path} is gone")
    if clip.is_image:
        yield crop_frames(np.array(load_image(clip.path))[None], clip.size)[list(clip.channels)]
        return
    video = Video(clip.path, str(clip.path))
    for first in range(0, len(clip.frames), _FRAMES_PER_CALL):
        frames = video.frames(clip.frames[first : first + _FRAMES_PER_CALL])
        yield crop_frames(frames, clip.size)[list(clip.channels)]


def _may_be_mirrored(clip: ReferenceClip) -> bool:
    return clip.is_image and not tells_left_from_right(clip.caption)


def _encode_parts(parts: Iterable[Tensor], encode_frames: EncodeFrames, bar: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of consecutive parts of a clip as one."""
    means, stds = [], []
    for pixels in parts:
        mean, std = encode_frames(pixels)
        means.append(mean.float().cpu())
        stds.append(std.float().cpu())
        bar.update(pixels.shape[1])
    return torch.cat(means, dim=1), torch.cat(stds, dim=1)
