"""Sizes and frames in which reference clips are trained, by the rules of MotionDirector's release, as pure functions.

Source: showlab/MotionDirector and ExponentialML/AnimateDiff-MotionDirector ("the port"), whose results on many inputs
are tests/data/parity_md/data_cases.json. Sizes are (W, H) in pixels, frames are numbers in the file from 0 on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class BucketRule:
    """What the shorter side of a clip that is not square may become.

    Attributes:
        steps: Differences in pixels from the same side of the target.
        minimum: Smallest side in pixels.
    """

    steps: tuple[int, ...]
    minimum: int


MOTION_DIRECTOR = BucketRule((64, 128), 192)
ANIMATEDIFF_PORT = BucketRule((16, 32, 64, 128, 192, 256), 256)


def choose_bucket(
    native: tuple[int, int], target: tuple[int, int], rule: BucketRule = MOTION_DIRECTOR
) -> tuple[int, int]:
    """The size that a release gives to clips of a size.

    The longer side of a clip becomes that side of the target; the shorter one becomes what `rule` allows that is
    nearest to the same side of the target divided by the clip's aspect ratio. Square clips get the target.

    Args:
        native: Of the clip.
        target: For square clips.
        rule: Of which release.

    Raises:
        ValueError: A side is not positive.
    """
    if min(*native, *target) < 1:
        raise ValueError(f"sides must be at least 1 px, got {native} and a target of {target}")
    (width, height), (target_w, target_h) = native, target
    if width == height:
        return target
    side = target_w if width < height else target_h
    wanted = side / (max(native) / min(native))
    allowed = [max(side - step, rule.minimum) for step in rule.steps]
    shorter = min(allowed, key=lambda other: abs(other - wanted))
    return (shorter, target_h) if width < height else (target_w, shorter)


def fit_bucket(native: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The target or its bucket, whichever keeps more of the frame when it is cropped to that aspect ratio.

    A bucket is the target only for square clips, and that of a wide target is wider still: 400x390 for 384x384 gives
    384x320, and 1280x720 for 576x320 gives 576x192, to which the releases squeeze the frames. Below 192 px, the
    smallest side of a bucket, it would be larger than the target, which small models are not made for: with a target
    of 128x128 or 64x64, that is the size of every clip.
    """
    bucket = choose_bucket(native, target)
    if bucket[0] > target[0] or bucket[1] > target[1]:
        return target
    return max((target, bucket), key=lambda size: _kept_fraction(native, size))


def _kept_fraction(native: tuple[int, int], size: tuple[int, int]) -> float:
    """The part of a frame's area that is left when it is cropped to the aspect ratio of `size`."""
    wider = native[0] * size[1] / (native[1] * size[0])
    return min(wider, 1 / wider)


def frame_stride(native_fps: float, fps: float) -> int:
    """Every how many frames of a video one is taken, for about `fps` frames per second.

    Raises:
        ValueError: `native_fps` is not a positive number.
    """
    if not 0 < native_fps < math.inf:
        raise ValueError(f"a frame rate must be positive, got {native_fps}")
    return max(1, round(native_fps / fps))


def spaced_frames(available: int, stride: int) -> range:
    """The frames that windows of a video in a folder are made of: one at the beginning of every full stride.

    Args:
        available: Number of frames in the file.
        stride: As from `frame_stride`; larger ones than the file are its length.
    """
    stride = max(1, min(available, stride))
    return range(0, available // stride * stride, stride)


def window_frames(frames: range, num_frames: int, random: Random) -> list[int]:
    """T consecutive ones of `frames` from a random start; all of them if they are fewer."""
    first = random.randint(0, max(0, len(frames) - num_frames))
    return list(frames[first : first + num_frames])


def chunk_frames(available: int, frame_step: int, num_frames: int, keeps_short: bool = False) -> list[range]:
    """Every `frame_step`-th frame of a video, in consecutive chunks of T.

    Args:
        available: Number of frames in the file.
        frame_step: 1 = every frame.
        num_frames: T.
        keeps_short: Whether a last chunk of fewer frames is kept, as MotionDirector does; the port drops it.
    """
    frames = range(0, available, frame_step)
    chunks = [frames[first : first + num_frames] for first in range(0, len(frames), num_frames)]
    return [chunk for chunk in chunks if keeps_short or len(chunk) == num_frames]


def listed_frames(available: int, start: int, frame_step: int, num_frames: int) -> range:
    """The frames of an entry in MotionDirector's JSON: T from `start` on, or as many as there are.

    Args:
        available: Number of frames in the file.
        start: Moved to the nearest frame of the file; at its end or behind it, no frame is left.
        frame_step: 1 = every frame.
        num_frames: T.
    """
    return range(min(max(start, 0), available), available, frame_step)[:num_frames]
