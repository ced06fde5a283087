"""How well a video follows boxes: AO, SR50 and SR75 as the GOT-10k toolkit defines them, and trackers of a box.

A tracker that starts on the requested box of frame 0 says where the object is in each later frame. AO is the mean
overlap (IoU) with the requested boxes, SR50 and SR75 the fractions of frames whose overlap is above 0.5 and 0.75.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from imageconductor.data.trackers import LucasKanadeTracker
from imageconductor.evaluation.statistics import Figure, summarise, summarise_differences

BoxRows = NDArray[np.floating]  # (T, 4) xyxy, pixels from the frame's left and top edge
_Rows = Sequence[Sequence[float] | NDArray[np.floating]]  # overlaps of each object of a clip


_SUCCESS = {"ao": None, "sr50": 0.5, "sr75": 0.75}  # metric -> overlap above which a frame counts; None = the overlap


def box_iou(first: BoxRows, second: BoxRows, size: tuple[int, int] | None = None) -> NDArray[np.float64]:
    """Overlap of boxes (T, 4) with those of another row (T, 4): area of the intersection over that of the union, (T,).

    Args:
        first: xyxy.
        second: xyxy.
        size: (W, H) of the frame to which both are brought first; None = they stay.

    Raises:
        ValueError: The shapes differ.

    Source: got10k toolkit, `rect_iou`. It brings a box into the frame by moving its corner there, whereby the box keeps
    its sides as far as they have room, and scores are comparable only in this way.
    """
    if first.shape != second.shape or first.shape[-1:] != (4,):
        raise ValueError(f"boxes must be (T, 4) each, got {first.shape} and {second.shape}")
    a, b = (np.asarray(boxes, np.float64) for boxes in (first, second))
    if size is not None:
        a, b = _bring_inside(a, size), _bring_inside(b, size)
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    common = np.maximum(sides, 0).prod(axis=1)
    union = sum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)) - common
    return np.divide(common, union, out=np.zeros(len(a)), where=union > 0)


def _bring_inside(xyxy: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    corner = np.clip(xyxy[:, :2], 0, size)
    sides = np.clip(xyxy[:, 2:] - xyxy[:, :2], 0, np.asarray(size) - corner)
    return np.concatenate([corner, corner + sides], axis=1)


def overlaps(
    requested: BoxRows, tracked: BoxRows, present: NDArray[np.bool_], size: tuple[int, int]
) -> NDArray[np.float64]:
    """Overlaps in the frames that count: all in which the object is present, but frame 0, where the tracker starts.

    Args:
        requested: (T, 4) xyxy.
        tracked: (T, 4) xyxy.
        present: (T,), whether the object is there.
        size: (W, H) of the frame.
    """
    return box_iou(requested, tracked, size)[1:][np.asarray(present, bool)[1:]]


def summarise_overlaps(
    clips: Sequence[_Rows], sources: Sequence[str], baseline: Sequence[_Rows] | None = None
) -> dict[str, Figure]:
    """AO, SR50 and SR75 over the frames of all clips together, each frame counting alike, whatever its clip's length.

    Args:
        clips: Of each clip, the `overlaps` of each of its objects.
        sources: Name of each clip; intervals draw these.
        baseline: Overlaps of the same frames; then the differences to them are summarised.

    Returns:
        By "ao", "sr50" and "sr75"; a frame whose overlap equals the threshold is no success.
    """
    names = [source for source, rows in zip(sources, clips, strict=True) for row in rows for _ in row]
    found = {}
    for metric, threshold in _SUCCESS.items():
        values = _score_frames(clips, threshold)
        if baseline is None:
            found[metric] = summarise(values, names)
        else:
            found[metric] = summarise_differences(values, _score_frames(baseline, threshold), names)
    return found


def _score_frames(clips: Sequence[_Rows], threshold: float | None) -> list[float]:
    ious = [float(value) for rows in clips for row in rows for value in row]
    return ious if threshold is None else [float(value > threshold) for value in ious]


class BoxTracker(Protocol):
    """Tracks a box of frame 0 through a video."""

    name: str
    version: str

    def track(self, frames: NDArray[np.uint8], box: NDArray[np.floating]) -> NDArray[np.float64]:
        """The box in every frame, (T, 4) xyxy; where it is lost it stays where it was.

        Args:
            frames: (T, H, W, 3).
            box: (4,) xyxy of frame 0.
        """
        ...


class OpenCvBoxTracker:
    """One of OpenCV's single-object trackers that need no weights.

    `csrt`, which also follows an object's size, is in opencv-contrib-python alone; `mil` is in every build and keeps
    the size of the first box.

    Args:
        kind: "csrt" or "mil".
        min_side_px: Videos whose shorter side is smaller are enlarged to at least this.

    Raises:
        ValueError: OpenCV has no such tracker.
    """

    def __init__(self, kind: str, min_side_px: int = 256):
        if kind not in _FACTORIES:
            raise ValueError(f"there is no OpenCV tracker {kind!r} here, only {', '.join(_FACTORIES)}")
        self._create = _find_factory(_FACTORIES[kind])
        if self._create is None:
            raise ValueError(
                f"OpenCV {cv2.__version__} has no tracker {kind}; install opencv-contrib-python-headless in place of "
                f"opencv-python-headless, or use {' or '.join(sorted(BOX_TRACKERS - {kind}))}"
            )
        self.name = f"opencv-{kind}"
        self.version = f"{cv2.__version__}, enlarged to {min_side_px} px"
        self.min_side_px = min_side_px

    def track(self, frames: NDArray[np.uint8], box: NDArray[np.floating]) -> NDArray[np.float64]:
        """As `BoxTracker.track`."""
        factor = max(1, -(-self.min_side_px // min(frames.shape[1:3])))
        size = (frames.shape[2] * factor, frames.shape[1] * factor)
        large = [cv2.resize(frame[..., ::-1], size, interpolation=cv2.INTER_CUBIC) for frame in frames]
        found = np.repeat(np.asarray(box, np.float64)[None], len(frames), axis=0)
        start = np.round(found[0] * factor).astype(int)
        width, height = np.maximum(start[2:] - start[:2], 1)
        assert self._create is not None
        tracker = self._create()
        tracker.init(large[0], (int(start[0]), int(start[1]), int(width), int(height)))
        for t in range(1, len(frames)):
            is_found, (x, y, w, h) = tracker.update(large[t])
            found[t] = np.asarray([x, y, x + w, y + h], np.float64) / factor if is_found else found[t - 1]
        return found


class MedianFlowBoxTracker:
    """Points inside the box are tracked, and the box moves and grows as most of them do; needs no weights.

    A grid of points in the middle of the box is followed by pyramidal Lucas-Kanade. The box is moved by the median of
    their displacements and scaled by the median of the ratios of their distances. On 32 sprites of 64x64 clips of the
    sprite world, with a moving camera, it scores AO 0.899 and SR50 1.0 against the exact boxes, and `mil`
    0.846 and 0.985; the box of frame 0 kept scores 0.370 and 0.313.

    Args:
        grid: Points along each side.
        inner: Part of the box's sides that the grid covers: its corners show what is behind the object.
        window_px: Of `LucasKanadeTracker`; in larger windows points move together, and growth is underestimated.

    Source: Kalal et al., "Forward-Backward Error", 2010, with all frames related to the first.
    """

    name = "opencv-median-flow"

    def __init__(self, grid: int = 9, inner: float = 0.8, window_px: int = 31):
        self.points = LucasKanadeTracker(window_px=window_px)
        self.grid, self.inner = grid, inner
        self.version = f"{self.points.version}, grid {grid} in {inner:g} of the box"

    def track(self, frames: NDArray[np.uint8], box: NDArray[np.floating]) -> NDArray[np.float64]:
        """As `BoxTracker.track`."""
        box = np.asarray(box, np.float64)
        centre, sides = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        steps = ((np.arange(self.grid) + 0.5) / self.grid - 0.5) * self.inner
        offsets = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2) * sides
        tracks, followed = self.points.track(frames, centre + offsets - 0.5)  # pixels count from centres
        tracks = tracks + 0.5
        found = np.repeat(box[None], len(frames), axis=0)
        for t in range(1, len(frames)):
            here = followed[:, t]
            if here.sum() < 4:
                found[t] = found[t - 1]
                continue
            before, after = offsets[here], tracks[here, t]
            scale = _median_scale(before, after)
            middle = np.median(after - scale * before, axis=0)
            found[t] = np.concatenate([middle - scale * sides / 2, middle + scale * sides / 2])
        return found


def _median_scale(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    """Median ratio of the distances between points after and before."""
    first, second = np.triu_indices(len(before), 1)
    old = np.linalg.norm(before[first] - before[second], axis=1)
    new = np.linalg.norm(after[first] - after[second], axis=1)
    return float(np.median(new / old))


_FACTORIES = {
    "csrt": ("TrackerCSRT_create", "legacy.TrackerCSRT_create"),
    "mil": ("TrackerMIL_create",),
}
BOX_TRACKERS = frozenset({"median-flow", *_FACTORIES})
"""Names that `build_box_tracker` knows."""


def build_box_tracker(name: str = "median-flow") -> BoxTracker:
    """A tracker by name.

    Raises:
        ValueError: There is none of this name, or OpenCV lacks it.
    """
    if name not in BOX_TRACKERS:
        raise ValueError(f"there is no box tracker {name!r}, only {', '.join(sorted(BOX_TRACKERS))}")
    return MedianFlowBoxTracker() if name == "median-flow" else OpenCvBoxTracker(name)


def _find_factory(names: Sequence[str]) -> Callable[[], Any] | None:
    for name in names:
        module, _, function = name.rpartition(".")
        owner: Any = getattr(cv2, module, None) if module else cv2
        if hasattr(owner, function):
            return getattr(owner, function)
    return None
