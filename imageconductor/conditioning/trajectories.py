"""Trajectories: one point per track and frame, which stay with the picture through resize, crop and flip.

Pixel convention. (0, 0) is the centre of the top-left pixel, so a picture W pixels wide reaches from -0.5 to W - 0.5
and a resize by s takes x to (x + 0.5) * s - 0.5. The published release, however, draws at the *truncated* pixel and
accepts 0 <= x < W; we accept the same range. The two differ by half a pixel at the border, so the operations below pull
a point that is still in the picture back into [0, W), by at most half a pixel of the coarser of the two pictures.
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
from imageconductor.conditioning.trajectory_json import Track, checked_size, checked_tracks, read_drawing, write_drawing

MAX_TRACKS = 256
"""Tracks of one clip record; more than that in a drawing is a mistake."""

_INSIDE_PX = 1 / 64  # A border point ends this far below W: exact in binary, and it survives a cast to float32.


def inside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether each point (..., 2) has 0 <= x < W and 0 <= y < H: (...) bool, False for NaN."""
    return ((points >= 0) & (points < points.new_tensor(size))).all(-1)


@dataclass(frozen=True, eq=False)
class Trajectories:
    """N tracks over T frames of one clip.

    Points made by programs (presets, tracked clips) may leave the frame or be hidden; those steps are not drawn.

    Attributes:
        points: (N, T, 2) float64, xy in pixels of `size`; (0, 0) is the centre of the top-left pixel.
        visible: (N, T) bool.
        size: (W, H) of the frame that `points` refer to.
        still: (N,) bool, tracks drawn as one point, which means "hold still"; all False when not given.

    Raises:
        ValueError: shapes that do not fit together, or a size that is no size.
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
        object.__setattr__(self, "size", checked_size(self.size))
        object.__setattr__(self, "still", still)

    @property
    def num_tracks(self) -> int:
        """N."""
        return self.points.shape[0]

    @property
    def num_frames(self) -> int:
        """T."""
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
        """Control points interpolated to `num_frames` points each.

        PCHIP over a parameter that is uniform per control point, not per arc length, as in the published release.
        A single point stands still.

        Args:
            tracks: list of tracks, each a list of [x, y] pixels of `size`.
            size: (W, H).
            num_frames: T.
            source: the name that messages start with.
            max_tracks: most tracks accepted.

        Raises:
            ValueError: a control point that is malformed, not finite or outside the frame, an empty track, too many
                tracks or a wrong size; names source, track and point.
        """
        size = checked_size(size, source)
        return cls._interpolated(checked_tracks(tracks, size, max_tracks, source), size, num_frames)

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
        """Trajectories of a JSON file in the published form or ours.

        Args:
            path: the file.
            num_frames: T.
            size: (W, H) wanted; ours is rescaled from its own size. None keeps the size they were drawn at.
            published_size: (W, H) of the frame that the published form, which carries none, was drawn on; by default
                `size`, or else 384x256.
            max_tracks: most tracks accepted.

        Raises:
            FileNotFoundError: no such file.
            ValueError: as `from_tracks`, or malformed JSON; names the file.
        """
        tracks, drawn_at = read_drawing(Path(path), published_size or size, max_tracks)
        return cls._interpolated(tracks, drawn_at, num_frames).resize(size or drawn_at)

    @classmethod
    def empty(cls, size: tuple[int, int], num_frames: int) -> "Trajectories":
        """No track at all, whose flow map is zero."""
        return cls._interpolated([], size, num_frames)

    @classmethod
    def _interpolated(cls, tracks: Sequence[Track], size: tuple[int, int], num_frames: int) -> "Trajectories":
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        points = np.zeros((len(tracks), num_frames, 2))
        visible = np.zeros((len(tracks), num_frames), np.bool_)
        for n, track in enumerate(tracks):
            points[n] = _pchip(track.points, num_frames)
            # A frame between two control points is seen when both of them are.
            at = np.arange(num_frames) * (len(track.points) - 1)
            visible[n] = track.visible[at // max(num_frames - 1, 1)] & track.visible[-(-at // max(num_frames - 1, 1))]
        still = torch.tensor([len(track.points) == 1 for track in tracks], dtype=torch.bool)
        return cls(torch.as_tensor(points), torch.as_tensor(visible), size, still)

    def save(self, path: str | Path) -> None:
        """Write our JSON form, T points per track and one per still track; `load` gives the same back.

        Raises:
            ValueError: a point is not finite.
        """
        points, visible = self.points.cpu().numpy(), self.visible.cpu().numpy()
        counts = [1 if still else self.num_frames for still in self.still]
        tracks = [Track(points[n, :count], visible[n, :count]) for n, count in enumerate(counts)]
        write_drawing(Path(path), tracks, self.size)

    def resize(self, size: tuple[int, int]) -> "Trajectories":
        """The trajectories of the picture resized to `size` (W, H); the axes may scale differently."""
        width, height = checked_size(size)
        if (width, height) == self.size:
            return self
        scale = (width / self.size[0], height / self.size[1])
        moved, _ = self._mapped(scale, (0.0, 0.0), (width, height))
        return dataclasses.replace(self, points=moved, size=(width, height))

    def crop(self, left: int, top: int, size: tuple[int, int]) -> "Trajectories":
        """The trajectories of the `size` (W, H) part of the picture whose top-left pixel is (left, top).

        Points outside that part become invisible.

        Raises:
            ValueError: the part is not inside the frame.
        """
        width, height = checked_size(size)
        if not (0 <= left <= self.size[0] - width and 0 <= top <= self.size[1] - height):
            raise ValueError(
                f"crop of {width}x{height} at ({left}, {top}) does not lie in the {self.size[0]}x{self.size[1]} frame"
            )
        moved, kept = self._mapped((1.0, 1.0), (-left, -top), (width, height))
        return dataclasses.replace(self, points=moved, visible=self.visible & kept, size=(width, height))

    def cover_crop(self, size: tuple[int, int]) -> "Trajectories":
        """The trajectories of `first_frame.cover_crop(image, size)`; points cut away become invisible."""
        width, height = checked_size(size)
        if (width, height) == self.size:
            return self
        scale = cover_scale(self.size, (width, height))
        shift = ((width - self.size[0] * scale) / 2, (height - self.size[1] * scale) / 2)
        moved, kept = self._mapped((scale, scale), shift, (width, height))
        return dataclasses.replace(self, points=moved, visible=self.visible & kept, size=(width, height))

    def flip_horizontal(self) -> "Trajectories":
        """The trajectories of the mirrored picture: x becomes W - 1 - x; its own inverse for x <= W - 1."""
        moved, _ = self._mapped((-1.0, 1.0), (float(self.size[0]), 0.0), self.size)
        return dataclasses.replace(self, points=moved)

    def select(self, indices: Sequence[int] | Tensor) -> "Trajectories":
        """The tracks at `indices` (or where a bool mask is True), in that order, which is the order of drawing."""
        index = torch.as_tensor(indices, device=self.points.device)
        index = index if index.dtype == torch.bool else index.long()
        return dataclasses.replace(
            self, points=self.points[index], visible=self.visible[index], still=self.still[index]
        )

    def to(self, device: torch.device | str) -> "Trajectories":
        """The same on `device`, which must have float64; `build_flow_map` serves those that do not."""
        return dataclasses.replace(
            self, points=self.points.to(device), visible=self.visible.to(device), still=self.still.to(device)
        )

    def _mapped(
        self, scale: tuple[float, float], shift: tuple[float, float], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Points under a' = scale * a + shift, a = x + 0.5 being distances from the picture's edge.

        Returns:
            (N, T, 2) points in pixels of `size`, and (N, T) bool: those that were in the picture and still are.
        """
        was_inside = inside(self.points, self.size)
        a, factor, offset = self.points + 0.5, self.points.new_tensor(scale), self.points.new_tensor(shift)
        new, old = self.points.new_tensor(size), self.points.new_tensor(self.size)
        # Points in [W - 0.5, W) are accepted though the picture ends at W - 0.5: they count as its edge.
        edge = torch.minimum(a, old) * factor + offset
        slack = 1e-6  # 11 * (25 / 11) is a little more than 25
        kept = was_inside & ((edge >= -slack) & (edge <= new + slack)).all(-1)
        moved = a * factor + offset - 0.5
        return torch.where(kept[..., None], moved.clamp(min=0).minimum(new - _INSIDE_PX), moved), kept


def _pchip(control: np.ndarray, num_frames: int) -> np.ndarray:
    if len(control) == 1:
        return np.repeat(control, num_frames, axis=0)
    if len(control) == num_frames:
        return control  # Exactly, where evaluating the curve may round: a saved file reads back as it was.
    curve = PchipInterpolator(np.linspace(0, 1, len(control)), control)
    # PCHIP never overshoots; the clip takes off its rounding, which could carry a border point outside.
    values = curve(np.linspace(0, 1, num_frames))
    return np.minimum(np.maximum(values, control.min(axis=0)), control.max(axis=0))
