"""Settings that do nothing beside the others: refused in a new run, passed over in the record of an old one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

from imageconductor.config import default_values, to_plain
from imageconductor.training.stage_configs import (
    BoxStageConfig,
    FoundationConfig,
    MotionDirectorConfig,
    ObjectGatesConfig,
    ObjectLoraConfig,
    SceneGatesConfig,
)
from imageconductor.training.train_config import LoopConfig, TrainConfig, TrajectoryConfig

Config = TypeVar("Config", bound=LoopConfig)


def find_ignored(config: LoopConfig) -> dict[str, str]:
    """Settings that do nothing beside the others, whatever their values: why, and what to set, up to their default."""
    found: dict[str, str] = {}
    if config.lr_schedule == "constant":
        found["warmup_steps"] = "under lr_schedule=constant; set lr_schedule=constant_with_warmup, or"
    if isinstance(config, TrainConfig) and config.data:
        found |= dict.fromkeys(("world", "sets"), "on clips of data; set")
    elif isinstance(config, TrainConfig):
        found |= dict.fromkeys(config.OF_DATA, "on the sprite world; set data, or")
        found["size"] = "on the sprite world; set world.size, or"
    if isinstance(config, BoxStageConfig):
        found["shuffle_shards"] = f"in stage {config.stage}, which mixes all of its clips; set"
    if isinstance(config, FoundationConfig) and not config.train_motion_controlnet:
        names = ("motion_controlnet", "trajectories", "max_tracks", "motion_dropout")
        found |= dict.fromkeys(names, "without trajectories; set train_motion_controlnet=true, or")
    elif isinstance(config, TrajectoryConfig) and config.trajectories == "dense":
        found["max_tracks"] = "under trajectories=dense; set trajectories=sparse, or"
    if isinstance(config, ObjectLoraConfig) and not config.orthogonal_weight:
        names = ("orthogonal_target", "orthogonal_linear_only")
        found |= dict.fromkeys(names, "under orthogonal_weight=0; set a weight, or")
    if isinstance(config, ObjectGatesConfig) and not config.first_frame:
        found["image_dropout"] = "where no first frame is shown; set first_frame=true, or"
    if isinstance(config, SceneGatesConfig) and config.first_frame_by == "gates":
        found["image_dropout"] = "under first_frame_by=gates; set first_frame_by=both, or"
    if isinstance(config, MotionDirectorConfig):
        found |= _find_ignored_of_reference_clips(config)
    return found


def _find_ignored_of_reference_clips(config: MotionDirectorConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    if not config.learns_motion:
        found["debiasing_beta"] = "under learns_motion=false; set"
    if not config.noise_prior:
        found["inversion_steps"] = "under noise_prior=0; set noise_prior, or"
    if config.fps is not None and not any(Path(entry).suffix.lower() == ".json" for entry in config.data):
        found["frame_step"] = "beside fps, other than of a .json; set fps=null, or"
    if (config.prompt or "").strip():
        found["captions"] = "beside prompt, which is the caption of every clip; set prompt=null, or"
    return found


def reset_ignored(config: Config) -> Config:
    """The settings, those that do nothing at their defaults."""
    defaults = default_values(config)
    return dataclasses.replace(config, **{name: defaults[name] for name in find_ignored(config)})


def check_ignored(config: LoopConfig) -> None:
    """Refuses settings that would do nothing; records of earlier runs may hold some.

    Raises:
        ValueError: One is not the default.
    """
    usual = reset_ignored(config)
    for name, told in find_ignored(config).items():
        value, default = to_plain(getattr(config, name)), to_plain(getattr(usual, name))
        if value == default:
            continue
        if isinstance(value, dict):  # such as `world`, of which only what differs is told
            key = next(key for key in value if value[key] != default[key])
            name, value, default = f"{name}.{key}", value[key], default[key]
        raise ValueError(f"{name}={json.dumps(value)} does nothing {told} {name}={json.dumps(default)}")
