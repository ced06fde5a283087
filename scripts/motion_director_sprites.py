"""MotionDirector in miniature: motions that the bundled model's captions cannot say, learned from sprites.

Each motion (a loop, a zigzag, a bounce) is learned from one clip and from four, by MotionDirector and by its baselines;
prompts with other shapes, colours and backgrounds are then made into videos. Run the same command again after an
interruption: it continues where it stopped. Writes clips/, runs/, videos/, results.md and a contact sheet.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imageconductor.command_line import parse_command_line, run_command
from imageconductor.files import atomic_folder, check_record, check_writable, write_record, write_text
from imageconductor.training.stage_configs import MotionDirectorConfig

_TURNS = np.linspace(0, 1, 16)
MOTIONS: dict[str, NDArray[np.float64]] = {  # offsets (16, 2) of a sprite's centre, in units of the frame's side
    "loop": 0.24 * np.stack([np.sin(2 * np.pi * _TURNS), 1 - np.cos(2 * np.pi * _TURNS)], axis=1) - [0, 0.24],
    "zigzag": np.stack([0.6 * _TURNS - 0.3, 0.36 * np.abs((3 * _TURNS) % 2 - 1) - 0.18], axis=1),
    "bounce": np.stack([0.6 * _TURNS - 0.3, 0.3 - 0.5 * np.abs(np.sin(3 * np.pi * _TURNS))], axis=1),
    "hop": np.stack([0.6 * _TURNS - 0.3, 0.15 - 0.3 * np.abs(np.sin(2 * np.pi * _TURNS))], axis=1),  # slower
}
_PLAIN = {"dual_path": False, "debiasing_beta": None, "appearance": "shared"}
METHODS: dict[str, dict[str, Any] | None] = {  # settings of the training; None = the base model, which is not trained
    "base model": None,
    "plain LoRA": {**_PLAIN, "recolour": False},
    "without debiasing": {"debiasing_beta": None, "recolour": False},
    "MotionDirector": {"recolour": False},
    "plain LoRA recoloured": {**_PLAIN, "recolour": True},
    "MotionDirector recoloured": {"recolour": True},
}
COLUMNS = {
    "cosine": "displacement cosine",
    "prompt_colour": "prompt's colour",
    "prompt_shape": "prompt's shape",
    "clip_colour": "clip's colour",
    "clip_pixels": "pixels of clip's colours",
    "clip_background": "clip's background",
}


@dataclass
class MiniatureConfig:
    """What is learned, and how many videos are made of it."""

    model: str = "models/sprites"  # model folder
    train: str = "configs/train/sprites/motion_director.yaml"  # settings of the training
    settings: list[str] = field(default_factory=list)  # key=value for all trainings
    motions: list[str] = field(default_factory=lambda: list(MOTIONS))  # of loop, zigzag, bounce, hop
    methods: list[str] = field(default_factory=lambda: list(METHODS))  # rows of the table
    clips: list[int] = field(default_factory=lambda: [4, 1])  # reference clips that a motion is learned from
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # of training and videos
    prompts: int = 12  # videos of each motion and seed
    # Videos begin with a picture of the prompt's sprite, and the motion is learned with clips' first frames shown.
    first_frame: bool = True
    steps: int | None = None  # denoising steps; null = the model's default
    guidance_scale: float | None = None  # lambda_cfg; null = the model's default
    motion_scale: float = 1.0  # of the motion LoRA
    output: str = "runs/motion_director_sprites"  # folder of everything

    def __post_init__(self) -> None:
        for name, known in (("motions", MOTIONS), ("methods", METHODS)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"{name}: there is no {unknown[0]!r}, only {', '.join(known)}")
        if not self.clips or max(self.clips) > len(_CLIPS) or min(self.clips) < 1:
            raise ValueError(f"clips must lie in 1..{len(_CLIPS)}, got {self.clips}")
        if not self.seeds or self.prompts < 1:
            raise ValueError(f"there must be a seed and a prompt, got seeds={self.seeds}, prompts={self.prompts}")


_SIDE = 128  # pixels of a frame, the bundled model's
_OUTLINE = 0.28  # brightness of a sprite's outline, as a fraction of its own
_NEAR = 60  # distance in RGB at which a pixel still has a colour
# Pattern, colour, shape and background colours of the reference clips; prompts have other colours and shapes.
_CLIPS = (
    ("dotted", "red", "star", ("gray", "navy")),
    ("striped", "yellow", "square", ("navy", "teal")),
    ("checked", "purple", "star", ("brown", "gray")),
    ("dotted", "yellow", "square", ("teal", "brown")),
)
_CLIP_BACKGROUNDS = {colour for *_, colours in _CLIPS for colour in colours}
_PROMPT_SHAPES, _PROMPT_COLOURS = ("circle", "triangle", "heart"), ("green", "blue", "orange")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 2 after one line about bad input, else 0."""
    config, _ = parse_command_line(MiniatureConfig, __doc__ or "", argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command(lambda: compare(config))


def compare(config: MiniatureConfig) -> None:
    """Trains and measures what is missing, and writes the table."""
    check_writable(Path(config.output))
    settings, cells = _load_settings(config), {}
    for motion, count, method, seed in _list_cells(config):
        clips = write_clips(config, motion, count, names_colours=not (METHODS[method] or {}).get("recolour"))
        run = train_method(config, settings, method, motion, count, seed, clips)
        cells[motion, count, method, seed] = make_videos(config, method, motion, count, seed, run)
    write_results(config, cells)


def _list_cells(config: MiniatureConfig) -> Iterator[tuple[str, int, str, int]]:
    for motion in config.motions:
        for count in config.clips:
            for method in config.methods:
                for seed in config.seeds:
                    yield motion, count, method, seed


def _load_settings(config: MiniatureConfig) -> MotionDirectorConfig:
    from imageconductor.training.stage_configs import load_config

    own = [f"model={config.model}", f"first_frame={config.first_frame}"]
    settings = load_config(Path(config.train), [*config.settings, *own])
    if not isinstance(settings, MotionDirectorConfig):
        raise ValueError(f"train={config.train} is for stage {settings.stage}, not motion_director")
    return settings


def _scene(
    pattern: str, colour: str, shape: str, allowed: Callable[[set[str]], bool], motion: str | None, seed: int
) -> Any:
    """A sprite on a background whose colours are allowed; it moves around the middle of the frame, or stays there."""
    from imageconductor.data.backgrounds import sample_background
    from imageconductor.data.scenes import Scene, Sprite
    from imageconductor.data.sprite_world import SPRITE_COLOURS, SpriteWorldConfig

    rng = np.random.default_rng([seed, 77])
    contrast = SpriteWorldConfig().background_contrast
    while True:
        background, colours = sample_background(rng, _SIDE, {colour: SPRITE_COLOURS[colour]}, contrast)
        if allowed(set(colours)):
            break
    path = np.full((16, 2), (_SIDE - 1) / 2) + (_SIDE * MOTIONS[motion] if motion else 0)
    outline = tuple((_OUTLINE * np.array(SPRITE_COLOURS[colour])).tolist())
    sprite = Sprite(shape, colour, outline, 0.15 * _SIDE, 0.0, path, pattern=pattern)
    ground = ("an" if colours[0][0] in "aeiou" else "a") + f" {colours[0]} and {colours[1]} {background.pattern}"
    camera = np.tile(np.eye(2, 3), (16, 1, 1))
    return Scene((_SIDE, _SIDE), camera, (sprite,), background, f"a {sprite.name} on {ground} background")


def _clip_scene(number: int, motion: str) -> Any:
    """The scene of a reference clip."""
    pattern, colour, shape, colours = _CLIPS[number]
    return _scene(pattern, colour, shape, lambda found: found == set(colours), motion, number)


def write_clips(config: MiniatureConfig, motion: str, count: int, names_colours: bool) -> Path:
    """A folder of the motion's first `count` reference clips, with captions beside them that name colours or do not."""
    from imageconductor.data.scenes import render
    from imageconductor.sampling.video import write_mp4

    folder = Path(config.output) / "clips" / (f"{motion}-{count}" + ("" if names_colours else "-no_colours"))
    if not folder.is_dir():
        with atomic_folder(folder) as new:
            for number in range(count):
                scene = _clip_scene(number, motion)
                sprite = scene.sprites[0]
                caption = scene.caption if names_colours else f"a {sprite.pattern} {sprite.shape}"
                (new / f"clip{number}.txt").write_text(caption)
                write_mp4(new / f"clip{number}.mp4", render([scene])[0].permute(1, 2, 3, 0).numpy(), 8)
    return folder


def prompt_scenes(count: int, motion: str | None = None) -> list[Any]:
    """Scenes of the prompts' shapes, colours and backgrounds, none of which a reference clip has."""
    from imageconductor.data.shapes import PATTERN_NAMES

    looks = [(colour, shape) for shape in _PROMPT_SHAPES for colour in _PROMPT_COLOURS]
    return [
        _scene(
            PATTERN_NAMES[n % len(PATTERN_NAMES)],
            *looks[n % len(looks)],
            lambda found: not _CLIP_BACKGROUNDS & found,
            motion,
            1000 + n,
        )
        for n in range(count)
    ]


def write_first_frames(config: MiniatureConfig, motion: str) -> list[str]:
    """Pictures of the prompts' scenes as the motion begins."""
    from PIL import Image

    from imageconductor.data.scenes import render

    folder = Path(config.output) / "first_frames" / f"{motion}-{config.prompts}"
    if not folder.is_dir():
        with atomic_folder(folder) as new:
            for number, scene in enumerate(prompt_scenes(config.prompts, motion)):
                Image.fromarray(render([scene], [0])[0, :, 0].permute(1, 2, 0).numpy()).save(new / f"{number:02d}.png")
    return [str(path) for path in sorted(folder.glob("*.png"))]


def train_method(
    config: MiniatureConfig,
    settings: MotionDirectorConfig,
    method: str,
    motion: str,
    count: int,
    seed: int,
    clips: Path,
) -> Path | None:
    """The run folder of a method, trained to its end; None of the base model."""
    from imageconductor.training.run import run_stage

    changes = METHODS[method]
    if changes is None:
        return None
    run = Path(config.output) / "runs" / f"{motion}-{count}-{method.replace(' ', '_')}-{seed}"
    own = {"data": [str(clips)], "prompt": None, "fps": None, "seed": seed, "output": str(run)}
    run_stage(replace(settings, **own, **changes))
    return run


def make_videos(
    config: MiniatureConfig, method: str, motion: str, count: int, seed: int, run: Path | None
) -> list[dict[str, float]]:
    """Measurements of the method's videos, one for each prompt; the videos are kept, and made once."""
    from imageconductor.sampling.job import SampleJob, load_pipeline, prepare, render

    name = f"{motion}-{method.replace(' ', '_')}-{seed}" if run is None else run.name
    folder = Path(config.output) / "videos" / name
    sampled_by = ("model", "motion_scale", "steps", "guidance_scale", "first_frame", "prompts")
    record, made_with = folder / "made_with.json", {key: getattr(config, key) for key in sampled_by}
    check_record(record, made_with)
    if not folder.is_dir():
        images = write_first_frames(config, motion) if config.first_frame else [None] * config.prompts
        jobs = [
            SampleJob(
                image=image,
                prompt=scene.caption,
                model=config.model,
                motion_lora=[] if run is None else [f"{run}:{config.motion_scale:g}"],
                appearance_lora=_appearance_loras(run) if method.startswith("plain LoRA") else [],
                steps=config.steps,
                few_step=False,
                guidance_scale=config.guidance_scale,
                seed=[1000 * seed + number],
            )
            for number, (scene, image) in enumerate(zip(prompt_scenes(config.prompts), images, strict=True))
        ]
        inputs = [prepare(job) for job in jobs]
        pipe = load_pipeline(inputs[0].job)
        pipe.set_progress_bar_config(desc=name, leave=False)
        videos = [video for start in range(0, len(inputs), 4) for video in render(pipe, inputs[start : start + 4])]
        with atomic_folder(folder) as new:
            np.savez_compressed(new / "videos.npz", videos=np.stack([video[0] for video in videos]))
            write_record(new / record.name, made_with)
    videos = np.load(folder / "videos.npz")["videos"]
    return [
        measure_video(video, scene, motion, count)
        for video, scene in zip(videos, prompt_scenes(config.prompts), strict=True)
    ]


def _appearance_loras(run: Path | None) -> list[str]:
    """A plain LoRA acts as it was trained: its spatial half with the temporal one."""
    return [] if run is None else [str(run / "appearance_lora")]


def measure_video(video: NDArray[np.uint8], scene: Any, motion: str, count: int) -> dict[str, float]:
    """Motion and appearance of one video (T, H, W, 3).

    The sprite has the one of the sprites' colours that most pixels are near to. They, and those near its outline's
    colour, are its pixels, and its place in a frame is their mean. Of all pixels near to a sprite's colour, those of
    the clips' are counted. The background is that of a clip if its mean colour is nearer to a clip's than to the
    prompt's.
    """
    from imageconductor.data.scenes import render
    from imageconductor.data.sprite_world import SPRITE_COLOURS
    from imageconductor.evaluation.metrics.motion_fidelity import displacement_cosine

    clips = [_clip_scene(number, motion) for number in range(count)]
    names = list(dict.fromkeys([colour for _, colour, *_ in _CLIPS] + list(_PROMPT_COLOURS)))  # backgrounds have others
    palette = np.array([SPRITE_COLOURS[name] for name in names], np.float32)
    distances = np.linalg.norm(video[..., None, :].astype(np.float32) - palette, axis=-1)  # (T, H, W, colours)
    near = distances.min(-1) < _NEAR
    named = distances.argmin(-1)[near]
    best = int(np.bincount(named, minlength=len(names)).argmax())
    colour = names[best] if near.any() else ""
    outline = np.linalg.norm(video.astype(np.float32) - _OUTLINE * palette[best], axis=-1) < _NEAR / 2
    mask = np.stack([_fill(frame) for frame in near & (distances.argmin(-1) == best) | outline])
    around = video[~mask].mean(0)
    learned = {clip.sprites[0].colour for clip in clips}
    pictures = [render([one], [0])[0, :, 0].permute(1, 2, 0).numpy() for one in (scene, *clips)]
    apart = [np.linalg.norm(picture.mean((0, 1)) - around) for picture in pictures]
    return {
        "cosine": displacement_cosine(MOTIONS[motion], _centres(mask)),
        "prompt_colour": float(colour == scene.sprites[0].colour),
        "prompt_shape": float(_nearest_shape(mask) == scene.sprites[0].shape),
        "clip_colour": float(colour in learned),
        "clip_pixels": float(np.isin(named, [names.index(one) for one in learned]).mean()) if len(named) else 0.0,
        "clip_background": float(np.argmin(apart) > 0),
    }


def _fill(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A sprite's pixels (H, W) with what lies between them."""
    from scipy.ndimage import binary_closing, binary_fill_holes

    return np.asarray(binary_fill_holes(binary_closing(np.pad(mask, 4), iterations=3)), bool)[4:-4, 4:-4]


def _centres(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(T, 2) mean xy of each frame's pixels; where there are none, that of the frame before."""
    centres, last = [], np.array([mask.shape[2] / 2, mask.shape[1] / 2])
    for frame in mask:
        rows, columns = np.nonzero(frame)
        last = np.array([columns.mean(), rows.mean()]) if len(rows) else last
        centres.append(last)
    return np.stack(centres)


def _nearest_shape(mask: NDArray[np.bool_]) -> str:
    """The shape that covers the sprite's pixels best, in the frame whose number of pixels is the median."""
    import torch

    from imageconductor.data.shapes import signed_distance
    from imageconductor.data.sprite_world import SpriteWorldConfig

    areas = mask.sum((1, 2))
    frame = mask[int(np.argsort(areas)[len(areas) // 2])]
    rows, columns = np.nonzero(frame)
    if not len(rows):
        return ""
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    scores = {}
    for shape in SpriteWorldConfig().shapes:
        points = torch.from_numpy(np.stack([x - columns.mean(), y - rows.mean()], axis=-1))
        unit = float((signed_distance(shape, points / 16) < 0).sum()) / 256  # area at radius 1
        inside = (signed_distance(shape, points / math.sqrt(len(rows) / unit)) < 0).numpy()
        scores[shape] = (inside & frame).sum() / (inside | frame).sum()
    return max(scores, key=lambda shape: scores[shape])


def write_results(config: MiniatureConfig, cells: dict[tuple[str, int, str, int], list[dict[str, float]]]) -> None:
    """Writes results.json, results.md and contact_sheet.png."""
    from imageconductor.data.scenes import render
    from imageconductor.sampling.video import contact_sheet

    output = Path(config.output)
    rows = []
    for count in config.clips:
        for method in config.methods:
            for motion in config.motions:
                by_seed = [cells[motion, count, method, seed] for seed in config.seeds]
                means = {key: [float(np.mean([one[key] for one in seed])) for seed in by_seed] for key in COLUMNS}
                rows.append({"clips": count, "method": method, "motion": motion, "seeds": means})
    write_text(output / "results.json", json.dumps(rows, indent=1))
    lines = ["| clips | method | motion | " + " | ".join(COLUMNS.values()) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for row in rows:
        values = (f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})" for found in row["seeds"].values())
        lines.append(f"| {row['clips']} | {row['method']} | {row['motion']} | {' | '.join(values)} |")
    write_text(output / "results.md", "\n".join(lines) + "\n")
    shown = []
    for motion in config.motions:
        shown.append((f"{motion}: reference clip", render([_clip_scene(0, motion)])[0].permute(1, 2, 3, 0).numpy()))
        for method in config.methods:
            run = f"{motion}-{method}" if METHODS[method] is None else f"{motion}-{config.clips[0]}-{method}"
            name = f"{run.replace(' ', '_')}-{config.seeds[0]}"
            videos = np.load(output / "videos" / name / "videos.npz")["videos"]
            shown += [(f"{method}: {prompt_scenes(n + 1)[n].caption}", videos[n]) for n in (0, 5) if n < len(videos)]
    contact_sheet(output / "contact_sheet.png", shown, 8)


if __name__ == "__main__":
    sys.exit(main())
