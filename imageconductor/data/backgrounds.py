"""Procedural backgrounds: smooth functions of world coordinates without a border.

A background is a sum of plane waves. A wave is separable under a similarity,
sin(a x + b y) = sin(a x) cos(b y) + cos(a x) sin(b y), so a frame of a moving camera costs one small matrix product.
Striped, checked, dotted and cloudy backgrounds differ only in their waves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PATTERNS = ("striped", "checked", "dotted", "cloudy")

BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "green": (112, 172, 110),
    "orange": (226, 154, 92),
    "yellow": (228, 206, 122),
    "blue": (104, 148, 208),
    "purple": (156, 122, 196),
    "pink": (228, 158, 182),
    "teal": (84, 162, 160),
    "brown": (150, 108, 82),
    "gray": (146, 152, 164),
    "navy": (66, 82, 132),
}

_Wave = tuple[float, float, float, float]


@dataclass(frozen=True)
class Background:
    """Two colours mixed by a pattern, under a slow change of light and tint.

    Attributes:
        pattern: name of the pattern in the caption.
        colours: (2, 3) in [0, 255], where the pattern is low and high.
        tint: (3,) in [0, 255] units, multiplied by the tint wave and added.
        waves: (K, 4) rows (kx, ky, phase, amplitude), radians per world pixel.
        num_pattern_waves: number of rows that form the pattern; rows of the light and one of the tint follow them.
        bias, sharpness: the fraction of the second colour is (1 + tanh(sharpness * (pattern waves + bias))) / 2.
    """

    pattern: str
    colours: np.ndarray
    tint: np.ndarray
    waves: np.ndarray
    num_pattern_waves: int
    bias: float
    sharpness: float


def _wave(angle: float, wavelength: float, phase: float, amplitude: float) -> _Wave:
    k = 2 * math.pi / wavelength
    return (k * math.cos(angle), k * math.sin(angle), phase, amplitude)


def _pattern_waves(pattern: str, rng: np.random.Generator, unit: float) -> tuple[list[_Wave], float, float]:
    """Waves, bias and sharpness of a pattern; `unit` is the short side of the frame in pixels."""
    angle, phases = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi, size=5)
    if pattern == "striped":
        return [_wave(angle, unit * rng.uniform(0.3, 0.5), phases[0], 1.0)], 0.0, rng.uniform(1.5, 4.0)
    if pattern == "checked":
        wavelength = unit * rng.uniform(0.4, 0.6)
        waves = [_wave(angle + i * math.pi / 2, wavelength, phases[i], 1.0) for i in range(2)]
        return waves, 0.0, rng.uniform(2.0, 4.0)
    if pattern == "dotted":
        wavelength = unit * rng.uniform(0.34, 0.48)
        # Phases that sum to 3 pi/2 put all three crests on one point of every cell: a hexagonal lattice of round dots.
        triple = (phases[0], phases[1], 1.5 * math.pi - phases[0] - phases[1])
        waves = [_wave(angle + i * 2 * math.pi / 3, wavelength, triple[i], 1.0) for i in range(3)]
        return waves, -0.6, rng.uniform(1.5, 2.5)
    waves = [_wave(rng.uniform(0, 2 * math.pi), unit * rng.uniform(0.4, 0.8), phase, 0.6) for phase in phases]
    return waves, 0.0, rng.uniform(2.0, 4.0)


def sample_background(
    rng: np.random.Generator, unit: float, avoid: dict[str, tuple[int, int, int]], contrast: float = 1.0
) -> tuple[Background, tuple[str, str]]:
    """A background and the names of its two colours.

    Args:
        rng: source of all random draws.
        unit: short side of the frame, pixels; features are about 1/6 to 1/3 of it.
        avoid: sprite colours by name; the background's colours have other names and are clearly different.
        contrast: in (0, 1], brings the two colours nearer to their mean.
    """
    names = [
        name
        for name, rgb in BACKGROUND_COLOURS.items()
        if name not in avoid and all(math.dist(rgb, other) > 90 for other in avoid.values())
    ]
    low = names[rng.integers(len(names))]
    apart = [name for name in names if math.dist(BACKGROUND_COLOURS[name], BACKGROUND_COLOURS[low]) > 75]
    high = apart[rng.integers(len(apart))]
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    waves, bias, sharpness = _pattern_waves(pattern, rng, unit)
    # Light varies along and across a random direction, so that even motion along a stripe is visible.
    angle = rng.uniform(0, math.pi)
    light = [
        _wave(angle + turn, unit * rng.uniform(0.5, 0.9), rng.uniform(0, 2 * math.pi), 0.12)
        for turn in (0.0, math.pi / 2)
    ]
    tint_wave = _wave(rng.uniform(0, math.pi), unit * rng.uniform(1.2, 2.0), rng.uniform(0, 2 * math.pi), 1.0)
    tint = rng.normal(size=3)
    colours = np.array([BACKGROUND_COLOURS[low], BACKGROUND_COLOURS[high]], dtype=np.float64)
    if contrast != 1:
        colours = colours.mean(0) + contrast * (colours - colours.mean(0))
    background = Background(
        pattern=pattern,
        colours=colours,
        tint=26.0 * tint / np.linalg.norm(tint),
        waves=np.array([*waves, *light, tint_wave]),
        num_pattern_waves=len(waves),
        bias=bias,
        sharpness=sharpness,
    )
    return background, (low, high)


def render_background(background: Background, pixel_to_world: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A background as a moving camera sees it.

    Args:
        background: the function of world coordinates.
        pixel_to_world: (T, 2, 3), similarity from pixels to world coordinates.
        size: (W, H).

    Returns:
        (3, T, H, W) float32 in about [0, 255], not clipped.
    """
    width, height = size
    waves = background.waves
    num_frames, num_waves = len(pixel_to_world), len(waves)
    k_pixel = np.einsum("ki,tij->tkj", waves[:, :2], pixel_to_world)  # (T, K, 3): per pixel in x, in y, constant
    along_x = k_pixel[..., 0:1] * np.arange(width)  # (T, K, W)
    along_y = k_pixel[..., 1:2] * np.arange(height) + k_pixel[..., 2:3] + waves[:, 2:3]  # (T, K, H)
    amplitude = waves[:, 3:4]
    columns = np.concatenate([np.sin(along_x), np.cos(along_x)], axis=1)  # (T, 2K, W)
    rows = np.concatenate([amplitude * np.cos(along_y), amplitude * np.sin(along_y)], axis=1)  # (T, 2K, H)
    channel = np.zeros((3, 2 * num_waves, 1))  # pattern, light, tint
    split = background.num_pattern_waves
    for offset in (0, num_waves):
        channel[0, offset : offset + split] = 1
        channel[1, offset + split : offset + num_waves - 1] = 1
        channel[2, offset + num_waves - 1] = 1
    left = torch.from_numpy((channel[:, None] * rows[None]).astype(np.float32)).transpose(-1, -2)  # (3, T, H, 2K)
    right = torch.from_numpy(columns.astype(np.float32)).expand(3, num_frames, -1, -1)
    pattern, light, tint = torch.matmul(left, right)  # each (T, H, W)
    fraction = torch.tanh_((pattern + background.bias) * background.sharpness).mul_(0.5).add_(0.5)
    light = light.add_(1.0)
    low, high = background.colours
    frames = torch.empty(3, num_frames, height, width)
    for c in range(3):
        torch.mul(fraction, float(high[c] - low[c]), out=frames[c])
        frames[c].add_(float(low[c])).mul_(light).add_(tint, alpha=float(background.tint[c]))
    return frames
