"""Motion of the camera as amounts of pan, zoom and roll, and the tracks of scene points under it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from imageconductor.conditioning.checks import check_number
from imageconductor.conditioning.timing import STEADY, Timing

if TYPE_CHECKING:
    from torch import Tensor

_FARTHEST = 100.0  # sides of the frame; beyond it an amount is taken for a mistake


@dataclass(frozen=True)
class CameraMotion:
    """What the camera does; the scene moves the opposite way. Amounts are those at the end of the motion.

    Attributes:
        pan: (x, y) in parts of the frame's shorter side, x to the right and y down: at (0.2, 0) the camera turns to
            the right, and the scene moves to the left by 0.2 of the shorter side.
        zoom: positive = in. A point half the shorter side from the centre moves outwards by `zoom` of the shorter
            side: the scene grows by 1 + 2 zoom. Negative = out: it shrinks by the same factor.
        roll: degrees, positive = the camera turns clockwise, and the scene counter-clockwise about the centre.
        timing: start, end and easing; without times.
        returns: whether the motion goes back to its beginning in the second half, eased in each half.
        grid: columns and rows of tracks.

    Raises:
        ValueError: a value of a wrong kind; names it.
    """

    pan: tuple[float, float] = (0.0, 0.0)
    zoom: float = 0.0
    roll: float = 0.0
    timing: Timing = STEADY
    returns: bool = False
    grid: tuple[int, int] = (3, 3)

    def __post_init__(self) -> None:
        if len(_members(self.pan)) != 2:
            raise ValueError(f"pan must be [x, y], two numbers, got {self.pan!r}")
        for axis, amount in zip("xy", self.pan, strict=True):
            check_number(amount, f"pan: {axis}", -_FARTHEST, _FARTHEST)
        check_number(self.zoom, "zoom", -_FARTHEST, _FARTHEST)
        check_number(self.roll, "roll")
        if not isinstance(cast("object", self.returns), bool):
            raise ValueError(f"returns must be true or false, got {self.returns!r}")
        counts = _members(self.grid)
        if len(counts) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in counts):
            raise ValueError(f"grid must have at least one column and row, two whole numbers, got {self.grid}")
        if self.timing.times is not None:
            raise ValueError("times belong to the points of a track; a camera takes start, end and easing")

    @property
    def is_still(self) -> bool:
        """Whether the camera does not move."""
        return not (any(self.pan) or self.zoom or self.roll)

    @property
    def num_tracks(self) -> int:
        """Number of tracks of the grid."""
        return self.grid[0] * self.grid[1]

    def place(self, size: tuple[int, int], num_frames: int, counted_in: int) -> "Tensor":
        """The tracks of scene points that start on a grid over the frame, row by row.

        Args:
            size: (W, H).
            num_frames: T.
            counted_in: number of frames of the clip in which the timing counts.

        Returns:
            (N, T, 2) float64, pixels; points leave the frame.
        """
        import torch  # Here, so that files can be checked and converted without it.

        u = torch.as_tensor(self.timing.progress(num_frames, counted_in, self.returns))
        centre = (torch.tensor(size, dtype=torch.float64) - 1) / 2
        x, y = (
            ((torch.arange(count, dtype=torch.float64) + 0.5) * length / count - 0.5).clamp(min=0)
            for count, length in zip(self.grid, size, strict=True)
        )
        start = torch.cartesian_prod(y, x).flip(-1) - centre  # (N, 2)
        angle = -math.radians(self.roll) * u  # y points down: negative is counter-clockwise
        growth = (1 + 2 * abs(self.zoom) * u) ** (1 if self.zoom >= 0 else -1)
        cos, sin = growth * torch.cos(angle), growth * torch.sin(angle)
        shift = -torch.tensor(self.pan, dtype=torch.float64) * min(size) * u[:, None]  # (T, 2)
        x0, y0 = start[:, None].unbind(-1)  # (N, 1) each
        return torch.stack([x0 * cos - y0 * sin, x0 * sin + y0 * cos], dim=-1) + shift + centre


def _members(value: object) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", value) if isinstance(value, tuple) else ()
