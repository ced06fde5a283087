"""From a stage's settings to its training: what the three entry scripts call."""

from __future__ import annotations

from pathlib import Path

import torch

from imageconductor.data.batches import SpriteBatches
from imageconductor.models.controlnets import MotionControlNet
from imageconductor.models.networks import Networks
from imageconductor.training.config import StageName, TrainConfig
from imageconductor.training.loop import TrainState, train
from imageconductor.training.stages import STAGES


def run_stage(name: StageName, config: TrainConfig) -> TrainState:
    """Trains one stage to its end.

    Raises:
        FileNotFoundError: The model folder, or a network named in the settings, is missing.
    """
    networks = Networks.load(config.model)
    if config.motion_controlnet is not None:
        if not Path(config.motion_controlnet).is_dir():
            raise FileNotFoundError(
                f"no motion ControlNet at {config.motion_controlnet}; train that stage first, or start from the "
                "model's own with motion_controlnet=null"
            )
        networks.motion_controlnet = MotionControlNet.from_pretrained(
            config.motion_controlnet, torch_dtype=torch.float32
        )
    stage = STAGES[name](networks, config)
    data = SpriteBatches(config.world, config.sets, config.batch_size)
    return train(stage, data, config, name=name.value.replace("_", " "))
