"""When a drawn motion takes place: the frames of its start and end, its easing, or a time for each control point."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from imageconductor.conditioning.checks import check_number, suggest

Array = npt.NDArray[np.float64]

_EASINGS: Mapping[str, Callable[[Array], Array]] = {
    "linear": lambda u: u,
    "ease-in": lambda u: u**2,
    "ease-out": lambda u: 1 - (1 - u) ** 2,
    "ease-in-out": lambda u: u**2 * (3 - 2 * u),
}

_LEAST_FRAMES = 1e-3  # between two times: nearer ones are the same, but for rounding

EASINGS: tuple[str, ...] = tuple(_EASINGS)
"""Names of the easings: steady; from rest, steadily faster; steadily slower, to rest; from rest to rest."""


@dataclass(frozen=True)
class Timing:
    """When a motion takes place, in frames counted from 0; before and after it, what moves stands still.

    Attributes:
        start: frame of the first position; None = frame 0.
        end: frame of the last position; None = the last frame.
        easing: one of `EASINGS`: the part of the motion that is done, by the part of its time that has passed.
        times: the frame of each control point of a track, rising; in place of start, end and easing.

    Raises:
        ValueError: a value of a wrong kind, times that do not rise, an end that is not after the start, or times beside
            another setting; names the setting.
    """

    start: float | None = None
    end: float | None = None
    easing: str = "linear"
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if cast("object", self.easing) not in EASINGS:
            raise ValueError(
                f"easing must be one of {', '.join(EASINGS)}, got {self.easing!r}{suggest(self.easing, EASINGS)}"
            )
        for name in ("start", "end"):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name, minimum=0)
        if self.end is not None and (self.start or 0) > self.end - _LEAST_FRAMES:
            raise ValueError(f"end must be after start, got start {self.start or 0:g} and end {self.end:g}")
        if self.times is None:
            return
        if self.start is not None or self.end is not None or self.easing != "linear":
            raise ValueError("times say when each point is reached: leave start, end and easing out, or the times")
        if not isinstance(cast("object", self.times), tuple):
            raise ValueError(f"times must be a list of frames, one for each point, got {self.times!r}")
        for k, time in enumerate(self.times):
            check_number(time, f"times: number {k}", minimum=0)
            if k and time < self.times[k - 1] + _LEAST_FRAMES:
                raise ValueError(f"times must rise, got {time:g} after {self.times[k - 1]:g}")

    @property
    def is_default(self) -> bool:
        """Whether the motion goes steadily through the whole clip."""
        return self == STEADY

    def check_frames(self, num_frames: int) -> None:
        """Makes sure that the motion takes place within a clip of `num_frames` frames.

        Raises:
            ValueError: it does not; names the setting.
        """
        last = num_frames - 1
        named = {"start": self.start, "end": self.end, "times": None if self.times is None else max(self.times)}
        for name, frame in named.items():
            if frame is not None and frame > last:
                raise ValueError(
                    f"{name}: there is no frame {frame:g} in a clip of {num_frames} frames, the last is {last}; "
                    '"num_frames" of the file says of how many frames its clip is'
                )
        if self.start is not None and self.end is None and self.start > last - _LEAST_FRAMES:
            raise ValueError(f"start must be before the last frame, {last}, got {self.start:g}")

    def progress(self, num_frames: int, counted_in: int, returns: bool = False) -> Array:
        """The part of the motion that is done in each frame.

        Args:
            num_frames: T, frames of the video.
            counted_in: number of frames of the clip in which start and end are counted; both clips last equally long.
            returns: whether the motion goes back in the second half of its time.

        Returns:
            (T,) from 0 to 1.
        """
        if self.start is None and self.end is None:
            done = np.linspace(0, 1, num_frames)
        else:
            last = max(counted_in - 1, 1)
            start, end = (self.start or 0.0) / last, 1.0 if self.end is None else self.end / last
            done = _limit((clip_fractions(num_frames) - start) / (end - start), 0, 1)
        return _EASINGS[self.easing](1 - np.abs(2 * done - 1) if returns else done)

    def knots(self, num_points: int, num_frames: int, counted_in: int) -> tuple[Array, Array]:
        """Where the control points of a track stand on the axis of its curve, and where each frame does.

        Args:
            num_points: K, number of control points.
            num_frames: T, frames of the video.
            counted_in: as for `progress`.

        Returns:
            (K,) rising, and (T,) from the first of them to the last.
        """
        if self.times is None:
            return np.linspace(0, 1, num_points), self.progress(num_frames, counted_in)
        at = np.asarray(self.times, np.float64) / max(counted_in - 1, 1)
        return at, _limit(clip_fractions(num_frames), at[0], at[-1])


STEADY = Timing()
"""Steadily through the whole clip."""


def clip_fractions(num_frames: int) -> Array:
    """The part of the clip that has passed in each frame: (T,) from 0 to 1, equal for equal times of two clips."""
    return np.arange(num_frames) / max(num_frames - 1, 1)


def _limit(values: Array, lowest: float, highest: float) -> Array:
    return np.minimum(np.maximum(values, lowest), highest)
