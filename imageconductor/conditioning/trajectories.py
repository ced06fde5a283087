"""Trajectories: one point per track and frame, and their resizing, cropping and mirroring with the picture.

Pixel convention. (0, 0) is the centre of the top-left pixel, so a picture W pixels wide extends from -0.5 to W - 0.5
and a resize by s maps x to (x + 0.5) * s - 0.5. The published release, however, draws at the *truncated* pixel and
accepts 0 <= x < W, and so do we. At the border the two differ by half a pixel, so the operations below move points that
are still in the picture back into [0, W), by at most half a pixel of the coarser of the two pictures.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from imageconductor.conditioning.camera import CameraMotion
from imageconductor.conditioning.first_frame import cover_scale
from imageconductor.conditioning.formats import TrackFile, read_drawing, read_tracks
from imageconductor.conditioning.interpolation import place_track
from imageconductor.conditioning.trajectory_json import (
    BORDER_PX,
    TRACK_CONTROLS,
    Track,
    check_size,
    check_tracks,
    write_trajectory_json,
)

logger = logging.getLogger(__name__)

MAX_TRACKS = 256
"""Number of tracks in a clip record; a drawing with more is taken for a mistake."""

_FARTHEST_PX = 1e6  # Farther outside of the frame, a point is taken for a mistake.


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
        control: (N,) int64, what each track says that it moves: the place in `TRACK_CONTROLS`, -1 = it does not say;
            None = no track says it.

    Raises:
        ValueError: shapes that do not fit together, or an invalid size.
    """

    points: Tensor
    visible: Tensor
    size: tuple[int, int]
    still: Tensor = field(default=cast("Tensor", None))  # Replaced in __post_init__: its length is not known here.
    control: Tensor | None = None

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
        if (control := self.control) is not None:
            is_code = control.dtype == torch.int64 and bool(((control >= -1) & (control < len(TRACK_CONTROLS))).all())
            if control.shape != (self.num_tracks,) or not is_code:
                raise ValueError(
                    f"control must be int64 ({self.num_tracks},) from -1 to {len(TRACK_CONTROLS) - 1}, "
                    f"got {control.dtype} {tuple(control.shape)}"
                )
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
        checked = check_tracks(tracks, size, max_tracks, source, num_frames)
        return cls._interpolate(checked, size, num_frames, source=source)

    @classmethod
    def from_camera(
        cls, camera: CameraMotion, size: tuple[int, int], num_frames: int, counted_in: int | None = None
    ) -> "Trajectories":
        """Tracks of scene points under a motion of the camera, which start on its grid over the frame.

        A track that leaves the frame is invisible from then on, even if it returns. Under a camera that does not move
        the tracks hold still.

        Args:
            camera: the motion.
            size: (W, H).
            num_frames: T.
            counted_in: frames of the clip in which the start and end of the motion count; None = T.

        Raises:
            ValueError: a number of frames that is not positive, or a motion that ends after the last of them.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        camera.timing.check_frames(counted_in or num_frames)
        points = camera.place(size, num_frames, counted_in or num_frames)
        visible = inside(points, size).cumprod(dim=1).bool()
        return cls(points, visible, size, torch.full((camera.num_tracks,), camera.is_still))

    @classmethod
    def load(
        cls,
        path: str | Path | Sequence[str | Path],
        num_frames: int,
        size: tuple[int, int] | None = None,
        *,
        published_size: tuple[int, int] | None = None,
        drawn_size: tuple[int, int] | None = None,
        image_size: tuple[int, int] | None = None,
        max_tracks: int = MAX_TRACKS,
    ) -> "Trajectories":
        """Trajectories of a file in our form (docs/trajectories.md) or in that of another tool (docs/formats.md).

        Warns of what the file leaves open. Points that are given for every frame are resampled in time, linearly
        between visible frames.

        Args:
            path: the file; several files or a folder if the form has one track in each.
            num_frames: T.
            size: (W, H) of the result, to which tracks are rescaled; None keeps the size at which they were drawn.
            published_size: (W, H) of the frame of files that state no size, which are the published form and files with
                only a camera's motion; None = `size`, or 384x256 if that is None too.
            drawn_size: (W, H) of the frame in which tracks of any form that states no size were drawn; None = as
                `published_size` and `image_size` say.
            image_size: (W, H) of the picture, for forms that refer to it.
            max_tracks: largest number of tracks accepted.

        Raises:
            FileNotFoundError: no such file.
            ValueError: as `from_tracks`, a malformed or unknown file, or a form that needs a size; names the file.
        """
        file = read_tracks(
            path,
            drawn_size=drawn_size,
            image_size=image_size,
            published_size=published_size or size,
            num_frames=num_frames,
            max_tracks=max_tracks,
        )
        for note in file.notes:
            logger.warning("%s", note)
        return cls.from_file(file, num_frames, str(path)).resize(size or file.size)

    @classmethod
    def from_drawing(
        cls, fields: object, num_frames: int, *, source: str = "drawing", max_tracks: int = MAX_TRACKS
    ) -> "Trajectories":
        """The tracks of a drawing, given as the content of a file in our form (docs/trajectories.md).

        Args:
            fields: the JSON object.
            num_frames: T.
            source: name at the start of messages.
            max_tracks: largest number of tracks accepted, those of the camera included.

        Raises:
            ValueError: malformed content; names source, track and key.
        """
        file = read_drawing(fields, source, num_frames=num_frames, max_tracks=max_tracks)
        return cls.from_file(file, num_frames, source)

    @classmethod
    def from_file(cls, file: TrackFile, num_frames: int, source: str = "tracks") -> "Trajectories":
        """The tracks of a file in each of T frames, those of its camera last.

        Args:
            file: from `formats.read_tracks`.
            num_frames: T.
            source: name at the start of messages.

        Raises:
            ValueError: a track is in no frame, or T is not positive.
        """
        drawn = cls._interpolate(file.tracks, file.size, num_frames, file.num_frames, source)
        if file.camera is None:
            return drawn
        moved = cls.from_camera(file.camera, file.size, num_frames, file.num_frames)
        return cls.join([drawn, moved.state("camera")])

    @classmethod
    def empty(cls, size: tuple[int, int], num_frames: int) -> "Trajectories":
        """Trajectories without tracks, whose flow map is zero."""
        return cls._interpolate([], size, num_frames)

    @classmethod
    def _interpolate(
        cls,
        tracks: Sequence[Track],
        size: tuple[int, int],
        num_frames: int,
        counted_in: int | None = None,
        source: str = "tracks",
    ) -> "Trajectories":
        """The tracks in each frame; their times count in a clip of `counted_in` frames, by default T."""
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        points = np.zeros((len(tracks), num_frames, 2))
        visible = np.zeros((len(tracks), num_frames), np.bool_)
        for n, track in enumerate(tracks):
            if track.hides_outside and np.abs(track.points).max() > _FARTHEST_PX:
                raise ValueError(f"{source}: track {n} has points more than {_FARTHEST_PX:g} px outside the frame")
            points[n], visible[n] = place_track(track, num_frames, counted_in)
            if track.hides_outside:
                visible[n] &= inside(torch.as_tensor(points[n]), size).numpy()
                if not visible[n].any():
                    raise ValueError(
                        f"{source}: track {n} lies outside {size[0]}x{size[1]} in each of the {num_frames} frames; "
                        "move its points, or drop it"
                    )
        still = torch.tensor([len(track.points) == 1 for track in tracks], dtype=torch.bool)
        codes = [-1 if track.control is None else TRACK_CONTROLS.index(track.control) for track in tracks]
        control = torch.tensor(codes) if any(code >= 0 for code in codes) else None
        return cls(torch.as_tensor(points), torch.as_tensor(visible), size, still, control)

    @classmethod
    def join(cls, sets: Sequence["Trajectories"]) -> "Trajectories":
        """The tracks of one or more sets, one after the other.

        Raises:
            ValueError: their sizes or numbers of frames differ.
        """
        shapes = {(one.size, one.num_frames) for one in sets}
        if len(shapes) != 1:
            raise ValueError(f"joined tracks must have one size and number of frames, got {sorted(shapes)}")
        codes = [torch.full((one.num_tracks,), -1) if one.control is None else one.control for one in sets]
        return cls(
            torch.cat([one.points for one in sets]),
            torch.cat([one.visible for one in sets]),
            sets[0].size,
            torch.cat([one.still for one in sets]),
            None if all(one.control is None for one in sets) else torch.cat(codes),
        )

    def state(self, control: str) -> "Trajectories":
        """The same tracks, which say that they move the camera or an object, one of `TRACK_CONTROLS`."""
        codes = torch.full((self.num_tracks,), TRACK_CONTROLS.index(control))
        return dataclasses.replace(self, control=codes)

    def resample(self, num_frames: int) -> "Trajectories":
        """The same motion over another number of frames, linearly between those in which a point is seen.

        Raises:
            ValueError: a number of frames that is not positive.
        """
        return self._interpolate(self.to_tracks(), self.size, num_frames)

    def at_frames(self, frames: Sequence[int]) -> "Trajectories":
        """The tracks in some of the frames."""
        chosen = list(frames)
        return dataclasses.replace(self, points=self.points[:, chosen], visible=self.visible[:, chosen])

    def save(self, path: str | Path) -> None:
        """Writes our JSON form, with T points per track and one per still track; `load` gives the same back.

        Raises:
            ValueError: a point is not finite.
        """
        write_trajectory_json(Path(path), self.to_tracks(), self.size)

    def to_tracks(self) -> list[Track]:
        """The tracks as files hold them: one point for a still track, T points for others."""
        points, visible = self.points.cpu().numpy(), self.visible.cpu().numpy()
        counts = [1 if still else self.num_frames for still in self.still]
        codes = [-1] * self.num_tracks if self.control is None else [int(code) for code in self.control]
        return [
            Track(
                points[n, :count],
                visible[n, :count],
                control=TRACK_CONTROLS[code] if code >= 0 else None,
                per_frame=count > 1,
            )
            for n, (count, code) in enumerate(zip(counts, codes, strict=True))
        ]

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
        return torch.where(kept[..., None], moved.clamp(min=0).minimum(new - BORDER_PX), moved), kept
