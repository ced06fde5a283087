"""Signed distances of the sprites' shapes and patterns.

Every shape has its area centroid at the origin, fits into a circle of radius `EXTENT`, and is upright when y points
down. Outside a shape the distances are exact near its edges only, which suffices for one pixel of antialiasing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imageconductor.data.sprite_world import PATTERN_NAMES, SHAPE_NAMES

EXTENT = 1.3  # no shape reaches farther from its centre, in units of its radius

_HEART_CENTROID = (0.25 + (math.pi / 8) * (0.75 + 1 / (3 * math.pi))) / (0.5 + math.pi / 8)  # above its tip, unit heart


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.87


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    half_width, half_height = 0.88, 1.25
    distance = half_height * x.abs() + half_width * y.abs() - half_width * half_height
    return distance / math.hypot(half_width, half_height)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y, 0.5 * math.sqrt(3) * x.abs() - 0.5 * y) - 0.64


def _star(x: Tensor, y: Tensor) -> Tensor:
    outer, inner, sector = 1.27, 0.62, math.pi / 5
    # Five-fold symmetry with mirrors: every point has a twin in the sector between one tip and one notch.
    angle = (torch.remainder(torch.atan2(x, -y) + sector, 2 * sector) - sector).abs()
    radius = torch.hypot(x, y)
    notch_x, notch_y = inner * math.cos(sector), inner * math.sin(sector)
    edge_x, edge_y = notch_x - outer, notch_y
    distance = edge_y * (radius * torch.cos(angle) - outer) - edge_x * radius * torch.sin(angle)
    return distance / math.hypot(edge_x, edge_y)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 1.75  # a unit square standing on its tip with a half disc on each upper side, area 0.89
    x, y = x.abs() / scale, _HEART_CENTROID - y / scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(0.125)
    along = 0.5 * (x + y).clamp_min(0.0)  # foot of the perpendicular on the lower side
    side = torch.minimum(torch.hypot(x, y - 1.0), torch.hypot(x - along, y - along)) * torch.sign(x - y)
    return scale * torch.where(x + y > 1.0, lobe, side)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    length, half_width = 1.12, 0.42
    x, y = x.abs(), y.abs()
    return torch.minimum(
        torch.maximum(x - length, y - half_width),
        torch.maximum(x - half_width, y - length),
    )


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    zip(SHAPE_NAMES, (_circle, _square, _triangle, _star, _diamond, _heart, _cross), strict=True)
)


def _stripes(x: Tensor, y: Tensor) -> Tensor:
    x = x + 0.12 * torch.sin(2 * math.pi * y / 0.9)  # wavy, so that motion along a stripe can be seen
    return 0.83 * ((torch.remainder(x - 0.19, 0.76) - 0.38).abs() - 0.18)


def _checks(x: Tensor, y: Tensor) -> Tensor:
    x, y = ((torch.remainder(v, 1.0) - 0.5).abs() - 0.25 for v in (x, y))
    return torch.maximum(torch.minimum(x, y), -torch.maximum(x, y))


def _dots(x: Tensor, y: Tensor) -> Tensor:
    # The nearest point of a hexagonal lattice, which is two rectangular ones.
    spacing, height = 0.78, 0.78 * math.sqrt(3)
    lattices = [
        torch.hypot(
            torch.remainder(x + spacing * (0.5 + shift), spacing) - 0.5 * spacing,
            torch.remainder(y + height * (0.5 + shift), height) - 0.5 * height,
        )
        for shift in (0.0, 0.5)
    ]
    return torch.minimum(*lattices) - 0.24


SPRITE_PATTERNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    zip(PATTERN_NAMES, (_stripes, _checks, _dots), strict=True)
)


def signed_distance(shape: str, points: Tensor) -> Tensor:
    """Signed distance to the outline of a shape of radius 1, negative inside.

    Args:
        shape: a key of `SHAPES`.
        points: (..., 2), relative to the shape's centre, in units of its radius, y down.

    Returns:
        (...), in the same unit.
    """
    return SHAPES[shape](points[..., 0], points[..., 1])


@functools.cache
def outline(shape: str) -> NDArray[np.float64]:
    """Points (P, 2) of a shape's outline, 0.25 degrees apart as seen from its centre, where radius 1 is the unit.

    Args:
        shape: a key of `SHAPES`.
    """
    angles = torch.arange(1440, dtype=torch.float64) * (2 * math.pi / 1440)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    low, high = torch.zeros_like(angles), torch.full_like(angles, EXTENT + 0.1)
    for _ in range(40):  # Every shape can be seen as a whole from its centre, so there is one border along a ray.
        middle = (low + high) / 2
        is_inside = signed_distance(shape, middle[:, None] * directions) < 0
        low, high = torch.where(is_inside, middle, low), torch.where(is_inside, high, middle)
    return (low[:, None] * directions).numpy()


def pattern_distance(pattern: str, points: Tensor) -> Tensor:
    """Signed distance to the marks of a pattern, negative inside.

    Args:
        pattern: a key of `SPRITE_PATTERNS`.
        points: (..., 2), as in `signed_distance`.

    Returns:
        (...), in the same unit.
    """
    return SPRITE_PATTERNS[pattern](points[..., 0], points[..., 1])
