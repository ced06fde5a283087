"""The motions of the evaluation: 10 camera and 10 object trajectories, for any frame size and clip length.

The paper (section 3) names pans and zooms, and straight lines, curves, shaking lines and their combinations, without
coordinates; the coordinates here are our choice. At strength 1 a motion reaches 0.225 of the frame's shorter side.
`preset_names` says in words what each one does.

Camera presets are named after the *camera*: "pan-left" turns the camera to the left, and the scene moves to the right.
"""

import difflib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from imageconductor.conditioning.camera import CameraMotion
from imageconductor.conditioning.timing import Timing
from imageconductor.conditioning.trajectories import Trajectories, inside
from imageconductor.conditioning.trajectory_json import check_size

logger = logging.getLogger(__name__)

_REACH = 0.225
_DIAGONAL = math.sqrt(0.5)
_Preset = TypeVar("_Preset")


_Path = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps phases (T,) in [0, 1] to x and y offsets (T,) in units of the reach, y down."""


def _there_and_back(u: Tensor) -> Tensor:
    return 1 - (2 * u - 1).abs()


def _shake(u: Tensor) -> Tensor:
    return torch.sin(6 * math.pi * u)


_CAMERA: Mapping[str, CameraMotion] = {  # with the amounts of strength 1
    "pan-left": CameraMotion((-_REACH, 0)),
    "pan-right": CameraMotion((_REACH, 0)),
    "pan-up": CameraMotion((0, -_REACH)),
    "pan-down": CameraMotion((0, _REACH)),
    "zoom-in": CameraMotion(zoom=_REACH),
    "zoom-out": CameraMotion(zoom=-_REACH),
    "pan-up-left": CameraMotion((-_DIAGONAL * _REACH, -_DIAGONAL * _REACH)),
    "pan-down-right": CameraMotion((_DIAGONAL * _REACH, _DIAGONAL * _REACH)),
    "pan-down-up": CameraMotion((0, _REACH), returns=True),
    # By this angle a point half the shorter side from the centre moves by the reach.
    "roll": CameraMotion(roll=math.degrees(2 * _REACH)),
}

_OBJECT: Mapping[str, _Path] = {
    "line-right": lambda u: (u, 0 * u),
    "line-left": lambda u: (-u, 0 * u),
    "line-up": lambda u: (0 * u, -u),
    "line-down": lambda u: (0 * u, u),
    "diagonal": lambda u: (_DIAGONAL * u, -_DIAGONAL * u),
    "arc": lambda u: (torch.sin(u * math.pi / 2), torch.cos(u * math.pi / 2) - 1),
    "s-curve": lambda u: (u, -0.35 * torch.sin(2 * math.pi * u)),
    "shake": lambda u: (0.4 * _shake(u), 0 * u),
    "shaking-line": lambda u: (u, 0.2 * _shake(u)),
    "line-and-back": lambda u: (_there_and_back(u), 0 * u),
}


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
    camera = replace(camera_preset_motion(name, strength), grid=grid)
    return Trajectories.from_camera(camera, check_size(size), num_frames)


def camera_preset_motion(name: str, strength: float = 1.0) -> CameraMotion:
    """The amounts of a camera preset; arguments and errors as of `camera_preset`."""
    motion = _look_up(name, _CAMERA, "camera")
    _check_strength(strength)
    pan = (strength * motion.pan[0], strength * motion.pan[1])
    return replace(motion, pan=pan, zoom=strength * motion.zoom, roll=strength * motion.roll)


def camera_motion(
    size: tuple[int, int],
    num_frames: int,
    *,
    pan: tuple[float, float] = (0.0, 0.0),
    zoom: float = 0.0,
    roll: float = 0.0,
    easing: str = "linear",
    start: float | None = None,
    end: float | None = None,
    returns: bool = False,
    grid: tuple[int, int] = (3, 3),
) -> Trajectories:
    """Tracks of scene points under a motion of the camera, starting on a grid over the frame.

    Amounts describe the camera; the scene, and with it the tracks, moves the opposite way. A track that leaves the
    frame is invisible from then on, even if it returns. If the camera does not move, the tracks hold still.

    Args:
        size: (W, H).
        num_frames: T.
        pan: (x, y) in parts of the frame's shorter side, positive = to the right and down.
        zoom: positive = in: the scene grows by 1 + 2 zoom, so that a point half the shorter side from the centre moves
            by `zoom` of the shorter side; negative = out: it shrinks by the same factor.
        roll: degrees, positive = clockwise.
        easing: one of `EASINGS`.
        start: frame at which the motion begins; None = the first.
        end: frame at which it has reached its amounts; None = the last.
        returns: whether it goes back in the second half.
        grid: columns and rows of tracks.

    Raises:
        ValueError: a value of a wrong kind or out of range; names it.
    """
    camera = CameraMotion(pan, zoom, roll, Timing(start, end, easing), returns, grid)
    return Trajectories.from_camera(camera, check_size(size), num_frames)


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
    path_of = _look_up(name, _OBJECT, "object")
    origin = torch.tensor(start, dtype=torch.float64)
    if not inside(origin, size):
        raise ValueError(f"start ({start[0]:g}, {start[1]:g}) lies outside the {size[0]}x{size[1]} frame")
    path = torch.stack(path_of(_phase(num_frames)), dim=-1) * _reach(size, strength)  # (T, 2)
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
    _check_strength(strength)
    return _REACH * strength * min(size)


def _check_strength(strength: float) -> None:
    if not 0 < strength < math.inf:
        raise ValueError(f"strength must be positive, got {strength}")
