"""Finds the cuts of footage, the longest scene, and the frames of it that become a clip."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.footage import Picture, Rejected

_MIN_SCENE_FRAMES = 2
_PADDING = 2  # AdaptiveDetector compares a frame with the two before and the two after it.
_RATE = 25.0  # PySceneDetect demands a frame rate; its detectors use frame numbers alone.


class Scene(NamedTuple):
    """Frames first..last of the footage, both inclusive."""

    first: int
    last: int

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return self.last - self.first + 1


def find_scenes(pictures: Iterable[Picture], config: CurateConfig) -> list[Scene]:
    """The scenes between the cuts that PySceneDetect finds.

    Args:
        pictures: All frames, reduced in size: (H, W, 3) RGB.
        config: `cut_detector` and `cut_threshold` are used.
    """
    from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode

    threshold = config.cut_threshold
    detector: Any
    if config.cut_detector == "adaptive":
        detector = AdaptiveDetector(
            adaptive_threshold=3.0 if threshold is None else threshold, min_scene_len=_MIN_SCENE_FRAMES
        )
    else:
        detector = ContentDetector(27.0 if threshold is None else threshold, min_scene_len=_MIN_SCENE_FRAMES)
    cuts: list[int] = []
    number, time = 0, FrameTimecode(0, _RATE)
    for number, picture in enumerate(_pad(pictures)):
        time = FrameTimecode(number, _RATE)
        cuts += [cut.frame_num for cut in detector.process_frame(time, np.ascontiguousarray(picture[..., ::-1]))]
    cuts += [cut.frame_num for cut in detector.post_process(time)]
    count = max(number + 1 - 2 * _PADDING, 0)
    starts = [0, *sorted({cut - _PADDING for cut in cuts if 0 < cut - _PADDING < count})]
    return [Scene(first, after - 1) for first, after in zip(starts, [*starts[1:], count], strict=True)]


def _pad(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """The pictures, with the first and the last repeated, so that cuts beside them are found as others are."""
    last: Picture | None = None
    for picture in pictures:
        if last is None:
            yield from itertools.repeat(picture, _PADDING)
        yield (last := picture)
    if last is not None:
        yield from itertools.repeat(last, _PADDING)


def find_longest(scenes: Sequence[Scene]) -> Scene:
    """The longest scene (section 2.2); of equally long ones, the first."""
    return max(scenes, key=lambda scene: scene.num_frames)


def frame_duration(times: Sequence[float] | NDArray[np.float64]) -> float:
    """Seconds from a frame to the next: the mean of the usual steps.

    Containers such as Matroska and WebM round times to milliseconds. Of 30 frames a second steps are then 33, 33 and
    34 ms, and their median would be off by a frame after a hundred.
    """
    steps = np.diff(np.asarray(times))
    middle = np.quantile(steps, 0.5, method="lower")  # a step that occurs, also where half of them take longer
    return float(steps[np.abs(steps - middle) <= middle / 2].mean())


def choose_frames(times: Sequence[float], config: CurateConfig, random: np.random.Generator) -> tuple[list[int], int]:
    """The frames of a scene that become the clip, and the interval between them in source frames.

    The interval is drawn from 1..`max_interval`, as far as the length of the scene allows. Steps are equal in time: of
    footage with a variable frame rate, the frames nearest to the wanted times are taken.

    Args:
        times: Times of the scene's frames in seconds.
        config: `num_frames` and `max_interval` are used.
        random: Draws the interval and the first frame.

    Raises:
        Rejected: The scene is too short, or its frame rate too uneven.
    """
    seconds = np.asarray(times)
    if len(seconds) < config.num_frames:
        raise Rejected("too short", f"the longest scene has {len(seconds)} frames, {config.num_frames} are needed")
    step = frame_duration(seconds)
    available = round((seconds[-1] - seconds[0]) / step) + 1
    needed = config.num_frames - 1
    interval = int(random.integers(1, max(1, min(config.max_interval, (available - 1) // needed)) + 1))
    first = int(random.integers(0, max(1, available - interval * needed)))
    wanted = seconds[0] + step * (first + interval * np.arange(config.num_frames))
    right = np.searchsorted(seconds, wanted).clip(1, len(seconds) - 1)
    chosen = right - (wanted - seconds[right - 1] < seconds[right] - wanted)
    if (np.diff(chosen) < 1).any():
        raise Rejected("uneven frame rate", f"frames last up to {np.diff(seconds).max():.2f} s, most {step:.3f} s")
    return [int(number) for number in chosen], interval
