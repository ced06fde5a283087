"""Settings of every training stage, by its name, and their reading from YAML. A new stage adds its own here.

Nothing here needs torch, so that `--help` and a mistyped setting are answered at once; `stages` has what they are for.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from imageconductor import config as config_file
from imageconductor.training.train_config import TrainConfig, TrajectoryConfig, check_fractions


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


_CONFIGS: tuple[type[TrainConfig], ...] = (
    FoundationConfig,
    MotionControlNetConfig,
    CameraLoraConfig,
    ObjectLoraConfig,
    StyleLoraConfig,
)
STAGE_CONFIGS: dict[str, type[TrainConfig]] = {config.stage: config for config in _CONFIGS}


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


def load_config(path: Path | None, overrides: Sequence[str] = (), stage: str | None = None) -> TrainConfig:
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


def _settings(config: type[TrainConfig]) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


for _config in _CONFIGS:
    _own = _settings(_config)
    _config.ELSEWHERE = {
        key: f"a setting of stage {other.stage}" for other in _CONFIGS for key in sorted(_settings(other) - _own)
    }
