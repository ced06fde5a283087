"""From a stage's settings to its training: what `train.py` calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from imageconductor.data.batches import Batches, Samples, SpriteSamples
from imageconductor.data.clips import ClipSamples
from imageconductor.models.networks import Networks
from imageconductor.training.loop import Preview, TrainState, train
from imageconductor.training.stages.registry import find_stage
from imageconductor.training.train_config import TrainConfig

PreviewFactory = Callable[[Sequence[dict[str, Any]], "str | None", Path, dict[str, Any]], Preview]
"""Makes the previews of a run from held-out samples, the control that the stage learns, a folder, and its settings."""

_PREVIEWED_CLIPS = 3
_HELD_OUT_SEED = 20_000  # evaluation uses 10,000


def run_stage(config: TrainConfig, previews: PreviewFactory | None = None) -> TrainState:
    """Trains the stage that the settings name, to its end.

    Args:
        config: Of the stage's `Config`.
        previews: Makes the preview videos; sampling is not training's business.

    Raises:
        FileNotFoundError: The model folder, or a network named in the settings, is missing.
    """
    stage = find_stage(config.stage)(Networks.load(config.model), config)
    data = Batches(build_samples(config), config.batch_size)
    preview = None
    if previews is not None and config.preview_every:
        held_out = build_samples(
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
        preview = previews(clips, stage.preview_control, Path(config.output) / "previews", sampling)
    return train(stage, data, config, preview)


def build_samples(config: TrainConfig) -> Samples:
    """The samples that a run is trained on.

    Raises:
        FileNotFoundError: A source holds no clip.
    """
    if not config.data:
        return SpriteSamples(config.world, config.sets, config.num_frames)
    return ClipSamples(
        config.data, config.size, config.num_frames or 16, config.horizontal_flip, config.shuffle_shards, config.seed
    )
