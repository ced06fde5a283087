"""Settings of a training stage; `configs/train/` states runs, docs/training.md explains them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from imageconductor.data.sprites import SpriteSet, SpriteWorldConfig


class StageName(str, Enum):
    """The stages, in their order."""

    FOUNDATION = "foundation"
    MOTION_CONTROLNET = "motion_controlnet"
    CAMERA_LORA = "camera_lora"
    OBJECT_LORA = "object_lora"
    STYLE_LORA = "style_lora"


@dataclass
class LoopConfig:
    """How a stage is optimised."""

    output: str = "runs/stage"  # run folder; an unfinished run found there is continued
    max_steps: int = 1000  # optimiser steps
    batch_size: int = 4  # clips per process and micro-step
    gradient_accumulation_steps: int = 1
    # adamw_8bit: the extra `lowmem`, CUDA only. muon: Muon for matrices, AdamW for the rest; PyTorch 2.9 or newer.
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    learning_rate: float = 1e-4  # paper C.1
    lr_schedule: str = "constant_with_warmup"  # diffusers' names: constant, linear, cosine, ...
    warmup_steps: int = 0
    weight_decay: float = 0.0  # 0 makes AdamW the paper's Adam
    max_grad_norm: float = 1.0
    timestep_shift: float = (
        1.0  # > 1 draws noisier steps more often (Stable Diffusion 3's shift); 1 = evenly, as the paper
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # networks that do not learn are then held in it
    allow_tf32: bool = True  # float32 products on Ampere and later
    gradient_checkpointing: bool = False  # less memory for a quarter to a third more time
    torch_compile: bool = False  # minutes at the start; then a quarter less time a step on a CPU
    ema_decay: float | None = None  # the saved weights are then the average
    seed: int = 0
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2
    log_every: int = 10
    preview_every: int = 0  # steps between preview videos (docs/training.md); 0 = none
    num_workers: int = 0  # processes that prepare batches
    max_corrupt_fraction: float = 0.01  # of the clips read; more of them stop the run

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints must be at least 1, got {self.keep_checkpoints}")
        for name in ("preview_every", "num_workers", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.max_corrupt_fraction <= 1:
            raise ValueError(f"max_corrupt_fraction must lie in [0, 1], got {self.max_corrupt_fraction}")
        for name in ("learning_rate", "timestep_shift"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


@dataclass
class TrainConfig(LoopConfig):
    """One stage: what it starts from, what it sees and what it learns."""

    model: str = "models/sprites"  # model folder that gives every part the stage does not train
    motion_controlnet: str | None = None  # folder of another motion ControlNet to start from, e.g. a dense run's
    camera_lora: str | None = None  # stage 3: folder of the camera LoRA; None = the model's
    # Shards or folders of clips (docs/training.md); none = the sprite world, which `world` and `sets` describe.
    data: list[str] = field(default_factory=list)
    preview_data: list[str] = field(default_factory=list)  # as `data`, and not trained on
    size: tuple[int, int] = (384, 256)  # (W, H) that clips of `data` are resized and cropped to
    horizontal_flip: float = 0.0  # how often a clip of `data` is mirrored, its tracks with it
    shuffle_shards: int = 16  # shards of `data` whose clips are mixed
    world: SpriteWorldConfig = field(default_factory=SpriteWorldConfig)
    sets: list[SpriteSet] = field(default_factory=lambda: [SpriteSet.MIXED])  # taken in turn
    # Frames of a clip that are seen, evenly spaced; null = all 16 of a sprite clip, 16 of any other (paper C.1).
    num_frames: int | None = None
    trajectories: Literal["dense", "sparse"] = "sparse"
    max_tracks: int = 8  # upper limit of n, section 2.2
    text_dropout: float = 0.1  # for classifier-free guidance
    image_dropout: float = 0.0
    train_motion_controlnet: bool = (
        False  # foundation: a motion ControlNet learns along, so that the UNet can be steered
    )
    motion_dropout: float = 0.25  # of that ControlNet, per clip
    lora_rank: int = 64  # = alpha, as the release
    lora_targets: Literal["all", "linear"] = "all"  # the release adapts convolutions too, the paper says linear
    orthogonal_weight: float = 0.1  # lambda on Eq. 4; the paper does not give it
    orthogonal_target: Literal["identity", "zero"] = "identity"  # as printed, or true orthogonality
    orthogonal_linear_only: bool = True  # Eq. 4 speaks of linear layers
    preview_steps: int = 25  # of sampling, paper C.1
    preview_guidance_scale: float = 8.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sets:
            raise ValueError("sets must name at least one of camera, mixed, object")
        if self.max_tracks < 1 or self.lora_rank < 1:
            raise ValueError(f"max_tracks and lora_rank must be at least 1, got {self.max_tracks}, {self.lora_rank}")
        if self.data and self.preview_every and not self.preview_data:
            raise ValueError("previews show clips that are not trained on: set preview_data, or preview_every=0")
        if self.shuffle_shards < 1:
            raise ValueError(f"shuffle_shards must be at least 1, got {self.shuffle_shards}")
        for name in ("text_dropout", "image_dropout", "motion_dropout", "horizontal_flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
