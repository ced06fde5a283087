"""The sprite world: endless synthetic clips with exact trajectories, for training and evaluating the whole method.

This file samples scene parameters at random, within the settings of `sprite_world.py`. `scenes.py` defines a scene and
renders it; `shapes.py` and `backgrounds.py` define its parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from imageconductor.conditioning.boxes import Boxes
from imageconductor.data.backgrounds import BACKGROUND_COLOURS, PATTERNS, sample_background
from imageconductor.data.scenes import Scene, Sprite, render, rotation
from imageconductor.data.shapes import EXTENT
from imageconductor.data.sprite_world import (
    PATTERN_NAMES,
    SHAPE_NAMES,
    SPRITE_COLOURS,
    SpriteSet,
    SpriteWorldConfig,
)

_STILL = "stays still"
_MAX_ATTEMPTS = 200
_CAMERA_MOVES = (("pan",), ("zoom",), ("roll",), ("pan", "zoom"), ("pan", "roll"))
_CAMERA_PROBABILITIES = (0.5, 0.16, 0.1, 0.14, 0.1)


def _sample_profile(rng: np.random.Generator, num_frames: int) -> tuple[np.ndarray, bool]:
    """Progress of a motion, (T,) from 0 to at most 1: constant, eased, or there and back, when the flag is true."""
    time = np.linspace(0, 1, num_frames) if num_frames > 1 else np.zeros(1)
    form = rng.choice(3, p=(0.45, 0.45, 0.1))
    if form == 2:
        return 0.75 * np.sin(np.pi * time) ** 2, True
    return (time if form == 0 else time * time * (3 - 2 * time)), False


def _direction_words(direction: np.ndarray) -> str:
    """An image direction in words, such as "left" or "up and left"."""
    across = "right" if direction[0] > 0 else "left"
    along = "down" if direction[1] > 0 else "up"
    slope = abs(direction[1]) / max(abs(direction[0]), 1e-9)
    if slope < math.tan(math.pi / 8):
        return across
    return along if slope > math.tan(3 * math.pi / 8) else f"{along} and {across}"


def _sample_direction(rng: np.random.Generator) -> np.ndarray:
    """A unit vector (2,)."""
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([math.cos(angle), math.sin(angle)])


def _still_camera(num_frames: int) -> np.ndarray:
    return np.tile(np.eye(2, 3), (num_frames, 1, 1))


def _sample_camera(rng: np.random.Generator, config: SpriteWorldConfig) -> tuple[np.ndarray, str]:
    """A camera, (T, 2, 3), world to pixels, and its words: a pan, a zoom, a roll, or a pan with one of the others."""
    moves = _CAMERA_MOVES[rng.choice(len(_CAMERA_MOVES), p=_CAMERA_PROBABILITIES)]
    profile, returns = _sample_profile(rng, config.num_frames)
    strength = profile * (1.0 if len(moves) == 1 else 0.7)
    short = min(config.size)
    centre = (np.array(config.size) - 1) / 2
    pan, log_zoom, roll, words = np.zeros(2), 0.0, 0.0, []
    if "pan" in moves:
        direction = _sample_direction(rng)
        pan = direction * short * rng.uniform(*config.camera_pan)
        words.append(f"pans {_direction_words(direction)}")
    if "zoom" in moves:
        inwards = rng.random() < 0.5
        log_zoom = math.log(rng.uniform(*config.camera_zoom)) * (1 if inwards else -1)
        words.append("zooms in" if inwards else "zooms out")
    if "roll" in moves:
        clockwise = rng.random() < 0.5
        roll = math.radians(rng.uniform(*config.camera_roll_deg)) * (1 if clockwise else -1)
        words.append("rolls clockwise" if clockwise else "rolls counterclockwise")
    camera = _still_camera(config.num_frames)
    for t in range(1, config.num_frames):  # the picture turns and shifts opposite to the camera
        camera[t, :, :2] = math.exp(log_zoom * strength[t]) * rotation(-roll * strength[t])
        camera[t, :, 2] = centre - camera[t, :, :2] @ (centre + pan * strength[t])
    return camera, " and ".join(words) + (" and returns" if returns else "")


def _sample_path(rng: np.random.Generator, config: SpriteWorldConfig, start: np.ndarray) -> tuple[np.ndarray, str]:
    """A sprite's centre in each frame, (T, 2) world coordinates, and its words: a line, an arc or an s-curve."""
    profile, returns = _sample_profile(rng, config.num_frames)
    direction = _sample_direction(rng)
    distance = min(config.size) * rng.uniform(*config.sprite_travel)
    half_waves = rng.integers(3)  # 0 straight, 1 arc, 2 s-curve
    bend = np.sin(half_waves * np.pi * profile) * rng.uniform(0.12, 0.3) * rng.choice((-1, 1))
    across = np.array([-direction[1], direction[0]])
    path = start + distance * (profile[:, None] * direction + bend[:, None] * across)
    return path, f"moves {_direction_words(direction)}" + (" and returns" if returns else "")


def _sample_growth(rng: np.random.Generator, config: SpriteWorldConfig) -> np.ndarray | None:
    """Factors on a sprite's radius, (T,), from 1 on; None, and nothing drawn, in a world whose sprites keep theirs."""
    if config.sprite_growth == (1.0, 1.0):
        return None
    profile, _ = _sample_profile(rng, config.num_frames)
    return np.exp(math.log(rng.uniform(*config.sprite_growth)) * (1 if rng.random() < 0.5 else -1) * profile)


def _sample_placement(
    rng: np.random.Generator, config: SpriteWorldConfig, camera: np.ndarray, others: list[Sprite], radius: float
) -> tuple[np.ndarray, str] | None:
    """A path that starts inside the frame and away from the other sprites.

    Of up to 32 attempts, the first whose path stays in view is taken; otherwise the last that found room. With
    `keep_clear` none is taken but one on which the whole sprite stays in view and clear of the others.

    Returns:
        (T, 2) world coordinates and words, or None if no attempt found room.
    """
    size = np.array(config.size)
    moves = config.kind != SpriteSet.CAMERA
    if config.kind == SpriteSet.MIXED and others:
        moves = rng.random() >= config.still_prob
    found = None
    for _ in range(32):
        margin = EXTENT * radius
        start = rng.uniform(margin - 0.5, size - 0.5 - margin)
        if _meet(start[None], radius, others):
            continue
        path, words = _sample_path(rng, config, start) if moves else (np.tile(start, (config.num_frames, 1)), _STILL)
        centre = np.einsum("tij,tj->ti", camera[:, :, :2], path) + camera[:, :, 2]
        if config.keep_clear:
            reach = radius * np.hypot(camera[:, :1, 0], camera[:, 1:, 0])  # (T, 1)
            if _inside(centre, reach, size) and not _meet(path, radius, others):
                return path, words
        else:
            found = path, words
            if _inside(centre, 0.5 * radius, size):
                break
    return found


def _inside(centre: np.ndarray, margin: np.ndarray | float, size: np.ndarray) -> bool:
    """Whether all pixels (T, 2) are farther than a margin from the borders."""
    return bool(((centre > margin) & (centre < size - margin)).all())


def _meet(path: np.ndarray, radius: float, others: list[Sprite]) -> bool:
    """Whether a sprite on a path (T, 2), or where it starts (1, 2), comes near one of the others."""
    reaches = [(other.path[: len(path)], EXTENT * (radius + other.largest_radius)) for other in others]
    return any((np.hypot(*(path - centre).T) - reach < 0).any() for centre, reach in reaches)


def _sample_sprites(rng: np.random.Generator, config: SpriteWorldConfig, camera: np.ndarray) -> list[Sprite]:
    sprites: list[Sprite] = []
    count = rng.integers(config.min_sprites, config.max_sprites + 1)
    colours = rng.permutation(config.colours)  # each colour at most once: captions stay unambiguous
    shapes = rng.choice(config.shapes, size=count)
    for colour, shape in zip(colours[:count], shapes, strict=True):
        radius = min(config.size) * rng.uniform(*config.sprite_radius)
        growth = _sample_growth(rng, config)
        largest = radius if growth is None else radius * float(growth.max())
        placed = _sample_placement(rng, config, camera, sprites, largest)
        light, tilt = rng.random() < 0.4, math.radians(rng.uniform(-12, 12))
        if placed is None:
            continue
        rgb = np.array(SPRITE_COLOURS[str(colour)], dtype=np.float64)
        r, g, b = (0.25 * rgb + 0.75 * 255 if light else 0.28 * rgb).tolist()
        path, words = placed
        pattern = str(rng.choice(config.patterns)) if config.patterns else None
        sprites.append(Sprite(str(shape), str(colour), (r, g, b), radius, tilt, path, words, pattern, growth))
    return sprites


def sample_scene(config: SpriteWorldConfig, index: int) -> Scene:
    """Clip number `index` of the set; all random draws derive from (config.seed, config.kind, index).

    Raises:
        ValueError: The index is negative, or `min_sprites` sprites find no room.
    """
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    rng = np.random.default_rng([config.seed, list(SpriteSet).index(config.kind), index])
    fixed = config.kind == SpriteSet.OBJECT or (config.kind == SpriteSet.MIXED and rng.random() < config.still_prob)
    camera, camera_words = (_still_camera(config.num_frames), _STILL) if fixed else _sample_camera(rng, config)
    sprites = _sample_sprites(rng, config, camera)
    for _ in range(_MAX_ATTEMPTS):
        if len(sprites) >= config.min_sprites:
            break
        sprites = _sample_sprites(rng, config, camera)  # The first ones left no room for the others.
    else:
        raise ValueError(f"no room for {config.min_sprites} sprites; make sprite_radius or the camera's motion smaller")
    avoid = {sprite.colour: SPRITE_COLOURS[sprite.colour] for sprite in sprites}
    background, colours = sample_background(rng, min(config.size), avoid, config.background_contrast)
    caption = _describe(sprites, colours, background.pattern)
    if rng.random() < config.caption_motion_prob:
        caption += f", the camera {camera_words}"
        moving = [sprite for sprite in sprites if sprite.motion != _STILL]
        if moving:
            named = moving[rng.integers(len(moving))]
            caption += f", the {named.name} {named.motion}"
    return Scene(config.size, camera, tuple(sprites), background, caption, camera_words, config.style)


def _describe(sprites: list[Sprite], colours: tuple[str, str], pattern: str) -> str:
    things = [f"{'an' if sprite.name[0] in 'aeiou' else 'a'} {sprite.name}" for sprite in sprites]
    listed = " and ".join(filter(None, [", ".join(things[:-1]), things[-1]]))
    article = "an" if colours[0][0] in "aeiou" else "a"
    return f"{listed} on {article} {colours[0]} and {colours[1]} {pattern} background"


def captions(config: SpriteWorldConfig, count: int) -> Iterator[str]:
    """The captions of the first `count` clips, which are not rendered; a tokenizer is trained on them."""
    return (sample_scene(config, index).caption for index in range(count))


def caption_words() -> list[str]:
    """Every word that a caption can hold, sorted; its only other characters are spaces and commas."""
    frame = "a an and on background the camera stays still pans moves left right up down returns"
    turns = "zooms in out rolls clockwise counterclockwise"
    return sorted(
        {*frame.split(), *turns.split(), *SHAPE_NAMES, *SPRITE_COLOURS, *PATTERN_NAMES, *BACKGROUND_COLOURS, *PATTERNS}
    )


def _boxes_at(scene: Scene, frames: Sequence[int] | None) -> Boxes:
    boxes = scene.boxes()
    return boxes if frames is None else boxes.at_frames(frames)


class SpriteDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The first `length` clips of a sprite world, rendered on demand.

    A sample holds pixel_values (3, T, H, W) uint8; points (N, T, 2) float32 pixels and visible (N, T) bool for a grid
    of N = config.grid ** 2 points of frame 0; caption; key. Another `config.seed` gives a validation set. With
    `has_boxes` it holds `boxes`, those of its sprites, too.
    """

    def __init__(self, config: SpriteWorldConfig, length: int = 100_000, has_boxes: bool = False) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.config = config
        self.length = length
        self.has_boxes = has_boxes
        width, height = config.size
        steps = (torch.arange(config.grid, dtype=torch.float64) + 0.5) / config.grid
        y, x = torch.meshgrid(steps * height - 0.5, steps * width - 0.5, indexing="ij")
        self.grid_points = torch.stack([x, y], dim=-1).reshape(-1, 2)

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """The exact description of a sample."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside 0..{self.length - 1}")
        return sample_scene(self.config, index)

    def batch(self, indices: Sequence[int], frames: Sequence[int] | None = None) -> dict[str, Any]:
        """Samples, or some frames of them, stacked along a new first axis; caption and key become lists."""
        scenes = [self.scene(int(index)) for index in indices]
        tracks = [scene.track(self.grid_points) for scene in scenes]
        chosen = slice(None) if frames is None else list(frames)
        return {
            **({"boxes": [_boxes_at(scene, frames) for scene in scenes]} if self.has_boxes else {}),
            "pixel_values": render(scenes, frames),
            "points": torch.stack([points[:, chosen] for points, _ in tracks]),
            "visible": torch.stack([visible[:, chosen] for _, visible in tracks]),
            "caption": [scene.caption for scene in scenes],
            "key": [f"{self.config.kind.value}-{self.config.seed}-{int(index):08d}" for index in indices],
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.batch([index]).items()}
