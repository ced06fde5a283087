"""Motion fidelity: how alike two videos move, whatever they show and wherever in the frame it moves.

A grid of points is tracked through both videos, and the two unordered sets of tracks are compared by the directions of
their displacements.

Source: Yatim et al., "Space-Time Diffusion Features for Zero-Shot Text-Driven Motion Transfer" (2023), section on
motion fidelity. Two things differ. The published similarity of two tracks is the mean over steps of the cosine of the
two displacements, so a step of tracking noise counts as much as a large one, and a step without motion has no
direction; here it is the cosine of all displacements together, in which a step counts by its length. And tracks that
stand still are left out, for they have no direction at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from imageconductor.data.trackers import Tracker

ReferenceChoice = Literal["best", "mean"]

_COMMON_FRACTION = 0.5  # of the steps of a video, in which a track, or both tracks of a pair, must have been followed


@dataclass(frozen=True)
class TrackSet:
    """Points of a video's first frame, tracked.

    Attributes:
        points: (N, T, 2) xy pixels.
        followed: (N, T) bool, whether the tracker could follow a point to that frame.
        size: (W, H) of the video in pixels.
    """

    points: NDArray[np.float64]
    followed: NDArray[np.bool_]
    size: tuple[int, int]

    @property
    def steps(self) -> NDArray[np.float64]:
        """(N, T-1, 2) displacements from frame to frame, in units of the frame's diagonal; 0 where they are unknown."""
        steps = np.diff(self.points, axis=1) / np.hypot(*self.size)
        return np.where(self.known[..., None], steps, 0.0)

    @property
    def known(self) -> NDArray[np.bool_]:
        """(N, T-1) bool, whether a point was followed in both frames of a step."""
        seen = self.followed & np.isfinite(self.points).all(axis=-1)
        return seen[:, 1:] & seen[:, :-1]

    @property
    def tracked_fraction(self) -> float:
        """Fraction of the steps that are known; NaN if there are none."""
        return float(self.known.mean()) if self.known.size else float("nan")

    def moving(self, still_fraction: float) -> NDArray[np.bool_]:
        """(N,) bool, whether a track was followed in half of the steps and gets away from its start.

        Args:
            still_fraction: Fraction of the frame's diagonal; a track whose largest distance from its start is not
                above it stands still.
        """
        seen = self.followed & np.isfinite(self.points).all(axis=-1)
        distances = np.linalg.norm(self.points - self.points[:, :1], axis=-1) / np.hypot(*self.size)
        reach = np.where(seen, distances, 0.0).max(axis=1, initial=0.0)
        return (reach > still_fraction) & (self.known.mean(axis=1) >= _COMMON_FRACTION)


def track_grid(frames: NDArray[np.uint8], tracker: Tracker, side: int = 10) -> TrackSet:
    """Tracks of the centres of side x side equal cells of the first frame.

    Args:
        frames: (T, H, W, 3), at least two.
        tracker: Of `data.trackers`.
        side: Points along each side.
    """
    height, width = frames.shape[1:3]
    xs, ys = ((np.arange(side) + 0.5) / side * length - 0.5 for length in (width, height))
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    points, followed = tracker.track(frames, grid)
    return TrackSet(points, followed, (width, height))


def track_similarities(reference: TrackSet, result: TrackSet) -> NDArray[np.float64]:
    """Cosines in [-1, 1] of the displacements of every two tracks, over the steps in which both were followed.

    Returns:
        (N, M); NaN where two tracks have less than half of the steps in common, or one of them does not move there.

    Raises:
        ValueError: The videos differ in their number of frames; take windows of the same length and frame rate.
    """
    if reference.points.shape[1] != result.points.shape[1]:
        counts = f"{reference.points.shape[1]} and {result.points.shape[1]}"
        raise ValueError(f"motions of {counts} frames cannot be compared step by step; take windows of one length")
    ours, theirs = reference.steps, result.steps
    known, known_too = reference.known.astype(np.float64), result.known.astype(np.float64)
    # Unknown steps are 0, so each sum is over the steps that both tracks have.
    dots = np.einsum("ntc,mtc->nm", ours, theirs)
    squares = np.einsum("nt,mt->nm", (ours**2).sum(-1), known_too) * np.einsum("nt,mt->nm", known, (theirs**2).sum(-1))
    enough = known @ known_too.T >= _COMMON_FRACTION * known.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = dots / np.sqrt(squares)
    return np.where(enough & (squares > 0), np.clip(cosines, -1, 1), np.nan)


def motion_fidelity(reference: TrackSet, result: TrackSet, still_fraction: float = 0.01) -> float:
    """For each moving track of one video the best cosine with one of the other's, in [-1, 1].

    The mean over the reference's tracks says whether its motions are there, that over the result's whether there are
    others; both count by half. Where in the frame, how far and how much of the frame moves plays no part.

    Args:
        reference: Tracks of the video whose motion is wanted.
        result: Tracks of the video that is judged, over as many frames.
        still_fraction: Fraction of the frame's diagonal that a track must get away from its start to be compared.

    Returns:
        0 if nothing in the result moves, or can be followed; NaN if nothing in the reference does.

    Raises:
        ValueError: As `track_similarities`.
    """
    similarities = track_similarities(reference, result)
    similarities = similarities[reference.moving(still_fraction)][:, result.moving(still_fraction)]
    if not similarities.shape[0]:
        return float("nan")
    if not np.isfinite(similarities).any():
        return 0.0
    return float((_mean_of_best(similarities) + _mean_of_best(similarities.T)) / 2)


def fidelity_to_references(
    references: Sequence[TrackSet], result: TrackSet, choice: ReferenceChoice = "best", still_fraction: float = 0.01
) -> float:
    """Motion fidelity to one of several references, or to all of them.

    Args:
        references: Clips of one motion; those that stand still do not count.
        result: As in `motion_fidelity`.
        choice: "best": a video that moves as one of the clips does is what was asked for, and the differences between
            the clips do not lower its score. It rises with the number of clips, so it compares methods, not motions.
            "mean": over the clips, whose likeness to each other then bounds the score.
        still_fraction: As in `motion_fidelity`.

    Returns:
        NaN if nothing moves in any reference.
    """
    values = np.array([motion_fidelity(reference, result, still_fraction) for reference in references])
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan")
    return float(values.max() if choice == "best" else values.mean())


def displacement_cosine(reference: NDArray[np.floating], result: NDArray[np.floating]) -> float:
    """Cosine in [-1, 1] of all displacements of two paths together, each step counting by its length.

    Args:
        reference: (T, 2) xy positions, in any unit; NaN where unknown.
        result: (T, 2) xy positions, in any unit with the same axes; NaN where unknown.

    Returns:
        Over the steps that both paths have. 0 if the result stands still there; NaN if the reference does, or there is
        no such step.

    Raises:
        ValueError: The paths differ in their number of points.
    """
    ours, theirs = (np.asarray(path, np.float64) for path in (reference, result))
    if ours.shape != theirs.shape or ours.ndim != 2 or ours.shape[1] != 2:
        raise ValueError(f"paths must be (T, 2) and of the same length, got {ours.shape} and {theirs.shape}")
    steps, other = np.diff(ours, axis=0), np.diff(theirs, axis=0)
    known = np.isfinite(steps).all(axis=1) & np.isfinite(other).all(axis=1)
    steps, other = steps[known], other[known]
    length, other_length = np.linalg.norm(steps), np.linalg.norm(other)
    if length == 0:
        return float("nan")
    return float(np.clip((steps * other).sum() / (length * other_length), -1, 1)) if other_length > 0 else 0.0


def _mean_of_best(similarities: NDArray[np.float64]) -> float:
    """Mean over rows of each row's largest value; rows without one are left out."""
    rows = similarities[np.isfinite(similarities).any(axis=1)]
    return float(np.nanmax(rows, axis=1).mean())
