"""The sprite protocol: held-out scenes whose true motion is known, requested from a model and tracked in its videos.

| arm | scenes | trajectories | control | gives |
|---|---|---|---|---|
| camera | camera-only | background points under the scene's own camera | camera | cam_mc |
| camera_uncontrolled | the same | none | | cam_mc_uncontrolled |
| object | object-only | centres of the moving sprites | object | obj_mc, leak_object |
| object_as_camera | the same | the same | camera | leak_camera |
| object_as_base | the same | the same | base | leak_base |
| object_uncontrolled | the same | none | | obj_mc_uncontrolled |
| object_free_X | the same | the same | object, camera_free_scale X | leak and error under Eq. 5 |
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from imageconductor.conditioning import Trajectories
from imageconductor.data.sprites import Scene, SpriteSet, SpriteWorldConfig, render, sample_scene
from imageconductor.evaluation import motion
from imageconductor.evaluation.trackers import LucasKanadeTracker, Tracker

_TRACKER_REACH_PX = 4  # half a Lucas-Kanade window, in pixels of the sprite world's size


@dataclass
class EvaluateConfig:
    """What is measured on which scenes."""

    model: str = "models/sprites"
    num_scenes: int = 16  # per set
    world_seed: int = 10_000  # training uses 0
    seed: int = 0  # of the initial noise; scene i takes seed + i
    num_points: int = 4  # background points a camera request names
    num_inference_steps: int | None = None  # None = the model's default, here and below
    guidance_scale: float | None = None
    camera_free_scales: list[float] = field(default_factory=list)  # further object arms
    batch_size: int = 4
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_scenes", "num_points", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Request:
    """One held-out clip: the scene, what is drawn on its first frame, and points of its background.

    Attributes:
        scene: With its exact motion.
        truth: (T, H, W, 3) uint8, the clip itself.
        trajectories: What is requested.
        background: (M, 2) pixels of frame 0, off the sprites.
    """

    key: str
    scene: Scene
    truth: NDArray[np.uint8]
    trajectories: Trajectories
    background: NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """One way to ask for the same clips."""

    name: str
    kind: SpriteSet
    control: str | None  # None = no trajectories
    camera_free_scale: float | None = None


class Generate(Protocol):
    """Makes the videos of some requests under an arm: (B, T, H, W, 3) uint8."""

    def __call__(self, requests: list[Request], arm: Arm, seeds: list[int]) -> NDArray[np.uint8]:
        """Video i belongs to request i and to seed i."""
        ...


def arms(config: EvaluateConfig) -> list[Arm]:
    """All arms, in the order of the table above."""
    free = [Arm(f"object_free_{x:g}", SpriteSet.OBJECT, "object", x) for x in config.camera_free_scales]
    return [
        Arm("camera", SpriteSet.CAMERA, "camera"),
        Arm("camera_uncontrolled", SpriteSet.CAMERA, None),
        Arm("object", SpriteSet.OBJECT, "object"),
        Arm("object_as_camera", SpriteSet.OBJECT, "camera"),
        Arm("object_as_base", SpriteSet.OBJECT, "base"),
        Arm("object_uncontrolled", SpriteSet.OBJECT, None),
        *free,
    ]


def requests(config: EvaluateConfig, kind: SpriteSet, size: tuple[int, int], num_frames: int) -> list[Request]:
    """The first `num_scenes` scenes of a held-out set in which something can be asked for."""
    world = SpriteWorldConfig(
        size=size, num_frames=num_frames, kind=kind, seed=config.world_seed, caption_motion_prob=0
    )
    made: list[Request] = []
    index = 0
    while len(made) < config.num_scenes:
        scene = sample_scene(world, index)
        background = _background(scene)
        trajectories = _camera_tracks(scene, background, config.num_points, index)
        if kind is SpriteSet.OBJECT:
            trajectories = _object_tracks(scene)
        if trajectories.num_tracks and len(background):
            truth = render([scene])[0].permute(1, 2, 3, 0).numpy()
            made.append(Request(f"{kind.value}-{index}", scene, truth, trajectories, background.numpy()))
        index += 1
    return made


def _background(scene: Scene) -> torch.Tensor:
    """Grid points of frame 0 that no sprite covers or comes near, so that a tracker's window holds none: (M, 2)."""
    width, height = scene.size
    x, y = (torch.linspace(0.1, 0.9, 8, dtype=torch.float64) * side for side in (width, height))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
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


def measure(request: Request, video: NDArray[np.uint8], tracker: Tracker) -> dict[str, float]:
    """Metrics of one video, or of the clip itself to learn the tracker's own error.

    Raises:
        ValueError: The video has another shape than the clip.
    """
    if video.shape != request.truth.shape:
        raise ValueError(f"{request.key}: expected a video of shape {request.truth.shape}, got {video.shape}")
    wanted = request.trajectories.points.numpy()
    visible = request.trajectories.visible.numpy()
    tracked, followed = tracker.track(video, wanted[:, 0])
    rest, rest_followed = tracker.track(video, request.background)
    everything = np.ones_like(rest_followed)
    return {
        "error": motion.trajectory_error(wanted, tracked, visible & followed),
        "error_all_points": motion.trajectory_error(wanted, tracked, visible),
        "still": motion.still_error(wanted, visible),
        "background": motion.displacement(rest, rest_followed),
        "coverage": motion.coverage(followed, visible),
        "background_coverage": motion.coverage(rest_followed, everything),
        "first_frame_psnr": motion.psnr(video[0] / 255, request.truth[0] / 255),
    }


def evaluate(
    config: EvaluateConfig,
    generate: Generate,
    size: tuple[int, int],
    num_frames: int,
    tracker: Tracker | None = None,
    progress: Any = iter,
) -> tuple[dict[str, Any], dict[str, list[tuple[Request, NDArray[np.uint8]]]]]:
    """All figures, and the videos by arm.

    Args:
        config: What to measure.
        generate: Makes the videos.
        size: (W, H) of the model.
        num_frames: T.
        tracker: None = Lucas-Kanade.
        progress: Wraps the list of (arm, batch) jobs, e.g. tqdm.
    """
    tracker = tracker or LucasKanadeTracker()
    started = time.perf_counter()
    sets = {kind: requests(config, kind, size, num_frames) for kind in (SpriteSet.CAMERA, SpriteSet.OBJECT)}
    clips: dict[str, list[dict[str, Any]]] = {}
    videos: dict[str, list[tuple[Request, NDArray[np.uint8]]]] = {}
    for arm, batch, seeds in progress(list(_jobs(config, sets))):
        for request, video in zip(batch, generate(batch, arm, seeds), strict=True):
            clips.setdefault(arm.name, []).append({"key": request.key, **measure(request, video, tracker)})
            videos.setdefault(arm.name, []).append((request, video))
    own = {kind: [measure(r, r.truth, tracker) for r in sets[kind]] for kind in sets}
    figures = _figures(clips, own)
    record = {
        **{name: figure.mean for name, figure in figures.items()},
        "intervals": {name: asdict(figure) for name, figure in figures.items()},
        "settings": {**asdict(config), "tracker": tracker.name, "width": size[0], "height": size[1]},
        "seconds": round(time.perf_counter() - started, 1),
        "clips": clips,
    }
    return record, videos


def _jobs(
    config: EvaluateConfig, sets: dict[SpriteSet, list[Request]]
) -> Iterator[tuple[Arm, list[Request], list[int]]]:
    for arm in arms(config):
        for start in range(0, config.num_scenes, config.batch_size):
            batch = sets[arm.kind][start : start + config.batch_size]
            yield arm, batch, [config.seed + start + i for i in range(len(batch))]


def _figures(
    clips: dict[str, list[dict[str, Any]]], own: dict[SpriteSet, list[dict[str, float]]]
) -> dict[str, motion.Figure]:
    def over(rows: Iterable[dict[str, Any]], name: str) -> motion.Figure:
        return motion.summarise([row[name] for row in rows])

    figures = {
        "cam_mc": over(clips["camera"], "error"),
        "cam_mc_all_points": over(clips["camera"], "error_all_points"),
        "cam_mc_still": over(clips["camera"], "still"),
        "cam_mc_uncontrolled": over(clips["camera_uncontrolled"], "error"),
        "obj_mc": over(clips["object"], "error"),
        "obj_mc_all_points": over(clips["object"], "error_all_points"),
        "obj_mc_still": over(clips["object"], "still"),
        "obj_mc_uncontrolled": over(clips["object_uncontrolled"], "error"),
        "leak_object": over(clips["object"], "background"),
        "leak_camera": over(clips["object_as_camera"], "background"),
        "leak_base": over(clips["object_as_base"], "background"),
        "leak_uncontrolled": over(clips["object_uncontrolled"], "background"),
        "first_frame_psnr": over([*clips["camera"], *clips["object"]], "first_frame_psnr"),
        "coverage": over([*clips["camera"], *clips["object"]], "coverage"),
        "tracker_error_camera": over(own[SpriteSet.CAMERA], "error"),
        "tracker_error_object": over(own[SpriteSet.OBJECT], "error"),
        "tracker_leak": over(own[SpriteSet.OBJECT], "background"),
        "tracker_coverage": over([row for rows in own.values() for row in rows], "coverage"),
    }
    for name, rows in clips.items():
        if name.startswith("object_free_"):
            scale = name.removeprefix("object_free_")
            figures[f"leak_object_free_{scale}"] = over(rows, "background")
            figures[f"obj_mc_free_{scale}"] = over(rows, "error")
    return figures


class PipelineGenerate:
    """`Generate` by a model folder.

    Args:
        config: Model, steps and guidance.

    Raises:
        FileNotFoundError, ValueError: No usable model folder.
    """

    def __init__(self, config: EvaluateConfig):
        from imageconductor.sampling.pipeline import ImageConductorPipeline

        defaults = ImageConductorPipeline.read_sampling_defaults(config.model)
        ImageConductorPipeline.check_adapters(config.model, "mixed")
        self.config = config
        self.size = (defaults["width"], defaults["height"])
        self.num_frames = defaults["num_frames"]
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = ImageConductorPipeline.from_pretrained(config.model).to(device)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, requests: list[Request], arm: Arm, seeds: list[int]) -> NDArray[np.uint8]:
        """See `Generate`."""
        output: Any = self.pipe(
            image=[Image.fromarray(request.truth[0]) for request in requests],
            trajectories=None if arm.control is None else [request.trajectories for request in requests],
            prompt=[request.scene.caption for request in requests],
            control=arm.control,
            camera_free_scale=arm.camera_free_scale,
            guidance_scale=self.config.guidance_scale,
            num_inference_steps=self.config.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        )
        return np.round(output.frames * 255).astype(np.uint8)
