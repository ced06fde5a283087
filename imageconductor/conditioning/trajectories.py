"""Trajectories: one point per track and frame, and their resizing, cropping and mirroring with the picture.

Pixel convention. (0, 0) is the centre of the top-left pixel, so a picture W pixels wide extends from -0.5 to W - 0.5
and a resize by s maps x to (x + 0.5) * s - 0.5. The published release, however, draws at the *truncated* pixel and
accepts 0 <= x < W, and so do we. At the border the two differ by half a pixel, so the operations below move points that
are still in the picture back into [0, W), by at most half a pixel of the coarser of the two pictures.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from imageconductor.conditioning.first_frame import cover_scale
from imageconductor.conditioning.trajectory_json import (
    Track,
    check_size,
    check_tracks,
    read_trajectory_json,
    write_trajectory_json,
)

MAX_TRACKS = 256
"""Number of tracks in a clip record; a drawing with more is taken for a mistake."""

_INSIDE_PX = 1 / 64  # Border points are moved this far below W, which is exact in float32 too.


def inside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether each point (..., 2) has 0 <= x < W and 0 <= y < H: (...) bool, False for NaN."""
    return ((points >= 0) & (points < points.new_tensor(size))).all(-1)


@dataclass(frozen=True, eq=False)
class Trajectories:
    """N tracks over T frames of one clip.

    Points of presets and tracked clips may leave the frame or be hidden; such steps are not drawn.

    Attributes:
        points: (N, T, 2) float64, xy in pixels of `size`; (0, 0) is the centre of the top-left pixel.
        visible: (N, T) bool.
        size: (W, H) of the frame that `points` refer to.
        still: (N,) bool, tracks drawn as a single point, which means "hold still"; None = no track.

    Raises:
        ValueError: shapes that do not fit together, or an invalid size.
    """

    points: Tensor
    visible: Tensor
    size: tuple[int, int]
    still: Tensor = field(default=cast("Tensor", None))  # Replaced in __post_init__: its length is not known here.

    def __post_init__(self) -> None:
        if self.points.ndim != 3 or self.points.shape[-1] != 2 or self.points.shape[1] < 1:
            raise ValueError(f"points must be (N, T, 2) with T >= 1, got {tuple(self.points.shape)}")
        if self.visible.shape != self.points.shape[:2] or self.visible.dtype != torch.bool:
            raise ValueError(
                f"visible must be bool {tuple(self.points.shape[:2])} as points are, "
                f"got {self.visible.dtype} {tuple(self.visible.shape)}"
            )
        still = cast("Tensor | None", self.still)
        if still is None:
            still = torch.zeros(self.num_tracks, dtype=torch.bool, device=self.points.device)
        if still.shape != (self.num_tracks,) or still.dtype != torch.bool:
            raise ValueError(f"still must be bool ({self.num_tracks},), got {still.dtype} {tuple(still.shape)}")
        object.__setattr__(self, "points", self.points.double())
        object.__setattr__(self, "size", check_size(self.size))
        object.__setattr__(self, "still", still)

    @property
    def num_tracks(self) -> int:
        """Number of tracks, N."""
        return self.points.shape[0]

    @property
    def num_frames(self) -> int:
        """Number of frames, T."""
        return self.points.shape[1]

    @classmethod
    def from_tracks(
        cls,
        tracks: Sequence[Sequence[Sequence[float]]],
        size: tuple[int, int],
        num_frames: int,
        *,
        source: str = "tracks",
        max_tracks: int = MAX_TRACKS,
    ) -> "Trajectories":
        """Tracks of control points, interpolated to `num_frames` points each.

        The interpolation is PCHIP over a parameter that is uniform per control point, not per arc length, as in the
        published release. A single point holds still.

        Args:
            tracks: list of tracks, each a list of [x, y] pixels of `size`.
            size: (W, H).
            num_frames: T.
            source: name at the start of messages.
            max_tracks: largest number of tracks accepted.

        Raises:
            ValueError: a control point that is malformed, not finite or outside the frame, an empty track, too many
                tracks or a wrong size; names source, track and point.
        """
        size = check_size(size, source)
        return cls._interpolate(check_tracks(tracks, size, max_tracks, source), size, num_frames)

    @classmethod
    def load(
        cls,
        path: str | Path,
        num_frames: int,
        size: tuple[int, int] | None = None,
        *,
        published_size: tuple[int, int] | None = None,
        max_tracks: int = MAX_TRACKS,
    ) -> "Trajectories":
        """Trajectories of a JSON file in the published form or in ours.

        Args:
            path: the file.
            num_frames: T.
            size: (W, H) of the result, to which tracks are rescaled; None keeps the size at which they were drawn.
            published_size: (W, H) of the frame in which tracks of the published form, which states no size, were drawn;
                None = `size`, or 384x256 if that is None too.
            max_tracks: largest number of tracks accepted.

        Raises:
            FileNotFoundError: no such file.
            ValueError: as `from_tracks`, or malformed JSON; names the file.
        """
        tracks, drawn_at = read_trajectory_json(Path(path), published_size or size, max_tracks)
        return cls._interpolate(tracks, drawn_at, num_frames).resize(size or drawn_at)

    @classmethod
    def empty(cls, size: tuple[int, int], num_frames: int) -> "Trajectories":
        """Trajectories without tracks, whose flow map is zero."""
        return cls._interpolate([], size, num_frames)

    @classmethod
    def _interpolate(cls, tracks: Sequence[Track], size: tuple[int, int], num_frames: int) -> "Trajectories":
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        points = np.zeros((len(tracks), num_frames, 2))
        visible = np.zeros((len(tracks), num_frames), np.bool_)
        for n, track in enumerate(tracks):
            points[n] = _interpolate_pchip(track.points, num_frames)
            # A frame between two control points is visible if both of them are.
            at = np.arange(num_frames) * (len(track.points) - 1)
            visible[n] = track.visible[at // max(num_frames - 1, 1)] & track.visible[-(-at // max(num_frames - 1, 1))]
        still = torch.tensor([len(track.points) == 1 for track in tracks], dtype=torch.bool)
        return cls(torch.as_tensor(points), torch.as_tensor(visible), size, still)

    def save(self, path: str | Path) -> None:
        """Writes our JSON form, with T points per track and one per still track; `load` gives the same back.

        Raises:
            ValueError: a point is not finite.
        """
        points, visible = self.points.cpu().numpy(), self.visible.cpu().numpy()
        counts = [1 if still else self.num_frames for still in self.still]
        tracks = [Track(points[n, :count], visible[n, :count]) for n, count in enumerate(counts)]
        write_trajectory_json(Path(path), tracks, self.size)

    def resize(self, size: tuple[int, int]) -> "Trajectories":
        """The trajectories in the picture resized to `size` (W, H); the axes may scale differently."""
        width, height = check_size(size)
        if (width, height) == self.size:
            return self
        scale = (width / self.size[0], height / self.size[1])
        moved, _ = self._map_points(scale, (0.0, 0.0), (width, height))
        return dataclasses.replace(self, points=moved, size=(width, height))

    def cover_crop(self, size: tuple[int, int], picture: tuple[int, int] | None = None) -> "Trajectories":
        """The trajectories in `first_frame.cover_crop(image, size)`; points outside the crop become invisible.

        Args:
            size: (W, H) of the crop.
            picture: (W, H) of the image, where this frame is itself `cover_crop(image, self.size)`; None = this frame
                is the whole image.
        """
        width, height = check_size(size)
        if (width, height) == self.size:
            return self
        picture = picture or self.size
        scale = cover_scale(picture, (width, height)) / cover_scale(picture, self.size)
        shift = ((width - self.size[0] * scale) / 2, (height - self.size[1] * scale) / 2)
        moved, kept = self._map_points((scale, scale), shift, (width, height))
        return dataclasses.replace(self, points=moved, visible=self.visible & kept, size=(width, height))

    def flip_horizontal(self) -> "Trajectories":
        """The trajectories in the mirrored picture: x becomes W - 1 - x; its own inverse for x <= W - 1."""
        moved, _ = self._map_points((-1.0, 1.0), (float(self.size[0]), 0.0), self.size)
        return dataclasses.replace(self, points=moved)

    def _map_points(
        self, scale: tuple[float, float], shift: tuple[float, float], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The points under a' = scale * a + shift, where a = x + 0.5 is the distance from the picture's edge.

        Returns:
            (N, T, 2) points in pixels of `size`, and (N, T) bool: whether they were in the picture and still are.
        """
        was_inside = inside(self.points, self.size)
        a, factor, offset = self.points + 0.5, self.points.new_tensor(scale), self.points.new_tensor(shift)
        new, old = self.points.new_tensor(size), self.points.new_tensor(self.size)
        # Points in [W - 0.5, W) are accepted although the picture ends at W - 0.5; they count as its edge.
        edge = torch.minimum(a, old) * factor + offset
        slack = 1e-6  # 11 * (25 / 11) is a little more than 25
        kept = was_inside & ((edge >= -slack) & (edge <= new + slack)).all(-1)
        moved = a * factor + offset - 0.5
        return torch.where(kept[..., None], moved.clamp(min=0).minimum(new - _INSIDE_PX), moved), kept


def _interpolate_pchip(control: np.ndarray, num_frames: int) -> np.ndarray:
    if len(control) == 1:
        return np.repeat(control, num_frames, axis=0)
    if len(control) == num_frames:
        return control  # Evaluating the curve could round, but a saved file must load exactly.
    curve = PchipInterpolator(np.linspace(0, 1, len(control)), control)
    # PCHIP does not overshoot, but its rounding could move a border point outside the frame.
    values = curve(np.linspace(0, 1, num_frames))
    return np.minimum(np.maximum(values, control.min(axis=0)), control.max(axis=0))
