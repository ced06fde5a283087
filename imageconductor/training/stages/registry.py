"""All training stages by name, and their settings from YAML. A new stage is one line here."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path

from imageconductor import config as config_file
from imageconductor.training.stages.base import Stage
from imageconductor.training.stages.foundation import FoundationStage
from imageconductor.training.stages.image_conductor import CameraLoraStage, MotionControlNetStage, ObjectLoraStage
from imageconductor.training.stages.style_lora import StyleLoraStage
from imageconductor.training.train_config import TrainConfig

_STAGES: tuple[type[Stage], ...] = (
    FoundationStage,
    MotionControlNetStage,
    CameraLoraStage,
    ObjectLoraStage,
    StyleLoraStage,
)
STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in _STAGES}


def find_stage(name: str) -> type[Stage]:
    """A stage by its name.

    Raises:
        ValueError: There is none; names the one that was probably meant.
    """
    if name in STAGES:
        return STAGES[name]
    close = difflib.get_close_matches(name, STAGES, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(STAGES)}"
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
        raise ValueError(f"{source} does not say its stage; add {mark}{stage or 'one of ' + ', '.join(STAGES)}")
    found = find_stage(stated if stated is not None else str(stage))
    if stage is not None and found.name != stage:
        raise ValueError(f"{source} is for stage {found.name}, this command trains {stage}; python train.py takes both")
    return config_file.load(found.Config, path, overrides)


def _settings(stage: type[Stage]) -> set[str]:
    return {field.name for field in dataclasses.fields(stage.Config)}


for _stage in _STAGES:
    _own = _settings(_stage)
    _stage.Config.ELSEWHERE = {
        key: f"a setting of stage {other.name}" for other in _STAGES for key in sorted(_settings(other) - _own)
    }
