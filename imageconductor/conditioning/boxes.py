"""Boxes: one box per object and frame, and their resizing, cropping and mirroring with the picture.

A box is given by the distances of its sides from the picture's left and top edge, x1 < x2 and y1 < y2, so that the
whole picture is (0, 0, W, H) and a resize multiplies. Points of trajectories count from the centre of the top-left
pixel instead: the centre of a box as a point is half a pixel less in both axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imageconductor.conditioning.box_files import BoxObject, format_boxes, place_boxes, read_boxes
from imageconductor.conditioning.first_frame import cover_scale
from imageconductor.conditioning.trajectories import Trajectories
from imageconductor.conditioning.trajectory_json import BORDER_PX, check_size, fill_padding
from imageconductor.files import write_text


@dataclass(frozen=True, eq=False)
class Boxes:
    """N objects over T frames of one clip.

    Attributes:
        xyxy: (N, T, 4) float64, pixels of `size`; zeros where an object is absent.
        present: (N, T) bool.
        names: (N,) class names.
        size: (W, H) of the frame that `xyxy` refers to.

    Raises:
        ValueError: shapes that do not fit together, an invalid size, an empty name, or a box that is not finite, has no
            area or leaves the frame; names the object and the frame.
    """

    xyxy: Tensor
    present: Tensor
    names: tuple[str, ...]
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.xyxy.ndim != 3 or self.xyxy.shape[-1] != 4 or self.xyxy.shape[1] < 1:
            raise ValueError(f"xyxy must be (N, T, 4) with T >= 1, got {tuple(self.xyxy.shape)}")
        if self.present.shape != self.xyxy.shape[:2] or self.present.dtype != torch.bool:
            raise ValueError(
                f"present must be bool {tuple(self.xyxy.shape[:2])} as xyxy is, "
                f"got {self.present.dtype} {tuple(self.present.shape)}"
            )
        if len(self.names) != self.num_objects:
            raise ValueError(f"{self.num_objects} objects need as many names, got {len(self.names)}")
        if not all(name.strip() for name in self.names):
            raise ValueError(f"every object needs a class name, got {self.names}")
        width, height = check_size(self.size)
        xyxy = torch.where(self.present[..., None], self.xyxy.double(), 0.0)
        limit = xyxy.new_tensor([width, height, width, height])
        is_inside = ((xyxy >= 0) & (xyxy <= limit)).all(-1)
        has_area = (xyxy[..., 2:] > xyxy[..., :2]).all(-1)
        for fits, what in ((is_inside, f"leaves the {width}x{height} frame"), (has_area, "has no area")):
            wrong = (self.present & ~fits).nonzero()
            if len(wrong):
                n, t = (int(index) for index in wrong[0])
                box = ", ".join(f"{float(value):g}" for value in xyxy[n, t])
                raise ValueError(f"the box ({box}) of object {n} ({self.names[n]}) in frame {t} {what}")
        object.__setattr__(self, "xyxy", xyxy)
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "size", (width, height))

    @property
    def num_objects(self) -> int:
        """Number of objects, N."""
        return self.xyxy.shape[0]

    @property
    def num_frames(self) -> int:
        """Number of frames, T."""
        return self.xyxy.shape[1]

    @classmethod
    def empty(cls, size: tuple[int, int], num_frames: int) -> Boxes:
        """Boxes of no object."""
        return cls.from_objects([], size, num_frames)

    @classmethod
    def from_objects(cls, objects: Sequence[BoxObject], size: tuple[int, int], num_frames: int) -> Boxes:
        """Objects of a file in each of T frames; key boxes are interpolated.

        Raises:
            ValueError: As the class, or fewer than one frame.
        """
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        placed = [place_boxes(one, size, num_frames) for one in objects]
        xyxy = np.stack([boxes for boxes, _ in placed]) if placed else np.zeros((0, num_frames, 4))
        present = np.stack([flags for _, flags in placed]) if placed else np.zeros((0, num_frames), np.bool_)
        names = tuple(one.name for one in objects)
        return cls(torch.as_tensor(xyxy), torch.as_tensor(present), names, size)

    @classmethod
    def load(
        cls,
        path: str | Path,
        num_frames: int,
        size: tuple[int, int] | None = None,
        *,
        name: str | None = None,
        max_objects: int | None = None,
    ) -> Boxes:
        """Boxes of a file in our form (`box_files`), or of a folder with `bbox.txt` and an image, as SMCD has it.

        Args:
            path: `.json`, a folder, or its `bbox.txt`.
            num_frames: T, which must be that of the file.
            size: (W, H) of the result, to which boxes are rescaled; None keeps the size at which they were drawn.
            name: class name of the object of a `bbox.txt`, which does not tell it.
            max_objects: largest number of objects accepted; None = as many as a file may have.

        Raises:
            FileNotFoundError: no such file.
            ValueError: malformed content; names file, object and frame.
        """
        file = read_boxes(Path(path), num_frames, name, max_objects)
        return cls.from_objects(file.objects, file.size, num_frames).resize(size or file.size)

    @classmethod
    def from_tracks(cls, tracks: Trajectories, box_size: tuple[float, float] | Tensor, names: Sequence[str]) -> Boxes:
        """Boxes of a given size around the points of tracks, cut at the frame; absent where a track is not visible.

        Args:
            tracks: N tracks, whose points are the centres.
            box_size: (w, h) in pixels, or a tensor that fits (N, T, 2), such as (N, 1, 2).
            names: (N,) class names.

        Raises:
            ValueError: A size that is not positive, or another number of names.
        """
        sides = torch.as_tensor(box_size, dtype=torch.float64).expand(*tracks.points.shape)
        if not bool((sides > 0).all()):
            raise ValueError(f"boxes must have positive sides, got {sides.min().item():g}")
        centres = tracks.points + 0.5
        whole = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)
        xyxy, present = _cut(whole, tracks.visible, tracks.size)
        return cls(xyxy, present, tuple(names), tracks.size)

    def centres(self) -> Trajectories:
        """The centres of the boxes as trajectories, invisible where an object is absent.

        Points of such frames are filled as those of a file of boxes that is read as tracks. An object that keeps its
        place is a still track only if its centre does not move at all.
        """
        points = (self.xyxy[..., :2] + self.xyxy[..., 2:]) / 2 - 0.5
        limit = points.new_tensor(self.size) - BORDER_PX
        points = points.clamp(min=0).minimum(limit).masked_fill(~self.present[..., None], math.nan)
        for track, present in zip(points, self.present, strict=True):
            if not present.all():
                track.copy_(torch.as_tensor(fill_padding(track.cpu().numpy(), present.cpu().numpy())))
        return Trajectories(points, self.present, self.size)

    def save(self, path: str | Path) -> None:
        """Writes our JSON form, with a box or null for each frame; `load` gives the same back."""
        write_text(Path(path), self.encode().decode())

    def encode(self) -> bytes:
        """What `save` writes."""
        boxes, present = self.xyxy.cpu().numpy(), self.present.cpu().numpy()
        objects = [BoxObject(name, boxes[n], present[n]) for n, name in enumerate(self.names)]
        return format_boxes(objects, self.size, self.num_frames).encode()

    def normalise(self) -> tuple[Tensor, Tensor]:
        """What the position network reads: (T, N, 4) float32 as fractions of the frame, (T, N) float32 present."""
        scale = self.xyxy.new_tensor([*self.size, *self.size])
        return (self.xyxy / scale).transpose(0, 1).float(), self.present.transpose(0, 1).float()

    def at_frames(self, frames: Sequence[int]) -> Boxes:
        """The boxes in some of the frames."""
        chosen = list(frames)
        return dataclasses.replace(self, xyxy=self.xyxy[:, chosen], present=self.present[:, chosen])

    def select(self, objects: Sequence[int]) -> Boxes:
        """Some of the objects."""
        chosen = list(objects)
        names = tuple(self.names[n] for n in chosen)
        return Boxes(self.xyxy[chosen], self.present[chosen], names, self.size)

    def resize(self, size: tuple[int, int]) -> Boxes:
        """The boxes in the picture resized to `size` (W, H); the axes may scale differently."""
        width, height = check_size(size)
        if (width, height) == self.size:
            return self
        return self.crop((width / self.size[0], height / self.size[1]), (0.0, 0.0), (width, height))

    def cover_crop(self, size: tuple[int, int], picture: tuple[int, int] | None = None) -> Boxes:
        """The boxes in `first_frame.cover_crop(image, size)`, cut at its sides; those outside become absent.

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
        offset = ((width - self.size[0] * scale) / 2, (height - self.size[1] * scale) / 2)
        return self.crop((scale, scale), offset, (width, height))

    def crop(
        self,
        scale: tuple[float, float],
        offset: tuple[float, float],
        size: tuple[int, int],
        min_area: float = 0.0,
    ) -> Boxes:
        """The boxes in a picture that was scaled, moved and cut; what is outside becomes absent.

        Args:
            scale: Along x and y.
            offset: By which the scaled picture is moved, in pixels of the result; negative for what is cut off.
            size: (W, H) of the result.
            min_area: Fraction of the result's area; a box that keeps less of it becomes absent.
        """
        moved = self.xyxy * self.xyxy.new_tensor([*scale, *scale]) + self.xyxy.new_tensor([*offset, *offset])
        xyxy, present = _cut(moved, self.present, check_size(size), min_area)
        return Boxes(xyxy, present, self.names, check_size(size))

    def flip_horizontal(self) -> Boxes:
        """The boxes in the mirrored picture: x becomes W - x; its own inverse."""
        x1, y1, x2, y2 = self.xyxy.unbind(-1)
        width = self.size[0]
        return dataclasses.replace(self, xyxy=torch.stack([width - x2, y1, width - x1, y2], dim=-1))


def stack_boxes(clips: Sequence[Boxes], features: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Fields of a `Condition` for B clips, padded with absent objects to the most that one of them has, N.

    Args:
        clips: Of T frames each.
        features: (D,) of each class name.
        width: D.

    Returns:
        boxes (B, T, N, 4) as fractions of the frame, present (B, T, N), names (B, N, D); float32, zero where there is
        no object.
    """
    most = max(1, *(one.num_objects for one in clips))
    xyxy = torch.zeros(len(clips), clips[0].num_frames, most, 4)
    present, names = torch.zeros(xyxy.shape[:3]), torch.zeros(len(clips), most, width)
    for n, one in enumerate(clips):
        xyxy[n, :, : one.num_objects], present[n, :, : one.num_objects] = one.normalise()
        for k, name in enumerate(one.names):
            names[n, k] = features[name]
    return {"boxes": xyxy, "present": present, "names": names}


def _cut(xyxy: Tensor, present: Tensor, size: tuple[int, int], min_area: float = 0.0) -> tuple[Tensor, Tensor]:
    """Boxes (N, T, 4) cut at the sides of a frame, and (N, T) where enough of them is left."""
    limit = xyxy.new_tensor([*size, *size])
    inside = xyxy.clamp(min=0).minimum(limit)
    sides = inside[..., 2:] - inside[..., :2]
    is_left = (sides > 0).all(-1) & (sides.prod(-1) >= min_area * size[0] * size[1])
    return inside, present & is_left
