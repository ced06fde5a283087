"""From a stage's settings to its training: what the three entry scripts call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from imageconductor.data.batches import Batches, Samples, SpriteSamples
from imageconductor.data.clips import ClipSamples
from imageconductor.models.controlnets import MotionControlNet
from imageconductor.models.networks import Networks
from imageconductor.training.loop import Preview, TrainState, train
from imageconductor.training.stages import STAGES
from imageconductor.training.train_config import StageName, TrainConfig

PreviewOf = Callable[[Sequence[dict[str, Any]], "str | None", Path, dict[str, Any]], Preview]
"""Makes the previews of a run from held-out samples, the control that the stage learns, a folder, and its settings."""

_CONTROLS = {
    StageName.FOUNDATION: None,
    StageName.MOTION_CONTROLNET: "base",
    StageName.CAMERA_LORA: "camera",
    StageName.OBJECT_LORA: "object",
    StageName.STYLE_LORA: None,
}
_PREVIEWED_CLIPS = 3
_HELD_OUT_SEED = 20_000  # evaluation uses 10,000


def run_stage(name: StageName, config: TrainConfig, preview_of: PreviewOf | None = None) -> TrainState:
    """Trains one stage to its end.

    Args:
        name: Which.
        config: How, and on what.
        preview_of: Makes the preview videos; sampling is not training's business.

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
    data = Batches(samples(config), config.batch_size)
    preview = None
    if preview_of is not None and config.preview_every:
        held_out = samples(
            replace(
                config,
                data=config.preview_data,
                horizontal_flip=0.0,
                num_frames=config.num_frames if config.data else None,
                world=replace(config.world, seed=config.world.seed + _HELD_OUT_SEED),
            )
        )
        clips = [held_out[position] for position in range(_PREVIEWED_CLIPS)]
        sampling = {"num_inference_steps": config.preview_steps, "guidance_scale": config.preview_guidance_scale}
        preview = preview_of(clips, _CONTROLS[name], Path(config.output) / "previews", sampling)
    return train(stage, data, config, preview, name=name.value.replace("_", " "))


def samples(config: TrainConfig) -> Samples:
    """What a run is trained on.

    Raises:
        FileNotFoundError: A source holds no clip.
    """
    if not config.data:
        return SpriteSamples(config.world, config.sets, config.num_frames)
    return ClipSamples(
        config.data, config.size, config.num_frames or 16, config.horizontal_flip, config.shuffle_shards, config.seed
    )
