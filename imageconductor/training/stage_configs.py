"""Settings of every training stage, by its name, and their reading from YAML. A new stage adds its own here.

Nothing here needs torch, so that `--help` and a mistyped setting are answered at once; `stages` has what they are for.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from imageconductor import config as config_file
from imageconductor.training.train_config import LrSchedule, StageConfig, TrainConfig, TrajectoryConfig, check_fractions


@dataclass
class FoundationConfig(TrajectoryConfig):
    """Of a small model from nothing: UNet with motion modules, image ControlNet and text encoder."""

    stage: Literal["foundation"] = "foundation"
    # A motion ControlNet learns along, so that the UNet can be controlled later (docs/decisions.md, 19); without it
    # no trajectories are seen.
    train_motion_controlnet: bool = False
    motion_dropout: float = 0.25  # probability that a clip's trajectories are dropped

    FIXED = TrajectoryConfig.FIXED | {"train_motion_controlnet"}
    RENAMED: ClassVar[dict[str, str]] = {**TrajectoryConfig.RENAMED, "steered": "train_motion_controlnet"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self, "motion_dropout")


@dataclass
class MotionControlNetConfig(TrajectoryConfig):
    """Stage 1: the motion ControlNet on mixed data, with dense, then with sparse trajectories."""

    stage: Literal["motion_controlnet"] = "motion_controlnet"


@dataclass
class LoraStageConfig(TrajectoryConfig):
    """What stages 2 and 3 share."""

    lora_rank: int = 64  # = alpha, as the release
    lora_targets: Literal["all", "linear"] = "all"  # the release adapts convolutions too, the paper says linear

    FIXED = TrajectoryConfig.FIXED | {"lora_rank", "lora_targets"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")


@dataclass
class CameraLoraConfig(LoraStageConfig):
    """Stage 2: the camera LoRA on camera-only data, Eq. 1."""

    stage: Literal["camera_lora"] = "camera_lora"


@dataclass
class ObjectLoraConfig(LoraStageConfig):
    """Stage 3: the object LoRA on mixed data under the frozen camera LoRA, Eqs. 2-4."""

    stage: Literal["object_lora"] = "object_lora"
    camera_lora: str | None = None  # folder of the camera LoRA; null = the model's
    orthogonal_weight: float = 0.1  # lambda on Eq. 4; the paper does not give it
    orthogonal_target: Literal["identity", "zero"] = "identity"  # as printed, or true orthogonality
    orthogonal_linear_only: bool = True  # Eq. 4 speaks of linear layers


@dataclass
class StyleLoraConfig(TrainConfig):
    """A LoRA of the UNet's spatial attention, on clips of a style, without trajectories."""

    stage: Literal["style_lora"] = "style_lora"
    lora_rank: int = 64  # = alpha

    FIXED = TrainConfig.FIXED | {"lora_rank"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")


@dataclass
class FewStepConfig(TrajectoryConfig):
    """A LoRA of the UNet with which few steps without guidance suffice, distilled from the model as it is sampled."""

    stage: Literal["few_step"] = "few_step"
    # Motion controls that the LoRA is to work with, one of them drawn for each micro-step.
    controls: list[Literal["camera", "object", "mixed", "base"]] = field(default_factory=lambda: ["camera", "object"])
    guidance_scale: float | None = None  # of the model that is distilled; null = its default
    trajectory_guidance_scale: float | None = None  # of the model that is distilled; null = its default
    camera_free_scale: float | None = None  # of the model that is distilled, under control object; null = its default
    solver_steps: int = 40  # guided DDIM steps into which the way from noise is divided
    segments: int = 4  # of the way, each of which the LoRA learns to go in one step; 1 = LCM-LoRA
    huber_width: float = 1e-3  # c of the pseudo-Huber loss
    lora_rank: int = 64  # = alpha
    lora_targets: Literal["all", "linear"] = "all"  # of the UNet's layers; linear leaves its convolutions out
    text_dropout: float = 0.0  # probability that a clip's text is dropped
    preview_steps: int = 4  # denoising steps of preview videos
    preview_guidance_scale: float = 1.0  # lambda_cfg of preview videos; 1 = off, as the LoRA holds the guidance

    FIXED = TrajectoryConfig.FIXED | {"lora_rank", "lora_targets"}
    # A micro-step has one control, so that another division into micro-steps is another run.
    FREE_TO_CHANGE = TrajectoryConfig.FREE_TO_CHANGE - {"batch_size", "gradient_accumulation_steps"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.controls:
            raise ValueError("controls must name at least one of camera, object, mixed, base")
        if self.camera_free_scale is not None and "object" not in self.controls:
            raise ValueError(f"camera_free_scale={self.camera_free_scale} acts with control object, not among controls")
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if not 2 <= self.solver_steps <= 1000 or 1000 % self.solver_steps:
            raise ValueError(
                f"solver_steps must divide the 1000 timesteps, so that the noisiest is learned, got {self.solver_steps}"
            )
        if self.segments < 1 or self.solver_steps % self.segments:
            raise ValueError(
                f"segments must divide the solver_steps, {self.solver_steps}, so that each ends on one of them, "
                f"got {self.segments}"
            )
        if self.huber_width <= 0:
            raise ValueError(f"huber_width must be positive, got {self.huber_width}")


@dataclass
class BoxStageConfig(TrainConfig):
    """What SMCD's two stages share; `data` names folders of GOT-10k or YouTube-VIS, or JSON lines of detections."""

    split: str = "train"  # of the folders in `data`
    # The first clips of YouTube-VIS, in the order of its instances.json, are left to the evaluation, which takes them.
    reserved_clips: int = 0
    object_gates: str | None = None  # folder of object gates to go on from; null = the model's, or fresh ones
    max_objects: int = 8  # to which every clip is padded with absent objects, in training and in sampling
    # Places of fresh gates among the UNet's spatial transformer blocks, or beginnings of their names, such as
    # [mid_block, up_blocks_1]; null = all, 16 in Stable Diffusion 1.5.
    places: list[str] | None = None
    fresh_object_gates: bool = False  # true: begin anew where the model has object gates
    # Of fresh object gates, for small models (docs/decisions.md, 45); published gates have none of it.
    knows_places: bool = False  # features are told where in the frame they are
    knows_first_boxes: bool = False  # an object's token also tells its box in the first frame
    tells_motion: bool = False  # a UNet that reads the first frame (`first_frame_warp`) is told what boxes carry
    boxes_dropout: float = 0.1  # probability that all objects of a clip are absent, published
    # Probability that a clip is drawn on, so that boxes learn to act beside trajectories: each of its objects then has
    # its box, a track along the middle of its box, or both.
    tracks_prob: float = 0.0
    # Of the scalars that open the gates; null = learning_rate. Until they open, nothing else has a gradient.
    gate_learning_rate: float | None = None
    random_crop: float = 1.0  # smallest size of a random crop, as a fraction of the largest; 1 = in the middle
    min_box_area: float = 0.0  # fraction of the frame's area; a smaller box is an absent object
    lr_schedule: LrSchedule = "constant"  # published; diffusers' names
    weight_decay: float = 1e-2  # published; not of the gates' scalars

    OF_DATA = (*TrainConfig.OF_DATA, "split", "reserved_clips", "random_crop", "min_box_area")
    FIXED = TrainConfig.FIXED | {"max_objects", "places", "knows_places", "knows_first_boxes", "tells_motion"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, got {self.max_objects}")
        if self.reserved_clips < 0:
            raise ValueError(f"reserved_clips must not be negative, got {self.reserved_clips}")
        if isinstance(self.data, Mapping):
            raise ValueError("data must be a list; clips with boxes are drawn evenly from all sources")
        if self.gate_learning_rate is not None and self.gate_learning_rate <= 0:
            raise ValueError(f"gate_learning_rate must be positive, got {self.gate_learning_rate}")
        if self.fresh_object_gates and self.object_gates is not None:
            raise ValueError(
                f"fresh_object_gates=true begins anew, and object_gates={self.object_gates} goes on from some"
            )
        if self.knows_first_boxes and self.num_frames == 1:
            raise ValueError("knows_first_boxes=true tells nothing of single frames; take clips, num_frames=16")
        if not 0 < self.random_crop <= 1:
            raise ValueError(f"random_crop must lie in (0, 1], got {self.random_crop}")
        if self.tracks_prob > 0 and self.num_frames == 1:
            raise ValueError(f"tracks_prob={self.tracks_prob} draws tracks, and single frames have none; take clips")
        check_fractions(self, "boxes_dropout", "tracks_prob", "min_box_area")


@dataclass
class ObjectGatesConfig(BoxStageConfig):
    """SMCD's stage 1: object gates and position network, on single frames with boxes, or on clips."""

    stage: Literal["object_gates"] = "object_gates"
    num_frames: int | None = 1  # of a window; with one, as published, the motion modules are left out
    first_frame: bool = False  # the image ControlNet shows a clip's first frame, for a model that only animates images
    learning_rate: float = 3e-5  # published

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_frame and self.num_frames == 1:
            raise ValueError("first_frame=true would show all of a single frame; take clips, num_frames=16")
        if self.tells_motion and not self.first_frame:
            raise ValueError("tells_motion=true moves a first frame that is not shown; set first_frame=true")


@dataclass
class SceneGatesConfig(BoxStageConfig):
    """SMCD's stage 2: scene gates for the first frame, and a LoRA of the motion modules, on clips with boxes."""

    stage: Literal["scene_gates"] = "scene_gates"
    learning_rate: float = 5e-5  # published
    fresh_scene_gates: bool = False  # true: begin anew where the model has scene gates
    learns_object_gates: bool = False  # true: joint training of both stages, the published ablation
    motion_lora_rank: int = 32  # = alpha, of the motion modules; 0 = they stay as they are
    # both: the image ControlNet shows the first frame too, frozen; gates: it is left out, as in the published model
    first_frame_by: Literal["both", "gates"] = "both"
    scene_dropout: float = 0.1  # probability that gates attend to zeros, published
    input_dropout: float = 0.25  # probability that the input branch reads zeros, published
    # Of fresh scene gates:
    parallel: bool = False  # scene gates read what object gates read, not what they gave
    frame_0_only: bool = False  # the input branch adds the first frame to frame 0 alone
    encoder_channels: list[int] = field(default_factory=lambda: [256, 512, 1024, 1024])  # of the first-frame encoder
    encoder_blocks: int = 3  # residual blocks at each of these levels

    FIXED = BoxStageConfig.FIXED | {
        *("motion_lora_rank", "learns_object_gates", "parallel", "frame_0_only", "encoder_channels", "encoder_blocks")
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.motion_lora_rank < 0:
            raise ValueError(f"motion_lora_rank must not be negative, got {self.motion_lora_rank}")
        if not self.encoder_channels or min(self.encoder_channels) < 1 or self.encoder_blocks < 1:
            raise ValueError("encoder_channels and encoder_blocks must be positive")
        if self.tells_motion and self.first_frame_by == "gates":
            raise ValueError("tells_motion=true moves the first frame of the image ControlNet; set first_frame_by=both")
        if self.fresh_object_gates and not self.learns_object_gates:
            raise ValueError(
                "fresh_object_gates=true gives closed gates, which do not learn here; set learns_object_gates=true to "
                "train them along, or fresh_object_gates=false"
            )
        check_fractions(self, "scene_dropout", "input_dropout")


@dataclass
class MotionDirectorConfig(StageConfig):
    """MotionDirector: a motion LoRA learned from a few reference clips, apart from their appearance."""

    stage: Literal["motion_director"] = "motion_director"
    # Videos, images, folders of them, or MotionDirector's JSON (docs/motion_director.md).
    data: list[str] = field(default_factory=list)
    prompt: str | None = None  # caption of every clip; null = NAME.txt beside each, or `captions`
    captions: str | None = None  # JSON of captions by file name
    # (W, H) that a clip is cropped to, or a bucket of its own aspect with the same longer side
    size: tuple[int, int] = (384, 384)
    num_frames: int = 16  # of a window
    fps: float | None = None  # of a window's frames, about; null = every `frame_step`-th frame
    frame_step: int = 1  # between a window's frames, where `fps` does not say it
    lora_rank: int = 32  # = alpha
    lora_dropout: float = 0.1  # probability that an input of a LoRA is dropped
    learns_motion: bool = True  # false: appearance alone, of images or of single frames
    # The image ControlNet shows the motion path a clip's first frame, for a model and a motion that animate an image.
    first_frame: bool = False
    # Clips are learned from with copies in the other orders of red, green and blue beside them, so that a motion from
    # one clip comes apart from its colours, which prompts should then not name.
    recolour: bool = False
    appearance: Literal["per_clip", "shared"] = "per_clip"  # a LoRA for each clip's appearance, or one for all
    appearance_dropout: float = 0.2  # probability that a step leaves the appearance LoRA out
    debiasing_beta: float | None = 1.0  # beta of L_ad; null leaves L_ad out
    # false: both LoRAs learn from all frames together; with debiasing_beta=null a plain LoRA to compare with
    dual_path: bool = True
    appearance_learning_rate: float | None = None  # null = learning_rate
    appearance_weight_decay: float | None = None  # null = weight_decay
    horizontal_flip: float = 0.0  # probability that an image is mirrored
    # Above 0 the run stores its clips' inverted noise, and `--noise-prior RUN` mixes it in to this fraction.
    noise_prior: float = 0.0
    inversion_steps: int = 50  # DDIM steps of the inversion
    preview_prompts: list[str] = field(default_factory=list)  # none = the captions of the clips
    batch_size: int = 1  # clip a micro-step, as each has its own LoRA and size
    learning_rate: float = 5e-4  # published
    lr_schedule: LrSchedule = "constant"  # published; diffusers' names
    max_grad_norm: float | None = None  # longer gradients are scaled down to this norm; null = none are, as published
    text_dropout: float = 0.0  # probability that a clip's text is dropped
    preview_steps: int = 30  # denoising steps of preview videos, published
    preview_guidance_scale: float = 12.0  # lambda_cfg of preview videos, published

    FREE_TO_CHANGE = StageConfig.FREE_TO_CHANGE | {"preview_prompts", "noise_prior"}
    FIXED = StageConfig.FIXED | {"lora_rank", "learns_motion", "appearance"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data must name the reference clips, e.g. 'data=[clip.mp4]'")
        for name, least in (("lora_rank", 1), ("num_frames", 1), ("frame_step", 1), ("inversion_steps", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.inversion_steps > 500:
            raise ValueError(f"inversion_steps must be at most 500 of the 1000 timesteps, got {self.inversion_steps}")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        for name in ("debiasing_beta", "appearance_weight_decay"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.appearance_learning_rate is not None and self.appearance_learning_rate <= 0:
            raise ValueError(f"appearance_learning_rate must be positive, got {self.appearance_learning_rate}")
        if self.batch_size != 1:
            raise ValueError(
                f"batch_size must be 1, as each clip has its own LoRA and size, got {self.batch_size}; "
                "use gradient_accumulation_steps"
            )
        if self.validation_every:
            raise ValueError(f"validation_every must be 0, as no clip is held out, got {self.validation_every}")
        check_fractions(self, "appearance_dropout", "horizontal_flip", "noise_prior")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        if self.torch_compile:
            raise ValueError("torch_compile must be false, as a step acts through other LoRAs than the one before")
        if not self.learns_motion and (self.noise_prior or self.first_frame or self.recolour or not self.dual_path):
            raise ValueError(
                "noise_prior, first_frame, recolour and dual_path=false are for runs that learn a motion; "
                "learns_motion is false"
            )


_CONFIGS: tuple[type[StageConfig], ...] = (
    FoundationConfig,
    MotionControlNetConfig,
    CameraLoraConfig,
    ObjectLoraConfig,
    StyleLoraConfig,
    FewStepConfig,
    ObjectGatesConfig,
    SceneGatesConfig,
    MotionDirectorConfig,
)
STAGE_CONFIGS: dict[str, type[StageConfig]] = {config.stage: config for config in _CONFIGS}


def check_stage(name: str) -> str:
    """The name of a stage.

    Raises:
        ValueError: There is none; names the one that was probably meant.
    """
    if name in STAGE_CONFIGS:
        return name
    close = difflib.get_close_matches(name, STAGE_CONFIGS, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(STAGE_CONFIGS)}"
    raise ValueError(f"unknown stage {name!r}; {advice}")


def stated_stage(path: Path | None, overrides: Sequence[str] = ()) -> str | None:
    """The `stage` of a YAML file, or of a `stage=NAME` beside it; None if neither says one.

    Raises:
        ValueError: The file cannot be read, or the two differ.
    """
    named = next((value for key, _, value in (text.partition("=") for text in overrides) if key == "stage"), None)
    stage = None if path is None else config_file.read_yaml(path).get("stage")
    if stage is not None and named is not None and named != stage:
        raise ValueError(f"{path} is for stage {stage}, which stage={named} cannot change; take the YAML of {named}")
    return named if stage is None else str(stage)


def load_config(path: Path | None, overrides: Sequence[str] = (), stage: str | None = None) -> StageConfig:
    """Settings of the stage that a YAML file names, with `key=value` overrides.

    Args:
        path: YAML file; None = defaults and overrides alone.
        overrides: As `config.load`.
        stage: The only stage that is taken; None = any.

    Raises:
        ValueError: In one line: no stage is named or another one, a key is unknown, a value is wrong.
    """
    stated = stated_stage(path, overrides)
    source = path or "the command line"
    if stated is None and (path is not None or stage is None):
        mark = "stage: " if path else "stage="
        raise ValueError(f"{source} does not say its stage; add {mark}{stage or 'one of ' + ', '.join(STAGE_CONFIGS)}")
    found = check_stage(stated if stated is not None else str(stage))
    if stage is not None and found != stage:
        raise ValueError(f"{source} is for stage {found}, this command trains {stage}; python train.py takes both")
    return config_file.load(STAGE_CONFIGS[found], path, overrides)


def _settings(config: type[StageConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


for _config in _CONFIGS:
    _own = _settings(_config)
    _config.ELSEWHERE = {
        key: f"a setting of stage {other.stage}" for other in _CONFIGS for key in sorted(_settings(other) - _own)
    }
