"""One clip of the sprite world: its description, its exact tracks, and its pixels.

World coordinates are the pixels of frame 0. The camera is a similarity per frame that maps them to the pixels of that
frame; a sprite adds a translation of its own. The track of any point and its visibility follow in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from imageconductor.conditioning.boxes import Boxes
from imageconductor.data.backgrounds import Background, render_background
from imageconductor.data.shapes import EXTENT, outline, pattern_distance, signed_distance
from imageconductor.data.sprite_world import SPRITE_COLOURS

_INK, _PAPER = (28.0, 36.0, 84.0), (246.0, 238.0, 216.0)


@dataclass(frozen=True)
class Sprite:
    """A coloured shape that moves without turning.

    Attributes:
        shape, colour: of `SHAPE_NAMES`, and a key of `SPRITE_COLOURS`.
        outline: RGB in [0, 255], of the pattern too.
        radius: world pixels.
        tilt: radians, clockwise on the screen.
        path: (T, 2), its centre in each frame, world coordinates.
        motion: phrase for captions, such as "moves left".
        pattern: of `PATTERN_NAMES`, drawn on the sprite and fixed to it; None = plain.
        growth: (T,), factor on the radius in each frame, 1 in frame 0; None = 1 in all.
    """

    shape: str
    colour: str
    outline: tuple[float, float, float]
    radius: float
    tilt: float
    path: np.ndarray
    motion: str = "stays still"
    pattern: str | None = None
    growth: np.ndarray | None = None

    @property
    def largest_radius(self) -> float:
        """Of all frames, world pixels."""
        return self.radius if self.growth is None else self.radius * float(self.growth.max())

    @property
    def name(self) -> str:
        """Phrase for captions, such as "red circle" or "striped red circle"."""
        return " ".join(filter(None, [self.pattern, self.colour, self.shape]))


@dataclass(frozen=True)
class Scene:
    """The analytic description of one clip.

    Attributes:
        size: (W, H).
        camera: (T, 2, 3), world coordinates to pixels; the identity in frame 0.
        sprites: later ones are in front.
        background: a function of world coordinates.
        caption: lower case.
        camera_motion: phrase for captions, such as "pans left".
        style: "colour", or "ink": the brightness of "colour" in blue ink on cream paper.
    """

    size: tuple[int, int]
    camera: np.ndarray
    sprites: tuple[Sprite, ...]
    background: Background
    caption: str
    camera_motion: str = "stays still"
    style: str = "colour"

    @property
    def num_frames(self) -> int:
        """Number of frames, T."""
        return len(self.camera)

    def on_sprite(self, points: Tensor | np.ndarray) -> Tensor:
        """(N,) int64: index of the foremost sprite at each of the points (N, 2) of frame 0, -1 for the background."""
        world = torch.as_tensor(points, dtype=torch.float64)
        index = torch.full(world.shape[:-1], -1, dtype=torch.int64)
        for s in range(len(self.sprites)):
            index[self._inside(s, world[:, None])[:, 0]] = s
        return index

    def track(self, points: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Tracks of points of frame 0.

        Args:
            points: (N, 2) xy in pixels of frame 0. A point on a sprite moves with the sprite and the camera, any other
                with the camera alone.

        Returns:
            points (N, T, 2) float32 pixels, and visible (N, T) bool: inside the frame, which is
            [-0.5, W - 0.5) x [-0.5, H - 0.5), and not covered by a sprite in front.

        Raises:
            ValueError: if the points are not (N, 2).
        """
        start = torch.as_tensor(points, dtype=torch.float64)
        if start.ndim != 2 or start.shape[1] != 2:
            raise ValueError(f"points must be (N, 2), got {tuple(start.shape)}")
        return self._follow(start, self.on_sprite(start))

    def object_centres(self) -> tuple[Tensor, Tensor]:
        """The sprites' centres: (S, T, 2) float32 pixels, and visible (S, T) bool as in `track`."""
        start = np.array([sprite.path[0] for sprite in self.sprites]).reshape(-1, 2)
        return self._follow(torch.from_numpy(start), torch.arange(len(self.sprites)))

    def boxes(self) -> Boxes:
        """The sprites' bounding boxes by their names, exact to a hundredth of a radius; also where others cover them.

        A sprite is absent where less than a quarter of its box is in the frame.
        """
        found = []
        for sprite in self.sprites:
            shape = outline(sprite.shape) @ rotation(sprite.tilt).T * sprite.radius  # (P, 2)
            growth = np.ones(self.num_frames) if sprite.growth is None else sprite.growth
            world = sprite.path[:, None] + growth[:, None, None] * shape  # (T, P, 2)
            pixels = np.einsum("tij,tpj->tpi", self.camera[:, :, :2], world) + self.camera[:, None, :, 2] + 0.5
            found.append(np.concatenate([pixels.min(axis=1), pixels.max(axis=1)], axis=-1))
        whole = torch.from_numpy(np.stack(found) if found else np.zeros((0, self.num_frames, 4)))
        inside = whole.clamp(min=0).minimum(whole.new_tensor([*self.size, *self.size]))
        area, seen = ((x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (whole, inside))
        return Boxes(inside, seen >= 0.25 * area, tuple(sprite.name for sprite in self.sprites), self.size)

    def _follow(self, start: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        still = np.zeros((1, self.num_frames, 2))
        moves = torch.from_numpy(np.concatenate([still, *[(s.path - s.path[0])[None] for s in self.sprites]]))
        world = start[:, None] + moves[owner + 1]  # (N, T, 2)
        for s, sprite in enumerate(self.sprites):
            if sprite.growth is not None:
                on_it = owner == s
                offset = start[on_it] - torch.from_numpy(sprite.path[0])
                world[on_it] += torch.from_numpy(sprite.growth - 1)[:, None] * offset[:, None]
        camera = torch.from_numpy(self.camera)
        pixels = torch.einsum("tij,ntj->nti", camera[:, :, :2], world) + camera[:, :, 2]
        limit = torch.tensor(self.size, dtype=torch.float64) - 0.5
        visible = ((pixels >= -0.5) & (pixels < limit)).all(-1)
        for s in range(len(self.sprites)):
            visible &= ~(self._inside(s, world) & (owner < s)[:, None])
        return pixels.float(), visible

    def sources(self, cell: int = 1) -> tuple[Tensor, Tensor]:
        """Where in frame 0 the content of each frame lies, the inverse of `track`.

        Args:
            cell: side of the square cells, in pixels, whose centres are asked for.

        Returns:
            points (T, H/cell, W/cell, 2) float32 pixels of frame 0, which may lie outside it or be covered there; and
            owner (T, H/cell, W/cell) int64, the foremost sprite, -1 for the background.
        """
        steps = [(torch.arange(side // cell, dtype=torch.float64) + 0.5) * cell - 0.5 for side in self.size]
        pixels = torch.stack(torch.meshgrid(*steps, indexing="xy"), dim=-1)  # (h, w, 2)
        camera = torch.from_numpy(self.camera)
        offset = pixels.reshape(-1, 1, 2) - camera[:, :, 2]
        world = torch.einsum("tij,ntj->nti", torch.linalg.inv(camera[:, :, :2]), offset)  # (N, T, 2)
        points, owner = world.clone(), torch.full(world.shape[:2], -1)
        for s, sprite in enumerate(self.sprites):
            inside = self._inside(s, world)
            owner[inside] = s
            source = world - torch.from_numpy(sprite.path - sprite.path[0])
            if sprite.growth is not None:
                offset = (world - torch.from_numpy(sprite.path)) / torch.from_numpy(sprite.growth)[:, None]
                source = torch.from_numpy(sprite.path[0]) + offset
            points = torch.where(inside[..., None], source, points)
        height, width = pixels.shape[:2]
        points = points.unflatten(0, (height, width)).movedim(2, 0)
        return points.float(), owner.unflatten(0, (height, width)).movedim(2, 0)

    def _inside(self, s: int, world: Tensor) -> Tensor:
        """(N, T) bool: whether the world points (N, T, 2) lie in sprite s in their frames; T = 1 means frame 0."""
        sprite = self.sprites[s]
        offset = world - torch.from_numpy(sprite.path[: world.shape[1]])
        turn = torch.from_numpy(rotation(-sprite.tilt) / sprite.radius)
        if sprite.growth is not None:
            offset = offset / torch.from_numpy(sprite.growth[: world.shape[1]])[:, None]
        return signed_distance(sprite.shape, offset @ turn.T) < 0


def rotation(angle: float) -> np.ndarray:
    """Rotation matrix (2, 2), clockwise on the screen for a positive angle, since y points down."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _paint(frames: Tensor, sprite: Sprite, camera: np.ndarray) -> None:
    """Blends one sprite over frames (3, T, H, W) float, in place, within a window around the sprite."""
    height, width = frames.shape[2:]
    growth = np.ones(len(camera)) if sprite.growth is None else sprite.growth
    scale = np.hypot(camera[:, 0, 0], camera[:, 1, 0]) * growth  # (T,)
    centre = np.einsum("tij,tj->ti", camera[:, :, :2], sprite.path) + camera[:, :, 2]
    reach = math.ceil(EXTENT * sprite.radius * scale.max()) + 1
    span = np.arange(-reach, reach + 1)
    x = np.round(centre[:, :1]).astype(np.int64) + span  # (T, P)
    y = np.round(centre[:, 1:]).astype(np.int64) + span
    t, row, column = np.nonzero(((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :])
    if not len(t):
        return
    x, y = x[t, column], y[t, row]  # (n,) every pixel of the windows that lies in the frame
    pixel = np.stack([x, y], axis=-1) - centre[t]
    inverse = rotation(-sprite.tilt) @ np.linalg.inv(camera[:, :, :2]) / sprite.radius  # (T, 2, 2)
    inverse = inverse / growth[:, None, None]
    local = np.einsum("nij,nj->ni", inverse[t], pixel).astype(np.float32)
    size_px = torch.from_numpy((sprite.radius * scale)[t].astype(np.float32))
    place = torch.from_numpy(local)
    distance = signed_distance(sprite.shape, place) * size_px
    near = torch.nonzero(distance < 0.5)[:, 0]
    distance, size_px = distance[near], size_px[near]
    cover = (0.5 - distance).clamp_(0, 1)  # covered fraction of a pixel at that distance from an edge
    fill = (0.5 - distance - 0.15 * size_px).clamp_(0, 1)
    if sprite.pattern is not None:
        fill *= (0.5 + pattern_distance(sprite.pattern, place[near]) * size_px).clamp_(0, 1)
    where = torch.from_numpy((t * height + y) * width + x)[near]
    for c in range(3):
        edge, inner = float(sprite.outline[c]), float(SPRITE_COLOURS[sprite.colour][c])
        channel = frames[c].view(-1)
        below = channel[where]
        channel[where] = below + (edge + (inner - edge) * fill - below) * cover


def render(scenes: Sequence[Scene], frames: Sequence[int] | None = None) -> Tensor:
    """Pixels of scenes of one size and length, or of some of their frames.

    Clips are drawn one by one, which is faster (a clip fits the CPU cache) and makes a clip independent of its batch.

    Returns:
        (B, 3, T, H, W) uint8.

    Raises:
        ValueError: if there are no scenes or they differ in size or length.
    """
    if len({(scene.size, scene.num_frames) for scene in scenes}) != 1:
        raise ValueError(f"render needs scenes of one size and length, got {[(s.size, s.num_frames) for s in scenes]}")
    clips = []
    for scene in scenes:
        chosen = list(range(scene.num_frames) if frames is None else frames)
        camera = scene.camera[chosen]
        linear = np.linalg.inv(camera[:, :, :2])
        shift = -np.einsum("tij,tj->ti", linear, camera[:, :, 2])
        pixel_to_world = np.concatenate([linear, shift[..., None]], axis=-1)
        clip = render_background(scene.background, pixel_to_world, scene.size)
        for sprite in scene.sprites:
            growth = None if sprite.growth is None else sprite.growth[chosen]
            _paint(clip, replace(sprite, path=sprite.path[chosen], growth=growth), camera)
        if scene.style == "ink":
            clip = _apply_ink(clip)
        clips.append(clip.add_(0.5).clamp_(0, 255).to(torch.uint8))
    return torch.stack(clips)


def _apply_ink(clip: Tensor) -> Tensor:
    """A clip (3, T, H, W) in [0, 255] as ink on paper of the same brightness (Rec. 601)."""
    brightness = torch.einsum("c...,c->...", clip, clip.new_tensor((0.299, 0.587, 0.114))) / 255
    ink, paper = (clip.new_tensor(colour).view(3, 1, 1, 1) for colour in (_INK, _PAPER))
    return ink + (paper - ink) * brightness
