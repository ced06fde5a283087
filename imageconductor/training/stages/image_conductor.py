"""The paper's three stages (sections 2.3 and 2.4). Everything learns through the motion ControlNet.

| stage | learns | active | loss |
|---|---|---|---|
| 1 motion_controlnet | motion ControlNet, on mixed clips | no LoRA | denoising |
| 2 camera_lora | camera LoRA, on clips in which only the camera moves | camera | Eq. 1 |
| 3 object_lora | object LoRA, on mixed clips | camera (frozen) and object, Eq. 2 | Eq. 3 + lambda Eq. 4 |
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from imageconductor.diffusion.losses import OrthogonalTarget, orthogonal_loss
from imageconductor.models.adapters import (
    Adapter,
    activate,
    adapter_parameters,
    add_adapter,
    freeze_all_but_adapter,
    load_adapter,
    lora_targets,
    save_adapter,
)
from imageconductor.models.denoiser import Condition
from imageconductor.models.networks import Networks
from imageconductor.training.stage_configs import (
    CameraLoraConfig,
    LoraStageConfig,
    MotionControlNetConfig,
    ObjectLoraConfig,
)
from imageconductor.training.stages.base import TrajectoryStage

CAMERA, OBJECT = Adapter.CAMERA.value, Adapter.OBJECT.value


class MotionControlNetStage(TrajectoryStage):
    """Stage 1: the motion ControlNet on mixed data, with dense, then with sparse trajectories."""

    name = "motion_controlnet"
    Config = MotionControlNetConfig
    preview_control = "base"

    def __init__(self, networks: Networks, config: MotionControlNetConfig):
        super().__init__(networks, config)
        networks.freeze()
        self.motion_controlnet.unfreeze_()

    def save(self, folder: Path) -> None:
        """Writes motion_controlnet."""
        self.motion_controlnet.save_pretrained(folder / "motion_controlnet")


class CameraLoraStage(TrajectoryStage):
    """Stage 2: the camera LoRA on camera-only data, Eq. 1."""

    name = "camera_lora"
    Config = CameraLoraConfig
    learns_loras = True
    preview_control = "camera"
    adapters = (CAMERA,)

    def __init__(self, networks: Networks, config: CameraLoraConfig):
        super().__init__(networks, config)
        networks.freeze()
        _add_fresh_adapter(self, CAMERA, config)

    def save(self, folder: Path) -> None:
        """Writes camera_lora."""
        save_adapter(self.motion_controlnet, CAMERA, folder / "camera_lora")


class ObjectLoraStage(TrajectoryStage):
    """Stage 3: the object LoRA on mixed data under the frozen camera LoRA, Eqs. 2-4."""

    name = "object_lora"
    Config = ObjectLoraConfig
    learns_loras = True
    preview_control = "object"
    adapters = (CAMERA, OBJECT)  # theta_mixed = theta_0 + sg[camera] + object: the camera LoRA acts, and is frozen.

    def __init__(self, networks: Networks, config: ObjectLoraConfig):
        super().__init__(networks, config)
        networks.freeze()
        load_adapter(self.motion_controlnet, CAMERA, _camera_lora(config))
        _add_fresh_adapter(self, OBJECT, config)
        self.orthogonal_weight = config.orthogonal_weight
        self.orthogonal_target: OrthogonalTarget = config.orthogonal_target
        self.linear_only = config.orthogonal_linear_only

    @classmethod
    def check(cls, config: ObjectLoraConfig) -> None:
        """As `Stage.check`: the camera LoRA too, whose rank must be the object LoRA's where Eq. 4 compares them."""
        super().check(config)
        folder = _camera_lora(config)
        if not (folder / "adapter_config.json").is_file():
            raise FileNotFoundError(f"no camera LoRA at {folder}; train that stage first")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if config.orthogonal_weight and rank != config.lora_rank:
            raise ValueError(
                f"lora_rank is {config.lora_rank}, that of the camera LoRA at {folder} is {rank}, and Eq. 4 compares "
                f"the two; set lora_rank={rank} or orthogonal_weight=0"
            )

    def loss_terms(self, x_0: Tensor, t: Tensor, eps: Tensor, condition: Condition) -> dict[str, Tensor]:
        """L_mixed and lambda * L_ortho."""
        terms = super().loss_terms(x_0, t, eps, condition)  # Eq. 3
        if self.orthogonal_weight:
            with torch.autocast(x_0.device.type, enabled=False):
                loss = orthogonal_loss(self._down_projections(), self.orthogonal_target)  # Eq. 4
                terms["orthogonal"] = self.orthogonal_weight * loss
        return terms

    def _down_projections(self) -> list[tuple[Tensor, Tensor]]:
        """LoRA's A of camera and object, layer by layer; as they are now, since FSDP exchanges parameters."""
        camera, obj = (adapter_parameters(self.motion_controlnet, name) for name in (CAMERA, OBJECT))
        pairs = [(camera[key], obj[key]) for key in sorted(camera.keys() & obj.keys()) if ".lora_A." in key]
        return [(c, o) for c, o in pairs if c.dim() == 2 or not self.linear_only]

    def save(self, folder: Path) -> None:
        """Writes object_lora."""
        save_adapter(self.motion_controlnet, OBJECT, folder / "object_lora")


def _camera_lora(config: ObjectLoraConfig) -> Path:
    return Path(config.camera_lora or Path(config.model) / "camera_lora")


def _add_fresh_adapter(stage: TrajectoryStage, name: str, config: LoraStageConfig) -> None:
    """Attaches the LoRA that a stage trains, lets it learn alone, and activates the stage's LoRAs."""
    network = stage.motion_controlnet
    targets = lora_targets(network, config.lora_targets)
    add_adapter(network, name, rank=config.lora_rank, targets=targets, seed=config.seed)
    activate(network, *stage.adapters)
    freeze_all_but_adapter(network, name)
