"""The motions of the evaluation: 10 camera and 10 object trajectories, for any frame size and clip length.

The paper (section 3) names pans and zooms, and straight lines, curves, shaking lines and their combinations, without
coordinates; the coordinates here are our choice. At strength 1 a motion reaches 0.225 of the frame's shorter side.

Camera presets are named after the *camera*: "pan-left" turns the camera to the left, and the scene moves to the right.
"""

import difflib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from imageconductor.conditioning.trajectories import Trajectories, inside

logger = logging.getLogger(__name__)

_REACH = 0.225
_DIAGONAL = math.sqrt(0.5)
_Preset = TypeVar("_Preset")


@dataclass(frozen=True)
class _CameraMotion:
    """Motion of the scene: direction of its shift (y down), zoom (1 = grows, -1 = shrinks), roll (1 = clockwise)."""

    help: str
    shift: tuple[float, float] = (0.0, 0.0)
    zoom: int = 0
    roll: int = 0
    returns: bool = False


@dataclass(frozen=True)
class _ObjectMotion:
    """Motion of a point: `path` maps phases (T,) in [0, 1] to x and y offsets (T,) in units of the reach, y down."""

    help: str
    path: Callable[[Tensor], tuple[Tensor, Tensor]]


def _there_and_back(u: Tensor) -> Tensor:
    return 1 - (2 * u - 1).abs()


def _shake(u: Tensor) -> Tensor:
    return torch.sin(6 * math.pi * u)


_CAMERA: Mapping[str, _CameraMotion] = {
    "pan-left": _CameraMotion("the camera pans left: the scene moves right", (1, 0)),
    "pan-right": _CameraMotion("the camera pans right: the scene moves left", (-1, 0)),
    "pan-up": _CameraMotion("the camera pans up: the scene moves down", (0, 1)),
    "pan-down": _CameraMotion("the camera pans down: the scene moves up", (0, -1)),
    "zoom-in": _CameraMotion("the camera zooms in: the scene grows from the centre", zoom=1),
    "zoom-out": _CameraMotion("the camera zooms out: the scene shrinks to the centre", zoom=-1),
    "pan-up-left": _CameraMotion("the camera pans up and left: the scene moves down and right", (_DIAGONAL, _DIAGONAL)),
    "pan-down-right": _CameraMotion(
        "the camera pans down and right: the scene moves up and left", (-_DIAGONAL, -_DIAGONAL)
    ),
    "pan-down-up": _CameraMotion(
        "the camera pans down, then up again: the scene rises and returns", (0, -1), returns=True
    ),
    "roll": _CameraMotion("the camera rolls clockwise: the scene turns counter-clockwise about the centre", roll=-1),
}

_OBJECT: Mapping[str, _ObjectMotion] = {
    "line-right": _ObjectMotion("straight to the right", lambda u: (u, 0 * u)),
    "line-left": _ObjectMotion("straight to the left", lambda u: (-u, 0 * u)),
    "line-up": _ObjectMotion("straight up", lambda u: (0 * u, -u)),
    "line-down": _ObjectMotion("straight down", lambda u: (0 * u, u)),
    "diagonal": _ObjectMotion("straight to the right and up", lambda u: (_DIAGONAL * u, -_DIAGONAL * u)),
    "arc": _ObjectMotion(
        "right, bending upwards", lambda u: (torch.sin(u * math.pi / 2), torch.cos(u * math.pi / 2) - 1)
    ),
    "s-curve": _ObjectMotion("right, swinging up, then down", lambda u: (u, -0.35 * torch.sin(2 * math.pi * u))),
    "shake": _ObjectMotion("shaking left and right in place", lambda u: (0.4 * _shake(u), 0 * u)),
    "shaking-line": _ObjectMotion("right, shaking up and down", lambda u: (u, 0.2 * _shake(u))),
    "line-and-back": _ObjectMotion("right, then back to the start", lambda u: (_there_and_back(u), 0 * u)),
}

CAMERA_PRESETS: tuple[str, ...] = tuple(_CAMERA)
OBJECT_PRESETS: tuple[str, ...] = tuple(_OBJECT)
PRESET_HELP: Mapping[str, str] = {name: motion.help for name, motion in (*_CAMERA.items(), *_OBJECT.items())}
"""One line of description per preset, for menus and --help."""


def camera_preset(
    name: str, size: tuple[int, int], num_frames: int, *, strength: float = 1.0, grid: tuple[int, int] = (3, 3)
) -> Trajectories:
    """Tracks of scene points under a camera motion, starting on a grid over the frame.

    The name describes the camera; the scene, and with it the tracks, moves the opposite way. A track that leaves the
    frame is invisible from then on, even if it returns.

    Args:
        name: one of CAMERA_PRESETS.
        size: (W, H).
        num_frames: T.
        strength: factor on the motion; at 1 a pan, and a zoom or roll half the shorter side from the centre, reach
            0.225 of the shorter side.
        grid: columns and rows of tracks.

    Raises:
        ValueError: an unknown name, or a strength, grid or number of frames that is not positive.
    """
    motion = _look_up(name, _CAMERA, "camera")
    columns, rows = grid
    if columns < 1 or rows < 1:
        raise ValueError(f"grid must have at least one column and row, got {grid}")
    u, reach = _phase(num_frames), _reach(size, strength)
    if motion.returns:
        u = _there_and_back(u)
    centre = (torch.tensor(size, dtype=torch.float64) - 1) / 2
    x, y = (
        ((torch.arange(count, dtype=torch.float64) + 0.5) * length / count - 0.5).clamp(min=0)
        for count, length in zip(grid, size, strict=True)
    )
    start = torch.cartesian_prod(y, x).flip(-1) - centre  # (N, 2), row by row
    turn = 2 * _REACH * strength * u  # This angle or growth gives the reach at half the shorter side from the centre.
    angle, growth = motion.roll * turn, (1 + turn) ** motion.zoom
    cos, sin = growth * torch.cos(angle), growth * torch.sin(angle)
    shift = torch.tensor(motion.shift, dtype=torch.float64) * reach * u[:, None]  # (T, 2)
    x0, y0 = start[:, None].unbind(-1)  # (N, 1) each
    points = torch.stack([x0 * cos - y0 * sin, x0 * sin + y0 * cos], dim=-1) + shift + centre
    visible = inside(points, size).cumprod(dim=1).bool()
    return Trajectories(points, visible, size)


def object_preset(
    name: str, size: tuple[int, int], num_frames: int, *, start: tuple[float, float], strength: float = 1.0
) -> Trajectories:
    """One track that starts at a point of the frame and stays inside the frame.

    A path that would leave the frame is scaled down as a whole, with its direction and shape unchanged, and a warning
    states the factor. From a point on the border the path may shrink to nothing.

    Args:
        name: one of OBJECT_PRESETS.
        size: (W, H).
        num_frames: T.
        start: (x, y), pixels.
        strength: factor on the motion; at 1 a straight line is 0.225 of the shorter side long.

    Raises:
        ValueError: an unknown name, a start outside the frame, or a strength or number of frames that is not positive.
    """
    motion = _look_up(name, _OBJECT, "object")
    origin = torch.tensor(start, dtype=torch.float64)
    if not inside(origin, size):
        raise ValueError(f"start ({start[0]:g}, {start[1]:g}) lies outside the {size[0]}x{size[1]} frame")
    path = torch.stack(motion.path(_phase(num_frames)), dim=-1) * _reach(size, strength)  # (T, 2)
    last = (torch.tensor(size, dtype=torch.float64) - 1).maximum(origin)
    room = torch.where(path > 0, last - origin, origin)  # (T, 2), distance to the border on that side
    fits = min(1.0, float((room / path.abs().clamp(min=1e-9)).min()))
    if fits < 1:
        logger.warning("%s from (%g, %g) is drawn at %.0f %% to stay in the frame", name, *start, 100 * fits)
    points = (origin + fits * path).clamp(min=0).minimum(last)[None]
    return Trajectories(points, torch.ones(points.shape[:2], dtype=torch.bool), size)


def _look_up(name: str, presets: Mapping[str, _Preset], kind: str) -> _Preset:
    if name in presets:
        return presets[name]
    close = difflib.get_close_matches(name, presets)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"unknown {kind} preset {name!r}; {hint}There are: {', '.join(presets)}")


def _phase(num_frames: int) -> Tensor:
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    return torch.linspace(0, 1, num_frames, dtype=torch.float64)


def _reach(size: tuple[int, int], strength: float) -> float:
    if not 0 < strength < math.inf:
        raise ValueError(f"strength must be positive, got {strength}")
    return _REACH * strength * min(size)
