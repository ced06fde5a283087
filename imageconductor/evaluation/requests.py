"""What is asked for: a first frame, a prompt and trajectories, and the background that ought to stay where it is.

| first frames | motions | camera set | object set |
|---|---|---|---|
| sprite scenes | own | background points under the scene's own camera | centres of the moving sprites |
| sprite scenes | presets | each camera preset | each object preset, from the first sprite's centre |
| a folder of images | presets | each camera preset | each object preset, from the objects its JSON names |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imageconductor.conditioning import Trajectories, camera_preset, cover_crop, load_image, object_preset
from imageconductor.conditioning.trajectories import inside
from imageconductor.data.sprites import Scene, SpriteSet, SpriteWorldConfig, render, sample_scene
from imageconductor.evaluation.evaluate_config import EvaluateConfig, RequestSet

_TRACKER_REACH_PX = 4  # of the sprite world: this far from a sprite, true clips leak 0.00 px
_OBJECT_SHARE = 0.2  # of the shorter side: how far from an object's path the background is taken to begin
_NONE = np.zeros((0, 2))
_IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Request:
    """One video that is asked for.

    Attributes:
        key: Name of its file.
        image: (H, W, 3) uint8, the first frame.
        prompt: What it shows.
        trajectories: What is requested.
        background: (M, 2) pixels of the first frame, off the objects, that ought to stay; none in the camera set.
        seed: Of the initial noise.
        truth: (T, H, W, 3) uint8, the clip itself, where it is known.
    """

    key: str
    image: NDArray[np.uint8]
    prompt: str
    trajectories: Trajectories
    background: NDArray[np.float64]
    seed: int
    truth: NDArray[np.uint8] | None = None


def build_requests(config: EvaluateConfig, kind: RequestSet, size: tuple[int, int], num_frames: int) -> list[Request]:
    """All requests of a set, the same in every process.

    Raises:
        ValueError, FileNotFoundError: The folder of images lacks something; names the file.
    """
    if config.images is not None:
        return _of_images(config, kind, size, num_frames)
    if config.motions == "presets":
        return _of_presets(config, kind, size, num_frames)
    return _of_scenes(config, kind, size, num_frames)


def reference_clips(config: EvaluateConfig, size: tuple[int, int], num_frames: int) -> list[NDArray[np.uint8]]:
    """Clips of the sprite world to compare with, none of them requested."""
    world = _world(config, SpriteSet.MIXED, size, num_frames, seed=config.world_seed + 1)
    scenes = [sample_scene(world, index) for index in range(config.num_reference)]
    return [_frames(scene) for scene in scenes]


def _of_scenes(config: EvaluateConfig, kind: RequestSet, size: tuple[int, int], num_frames: int) -> list[Request]:
    world = _world(config, SpriteSet(kind), size, num_frames)
    made: list[Request] = []
    index = 0
    while len(made) < config.num_scenes:
        scene = sample_scene(world, index)
        background = _background(scene)
        trajectories = _camera_tracks(scene, background, config.num_points, index)
        still = _NONE
        if kind == "object":
            trajectories, still = _object_tracks(scene), background.numpy()
        if trajectories.num_tracks and len(background):
            truth = _frames(scene)
            seed = config.seed + len(made)
            made.append(Request(f"{kind}-{index}", truth[0], scene.caption, trajectories, still, seed, truth))
        index += 1
    return made


def _of_presets(config: EvaluateConfig, kind: RequestSet, size: tuple[int, int], num_frames: int) -> list[Request]:
    world = _world(config, SpriteSet.OBJECT, size, num_frames)
    made = []
    for index in range(config.num_scenes):
        scene = sample_scene(world, index)
        image = _frames(scene)[0]
        centres = scene.object_centres()[0][:, 0].numpy()
        margins = [1.3 * sprite.radius + _TRACKER_REACH_PX for sprite in scene.sprites]
        for preset in _presets(config, kind):
            trajectories = _preset(config, kind, preset, size, num_frames, centres[:1])
            background = _NONE
            if kind == "object":  # The first sprite is dragged along its path, the others are to stay where they are.
                paths = [trajectories.points[0].numpy(), *centres[1:, None]]
                background = _clear(_grid(size).numpy(), paths, margins)
            key = f"scene-{index}_{preset}"
            made.append(Request(key, image, scene.caption, trajectories, background, config.seed + len(made)))
    return made


def _of_images(config: EvaluateConfig, kind: RequestSet, size: tuple[int, int], num_frames: int) -> list[Request]:
    folder = Path(config.images or "")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(_IMAGES)})")
    stems = [path.stem for path in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"{folder} holds two images called {twice[0]}")
    margin = _OBJECT_SHARE * min(size)
    made = []
    for path in files:
        picture = load_image(path)
        caption, objects = _description(path.with_suffix(".json"), picture.size)
        image = np.asarray(cover_crop(picture, size))
        starts = objects.cover_crop(size)
        if kind == "object" and not inside(starts.points, size).all():
            raise ValueError(f"{path.with_suffix('.json')}: an object lies outside the {size[0]}x{size[1]} crop")
        if kind == "object" and not starts.num_tracks:
            continue
        for preset in _presets(config, kind):
            trajectories = _preset(config, kind, preset, size, num_frames, starts.points[:, 0].numpy())
            background = _NONE
            if kind == "object":
                paths = list(trajectories.points.numpy())
                background = _clear(_grid(size).numpy(), paths, [margin] * len(paths))
            made.append(
                Request(f"{path.stem}_{preset}", image, caption, trajectories, background, config.seed + len(made))
            )
    if not made:
        raise ValueError(f'no image in {folder} names an object: "objects": [[x, y], ...] in NAME.json')
    return made


def _description(path: Path, size: tuple[int, int]) -> tuple[str, Trajectories]:
    """Caption, and one-frame tracks of the objects, of an image's JSON file."""
    wanted = '{"caption": "...", "objects": [[x, y], ...]}'
    if not path.is_file():
        raise FileNotFoundError(f"each image needs its JSON; there is no {path}: {wanted}")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        caption, objects = content["caption"], np.asarray(content.get("objects", []), np.float64).reshape(-1, 2)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected {wanted}") from error
    width, height = size
    for x, y in objects:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"{path}: object ({x:g}, {y:g}) lies outside the {width}x{height} image")
    points = torch.from_numpy(objects)[:, None]
    return str(caption), Trajectories(points, torch.ones(points.shape[:2], dtype=torch.bool), size)


def _presets(config: EvaluateConfig, kind: RequestSet) -> list[str]:
    return config.camera_presets if kind == "camera" else config.object_presets


def _preset(
    config: EvaluateConfig, kind: RequestSet, name: str, size: tuple[int, int], num_frames: int, starts: NDArray
) -> Trajectories:
    if kind == "camera":
        return camera_preset(name, size, num_frames, strength=config.strength)
    tracks = [
        object_preset(name, size, num_frames, start=(float(x), float(y)), strength=config.strength) for x, y in starts
    ]
    points, visible = (torch.cat([getattr(track, part) for track in tracks]) for part in ("points", "visible"))
    return Trajectories(points, visible, size)


def _world(
    config: EvaluateConfig, kind: SpriteSet, size: tuple[int, int], num_frames: int, seed: int | None = None
) -> SpriteWorldConfig:
    seed = config.world_seed if seed is None else seed
    return SpriteWorldConfig(
        size=size, num_frames=num_frames, kind=kind, seed=seed, caption_motion_prob=0, style=config.style
    )


def _frames(scene: Scene) -> NDArray[np.uint8]:
    return render([scene])[0].permute(1, 2, 3, 0).numpy()


def _grid(size: tuple[int, int]) -> torch.Tensor:
    x, y = (torch.linspace(0.1, 0.9, 8, dtype=torch.float64) * side for side in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def _clear(grid: NDArray[np.float64], paths: list[NDArray], margins: list[float]) -> NDArray[np.float64]:
    """Points of the grid that stay further than its margin from every path (T, 2)."""
    clear = np.ones(len(grid), bool)
    for path, margin in zip(paths, margins, strict=True):
        clear &= (np.linalg.norm(grid[:, None] - path, axis=-1) > margin).all(axis=1)
    return grid[clear]


def _background(scene: Scene) -> torch.Tensor:
    """Grid points of frame 0 that no sprite covers or comes near, so that a tracker's window holds none: (M, 2)."""
    grid = _grid(scene.size)
    grid = grid[scene.on_sprite(grid) < 0]
    points, visible = scene.track(grid)
    clear = visible.all(dim=1)
    for sprite, centres in zip(scene.sprites, scene.object_centres()[0], strict=True):
        clear &= ((points - centres).norm(dim=-1) > 1.3 * sprite.radius + _TRACKER_REACH_PX).all(dim=1)
    return grid[clear]


def _camera_tracks(scene: Scene, background: torch.Tensor, count: int, index: int) -> Trajectories:
    generator = torch.Generator().manual_seed(index)
    chosen = background[torch.randperm(len(background), generator=generator)[:count]]
    points, visible = scene.track(chosen)
    return Trajectories(points.double(), visible, scene.size)


def _object_tracks(scene: Scene) -> Trajectories:
    points, visible = scene.object_centres()
    moves = (points - points[:, :1]).norm(dim=-1).amax(dim=1) > 2
    return Trajectories(points[moves].double(), visible[moves], scene.size)
