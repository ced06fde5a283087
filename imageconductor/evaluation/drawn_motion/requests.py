"""Requests: a first frame, a prompt and trajectories, and points of the background, which should stay where it is.

| first frames | motions | camera set | object set |
|---|---|---|---|
| sprite scenes | own | background points under the scene's own camera | centres of the moving sprites |
| sprite scenes | presets | each camera preset | each object preset, from the first sprite's centre |
| a folder of images | presets | each camera preset | each object preset, from the objects its JSON names |

Requests are drawn in the evaluation's format; `video_format` brings them into that of a method.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imageconductor.conditioning import Trajectories, camera_preset, cover_crop, load_image, object_preset
from imageconductor.conditioning.trajectories import inside
from imageconductor.data.sprite_world import SPRITE_COLOURS, SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import Scene, render, sample_scene
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, RequestSet
from imageconductor.evaluation.drawn_motion.fixed_requests import FixedRequests
from imageconductor.files import read_text

_TRACKER_REACH_PX = 4  # farther than this from every sprite, the background displacement of true clips is 0.00 px
_OBJECT_FRACTION = 0.2  # of the shorter side: the distance from an object's path at which the background begins
_NO_POINTS = np.zeros((0, 2))
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Request:
    """A request for one video.

    Attributes:
        key: Name of the video's file, without suffix.
        image: (H, W, 3) uint8, the first frame.
        prompt: Description of the image.
        trajectories: Tracks that the video should follow.
        background: (M, 2) points of the first frame in pixels, away from the objects, that should stay where they are;
            M = 0 in the camera set.
        seed: Seed of the initial noise.
        source: Name of the image or scene that the request begins with; intervals draw these.
        truth: (T, H, W, 3) uint8, the clip that really begins so, where it is known.
        picture: The picture whose `cover_crop` is `image`; None = `image` itself.
        colours: (N, 3) RGB in [0, 255] of what each track moves, which nothing else in the frame has; None = not known.
    """

    key: str
    image: NDArray[np.uint8]
    prompt: str
    trajectories: Trajectories
    background: NDArray[np.float64]
    seed: int
    source: str
    truth: NDArray[np.uint8] | None = None
    picture: Image.Image | None = None
    colours: NDArray[np.float64] | None = None

    @cached_property
    def sha256(self) -> str:
        """Of all that a video is judged by, hexadecimal: first frame, prompt, trajectories, background."""
        drawn = self.trajectories
        arrays = (self.image, drawn.points.numpy(), drawn.visible.numpy(), drawn.still.numpy(), self.background)
        digest = hashlib.sha256(json.dumps([self.prompt, drawn.size, [array.shape for array in arrays]]).encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def build_sets(config: EvaluateConfig, size: tuple[int, int], num_frames: int) -> dict[RequestSet, list[Request]]:
    """The requests of each set that a task needs; see `build_requests`."""
    kinds: list[RequestSet] = [task.requests for task in config.tasks.values()]
    return {kind: build_requests(config, kind, size, num_frames) for kind in sorted(set(kinds))}


def build_requests(config: EvaluateConfig, kind: RequestSet, size: tuple[int, int], num_frames: int) -> list[Request]:
    """All requests of a set, the same in every process.

    Raises:
        ValueError, FileNotFoundError: The folder of images lacks something; the message names the file.
    """
    if config.fixed_requests is not None:
        return _build_fixed_requests(config, FixedRequests.load(config.fixed_requests), kind, size, num_frames)
    if config.images is not None:
        return _build_image_requests(config, kind, size, num_frames)
    if config.motions == "presets":
        return _build_preset_requests(config, kind, size, num_frames)
    return _build_scene_requests(config, kind, size, num_frames)


def build_world(
    config: EvaluateConfig, kind: SpriteSet, size: tuple[int, int], num_frames: int, seed: int | None = None
) -> SpriteWorldConfig:
    """The sprite world from which scenes are sampled; captions say nothing about motion.

    Args:
        config: Settings of the evaluation.
        kind: The set of scenes.
        size: (W, H) of the clips.
        num_frames: Frames of each clip.
        seed: Seed of the scenes; None = the evaluation's `world_seed`.
    """
    seed = config.world_seed if seed is None else seed
    own = {"size": size, "num_frames": num_frames, "kind": kind, "seed": seed, "style": config.style}
    return replace(config.world, **own, caption_motion_prob=0)


def render_frames(scene: Scene) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) of a scene."""
    return render([scene])[0].permute(1, 2, 3, 0).numpy()


def _build_fixed_requests(
    config: EvaluateConfig, fixed: FixedRequests, kind: RequestSet, size: tuple[int, int], num_frames: int
) -> list[Request]:
    """Every preset of the fixed set on every image or sprite scene, with the seeds of the set.

    Raises:
        ValueError: There are not as many images as the set has places, or one of them names no object.
    """
    presets = {f"{name}_presets": names for name, names in fixed.presets.items()}
    given: dict[str, Any] = {"strength": fixed.strength, **presets, "motions": "presets"}
    if config.images is None:
        given["num_scenes"] = fixed.num_images
    config = replace(config, fixed_requests=None, **given)
    requests = build_requests(config, kind, size, num_frames)
    sources = list(dict.fromkeys(request.source for request in requests))
    if len(sources) != fixed.num_images:
        what = "images that name an object" if kind == "object" else "images"
        raise ValueError(
            f"{fixed.path} has places for {fixed.num_images} images, and {config.images} holds {len(sources)} {what}; "
            "fixed_requests=null takes any number"
        )
    seeds = [seed for row in fixed.seeds[kind] for seed in row]
    return [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]


def _build_scene_requests(
    config: EvaluateConfig, kind: RequestSet, size: tuple[int, int], num_frames: int
) -> list[Request]:
    """The motions of sprite scenes; scenes without any are passed over."""
    world = build_world(config, SpriteSet(kind), size, num_frames)
    requests: list[Request] = []
    index = 0
    while len(requests) < config.num_scenes:
        scene = sample_scene(world, index)
        background = _select_background(scene)
        trajectories = _select_camera_tracks(scene, background, config.num_points, index)
        still, colours = _NO_POINTS, None
        if kind == "object":
            trajectories, colours = _select_object_tracks(scene)
            still = background.numpy()
        if trajectories.num_tracks and len(background):
            truth = render_frames(scene)
            seed = config.seed + len(requests)
            key = f"{kind}-{index}"
            request = Request(key, truth[0], scene.caption, trajectories, still, seed, key, truth, colours=colours)
            requests.append(request)
        index += 1
    return requests


def _build_preset_requests(
    config: EvaluateConfig, kind: RequestSet, size: tuple[int, int], num_frames: int
) -> list[Request]:
    """Every preset on every sprite scene."""
    world = build_world(config, SpriteSet.OBJECT, size, num_frames)
    requests = []
    for index in range(config.num_scenes):
        scene = sample_scene(world, index)
        image = render_frames(scene)[0]
        centres = scene.object_centres()[0][:, 0].numpy()
        margins = [1.3 * sprite.radius + _TRACKER_REACH_PX for sprite in scene.sprites]
        for preset in _list_presets(config, kind):
            trajectories = _build_preset_tracks(config, kind, preset, size, num_frames, centres[:1])
            background, colours = _NO_POINTS, None
            if kind == "object":  # The first sprite is dragged along its path, the others should stay where they are.
                paths = [trajectories.points[0].numpy(), *centres[1:, None]]
                background = _keep_distant(_build_grid(size).numpy(), paths, margins)
                colours = _list_colours(scene, np.array([0]))
            key = f"scene-{index}_{preset}"
            seed, source = config.seed + len(requests), f"scene-{index}"
            given = image, scene.caption, trajectories, background, seed, source
            requests.append(Request(key, *given, colours=colours))
    return requests


def _build_image_requests(
    config: EvaluateConfig, kind: RequestSet, size: tuple[int, int], num_frames: int
) -> list[Request]:
    """Every preset on every image; images without objects have no request in the object set."""
    folder = Path(config.images or "")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(_IMAGE_SUFFIXES)})")
    stems = [path.stem for path in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"{folder} holds two images called {twice[0]}")
    requests = []
    for path in files:
        picture = load_image(path)
        caption, objects = _read_description(path.with_suffix(".json"), picture.size)
        image = np.array(cover_crop(picture, size))
        starts = objects.cover_crop(size)
        if kind == "object" and not inside(starts.points, size).all():
            raise ValueError(f"{path.with_suffix('.json')}: an object lies outside the {size[0]}x{size[1]} crop")
        if kind == "object" and not starts.num_tracks:
            continue
        for preset in _list_presets(config, kind):
            trajectories = _build_preset_tracks(config, kind, preset, size, num_frames, starts.points[:, 0].numpy())
            background = _NO_POINTS
            if kind == "object":
                background = select_background(size, list(trajectories.points.numpy()))
            key, seed = f"{path.stem}_{preset}", config.seed + len(requests)
            requests.append(Request(key, image, caption, trajectories, background, seed, path.stem, picture=picture))
    if not requests:
        raise ValueError(f'no image in {folder} names an object: "objects": [[x, y], ...] in NAME.json')
    return requests


def select_background(size: tuple[int, int], paths: Sequence[NDArray]) -> NDArray[np.float64]:
    """(M, 2) pixels: points of a grid over the frame that are a fifth of its shorter side away from every path.

    Args:
        size: (W, H).
        paths: (T, 2) pixels of each object.
    """
    return _keep_distant(_build_grid(size).numpy(), list(paths), [_OBJECT_FRACTION * min(size)] * len(paths))


def _read_description(path: Path, size: tuple[int, int]) -> tuple[str, Trajectories]:
    """Caption and one-frame tracks of the objects, from an image's JSON file."""
    expected = '{"caption": "...", "objects": [[x, y], ...]}'
    if not path.is_file():
        raise FileNotFoundError(f"each image needs its JSON; there is no {path}: {expected}")
    text = read_text(path)
    try:
        content: Any = json.loads(text)
        caption, objects = content["caption"], np.asarray(content.get("objects", []), np.float64).reshape(-1, 2)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected {expected}") from error
    width, height = size
    for x, y in objects:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"{path}: object ({x:g}, {y:g}) lies outside the {width}x{height} image")
    points = torch.from_numpy(objects)[:, None]
    return str(caption), Trajectories(points, torch.ones(points.shape[:2], dtype=torch.bool), size)


def _list_presets(config: EvaluateConfig, kind: RequestSet) -> list[str]:
    return config.camera_presets if kind == "camera" else config.object_presets


def _build_preset_tracks(
    config: EvaluateConfig, kind: RequestSet, name: str, size: tuple[int, int], num_frames: int, starts: NDArray
) -> Trajectories:
    """Tracks of a preset: the camera preset's own grid, or the object preset from each start (N, 2)."""
    if kind == "camera":
        return camera_preset(name, size, num_frames, strength=config.strength)
    return Trajectories.join(
        [object_preset(name, size, num_frames, start=(float(x), float(y)), strength=config.strength) for x, y in starts]
    )


def _build_grid(size: tuple[int, int]) -> torch.Tensor:
    """(64, 2) pixels: 8 x 8 points, from a tenth to nine tenths of each side."""
    x, y = (torch.linspace(0.1, 0.9, 8, dtype=torch.float64) * side for side in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def _keep_distant(grid: NDArray[np.float64], paths: list[NDArray], margins: list[float]) -> NDArray[np.float64]:
    """Points of the grid that are farther from every path (T, 2) than the path's margin."""
    clear = np.ones(len(grid), bool)
    for path, margin in zip(paths, margins, strict=True):
        clear &= (np.linalg.norm(grid[:, None] - path, axis=-1) > margin).all(axis=1)
    return grid[clear]


def _select_background(scene: Scene) -> torch.Tensor:
    """(M, 2) grid points of frame 0 that no sprite covers or comes near, so that no tracker's window holds a sprite."""
    grid = _build_grid(scene.size)
    grid = grid[scene.on_sprite(grid) < 0]
    points, visible = scene.track(grid)
    clear = visible.all(dim=1)
    for sprite, centres in zip(scene.sprites, scene.object_centres()[0], strict=True):
        clear &= ((points - centres).norm(dim=-1) > 1.3 * sprite.radius + _TRACKER_REACH_PX).all(dim=1)
    return grid[clear]


def _select_camera_tracks(scene: Scene, background: torch.Tensor, count: int, index: int) -> Trajectories:
    """Tracks of up to `count` background points under the scene's camera, the same points for the same index."""
    generator = torch.Generator().manual_seed(index)
    chosen = background[torch.randperm(len(background), generator=generator)[:count]]
    points, visible = scene.track(chosen)
    return Trajectories(points.double(), visible, scene.size)


def _select_object_tracks(scene: Scene) -> tuple[Trajectories, NDArray[np.float64] | None]:
    """Tracks of the centres of the sprites that move, and these sprites' colours."""
    points, visible = scene.object_centres()
    moves = (points - points[:, :1]).norm(dim=-1).amax(dim=1) > 2
    return Trajectories(points[moves].double(), visible[moves], scene.size), _list_colours(scene, moves.numpy())


def _list_colours(scene: Scene, chosen: NDArray) -> NDArray[np.float64] | None:
    """(N, 3) RGB in [0, 255] of the chosen sprites; None in ink, where colours are not told apart."""
    colours = np.array([SPRITE_COLOURS[sprite.colour] for sprite in scene.sprites], np.float64)[chosen]
    return None if scene.style == "ink" else colours
