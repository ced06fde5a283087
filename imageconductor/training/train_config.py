"""Settings that training stages share; each stage adds its own beside its code (`training/stages`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.files import find_shipped

# diffusers' names. Its piecewise_constant would need rules beside it.
LrSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@dataclass
class LoopConfig:
    """Settings of the loop: optimisation, precision, checkpoints, logging."""

    stage: str = ""  # name of the stage that these settings are for
    output: str = "runs/stage"  # run folder; an unfinished run found there is continued
    max_steps: int = 1000  # optimiser steps
    # A run stops after them with a checkpoint and its result so far; the same command goes on. null = no limit.
    max_minutes: float | None = None
    batch_size: int = 4  # clips per process and micro-step
    gradient_accumulation_steps: int = 1  # micro-steps whose gradients are added up for one step
    # adamw_8bit: the extra `lowmem`, CUDA only. muon: Muon for weights, AdamW for the rest; PyTorch 2.9 or newer.
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    learning_rate: float = 1e-4  # paper C.1
    lr_schedule: LrSchedule = "constant_with_warmup"  # diffusers' names
    warmup_steps: int = 0  # optimiser steps in which the learning rate rises from 0
    weight_decay: float = 0.0  # 0 makes AdamW the paper's Adam
    max_grad_norm: float | None = 1.0  # longer gradients are scaled down to this norm; null = none are
    # > 1 draws noisier timesteps more often (Stable Diffusion 3's shift); 1 = evenly, as the paper
    timestep_shift: float = 1.0
    # Networks that do not learn are held in it. auto: bf16 where the device has instructions for it, else no.
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "no"
    allow_tf32: bool = True  # float32 products on Ampere and later
    gradient_checkpointing: bool = False  # less memory for a quarter to a third more time
    torch_compile: bool = False  # minutes at the start; then a quarter less time a step on a CPU
    ema_decay: float | None = None  # the saved weights are then the average; null = no average
    seed: int = 0  # of noise, timesteps, frames, dropped conditions and fresh LoRAs
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    log_every: int = 10  # steps between lines of metrics
    validation_every: int = 0  # steps between losses on held-out clips (docs/training.md); 0 = none
    preview_every: int = 0  # steps between preview videos (docs/training.md); 0 = none
    num_workers: int = 0  # processes that prepare batches; 0 = the training process does
    max_corrupt_fraction: float = 0.01  # of the clips read that may be unusable; more of them stop the run
    allow_changes: bool = False  # continue a run with settings that change what it trains, such as seed or data

    # By name: settings that may differ when a run is continued, and those that what it has learned depends on.
    FREE_TO_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            "output",
            "max_minutes",
            "allow_changes",
            # Batch i is the same however it is split; `record` compares the clips per step.
            "batch_size",
            "gradient_accumulation_steps",
            "torch_compile",
            "gradient_checkpointing",
            "save_every",
            "keep_checkpoints",
            "log_every",
            "validation_every",
            "preview_every",
            "num_workers",
            "max_corrupt_fraction",
        }
    )
    FIXED: ClassVar[frozenset[str]] = frozenset({"stage", "optimizer"})
    RENAMED: ClassVar[dict[str, str]] = {"max_corrupt_share": "max_corrupt_fraction"}

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "save_every",
            "log_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("validation_every", "preview_every", "num_workers", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.max_corrupt_fraction <= 1:
            raise ValueError(f"max_corrupt_fraction must lie in [0, 1], got {self.max_corrupt_fraction}")
        for name in ("learning_rate", "timestep_shift", "max_grad_norm", "max_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


@dataclass
class StageConfig(LoopConfig):
    """Settings of every stage: the model that it starts from, and its previews."""

    model: str = "models/sprites"  # model folder that gives every part the stage does not train
    text_dropout: float = 0.1  # probability that a clip's text is dropped, for classifier-free guidance
    preview_steps: int = 25  # denoising steps of preview videos, paper C.1
    preview_guidance_scale: float = 8.5  # lambda_cfg of preview videos

    FREE_TO_CHANGE = LoopConfig.FREE_TO_CHANGE | {"preview_steps", "preview_guidance_scale"}
    ELSEWHERE: ClassVar[dict[str, str]] = {}  # settings of other stages by name; `stage_configs` fills it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model = str(find_shipped(self.model))
        check_fractions(self, "text_dropout")


@dataclass
class TrainConfig(StageConfig):
    """Settings of stages that are trained on annotated clips, or on the sprite world."""

    # Shards or folders of clips (docs/training.md), [A, B] or {A: WEIGHT, B: WEIGHT} to draw from them in these
    # proportions; none = the sprite world, which `world` and `sets` describe.
    data: Any = field(default_factory=list)
    # Clips of `data`, chosen by their keys, that are not trained on, but validated and previewed; on the sprite world
    # the number of scenes that validate, 0 = 16.
    held_out_clips: int = 0
    size: tuple[int, int] = (384, 256)  # (W, H) that clips of `data` are resized and cropped to
    horizontal_flip: float = 0.0  # probability that a clip of `data` is mirrored, its tracks with it
    shuffle_shards: int = 16  # shards of `data` whose clips are mixed
    world: SpriteWorldConfig = field(default_factory=SpriteWorldConfig)
    sets: list[SpriteSet] = field(default_factory=lambda: [SpriteSet.MIXED])  # of the sprite world, taken in turn
    # Frames of a clip that are seen, evenly spaced; null = all of a sprite clip (world.num_frames), 16 of others (C.1).
    num_frames: int | None = None
    max_frame_spacing: int | None = None  # largest step between them in a sprite clip; null = what the clip allows
    image_dropout: float = 0.0  # probability that a clip's first frame is dropped

    OF_DATA: ClassVar[tuple[str, ...]] = ("size", "horizontal_flip", "shuffle_shards")  # say nothing of sprite clips
    RENAMED: ClassVar[dict[str, str]] = {**LoopConfig.RENAMED, "preview_data": "held_out_clips"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sources(self.data)
        if not self.sets:
            raise ValueError("sets must name at least one of camera, mixed, object")
        if self.held_out_clips < 0:
            raise ValueError(f"held_out_clips must not be negative, got {self.held_out_clips}")
        for name in ("preview_every", "validation_every"):
            if self.data and getattr(self, name) and not self.held_out_clips:
                raise ValueError(f"{name} needs clips that are not trained on: set held_out_clips, or {name}=0")
        if self.max_frame_spacing is not None and self.max_frame_spacing < 1:
            raise ValueError(f"max_frame_spacing must be at least 1, got {self.max_frame_spacing}")
        if self.max_frame_spacing is not None and self.data:
            raise ValueError("max_frame_spacing is for clips of the sprite world; leave it null for `data`")
        if self.shuffle_shards < 1:
            raise ValueError(f"shuffle_shards must be at least 1, got {self.shuffle_shards}")
        check_fractions(self, "image_dropout", "horizontal_flip")

    @property
    def clip_size(self) -> tuple[int, int]:
        """(W, H) of the clips that are seen."""
        return self.size if self.data else self.world.size

    @property
    def clip_frames(self) -> int:
        """Number of frames of the clips that are seen."""
        return self.num_frames or (16 if self.data else self.world.num_frames)


@dataclass
class TrajectoryConfig(TrainConfig):
    """Settings of stages that see trajectories."""

    motion_controlnet: str | None = None  # folder of a motion ControlNet to start from, e.g. a dense run's
    # Every visible track of a clip, 1..max_tracks of them by their motion, or as many whose motions differ.
    trajectories: Literal["dense", "sparse", "distinct"] = "sparse"
    max_tracks: int = 8  # upper limit of n, section 2.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tracks < 1:
            raise ValueError(f"max_tracks must be at least 1, got {self.max_tracks}")


def check_sources(data: object) -> None:
    """Raises ValueError unless `data` is a list of paths, or positive weights by path."""
    if isinstance(data, list) and all(isinstance(path, str) for path in data):
        return
    numbers = list(data.values()) if isinstance(data, Mapping) and all(isinstance(path, str) for path in data) else [""]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not 0 < n < math.inf for n in numbers):
        raise ValueError(f"data must be paths, [A, B], or paths with positive weights, {{A: 3, B: 1}}; got {data!r}")


def check_fractions(config: object, *names: str) -> None:
    """Raises ValueError unless the named settings lie in [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(config, name)}")
