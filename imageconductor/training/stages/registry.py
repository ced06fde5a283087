"""All training stages by name. A new stage is one line here and one in `_CONFIGS` of `stage_configs`."""

from __future__ import annotations

from imageconductor.training.stage_configs import check_stage
from imageconductor.training.stages.base import Stage
from imageconductor.training.stages.boxes import ObjectGatesStage, SceneGatesStage
from imageconductor.training.stages.few_step import FewStepStage
from imageconductor.training.stages.foundation import FoundationStage
from imageconductor.training.stages.image_conductor import CameraLoraStage, MotionControlNetStage, ObjectLoraStage
from imageconductor.training.stages.motion_director import MotionDirectorStage
from imageconductor.training.stages.style_lora import StyleLoraStage

_STAGES: tuple[type[Stage], ...] = (
    FoundationStage,
    MotionControlNetStage,
    CameraLoraStage,
    ObjectLoraStage,
    StyleLoraStage,
    FewStepStage,
    ObjectGatesStage,
    SceneGatesStage,
    MotionDirectorStage,
)
STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in _STAGES}


def find_stage(name: str) -> type[Stage]:
    """A stage by its name.

    Raises:
        ValueError: There is none; names the one that was probably meant.
    """
    return STAGES[check_stage(name)]
