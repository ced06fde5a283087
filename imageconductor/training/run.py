"""From a stage's settings to its training: what `train.py` calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from imageconductor.checkpoints.model_folder import check_shape
from imageconductor.data.batches import Batches, Samples, SpriteSamples
from imageconductor.data.clips import ClipSamples
from imageconductor.files import check_writable
from imageconductor.models.networks import Networks
from imageconductor.training.loop import Preview, TrainState, train
from imageconductor.training.record import check_continuation
from imageconductor.training.stages.registry import find_stage
from imageconductor.training.train_config import TrainConfig

PreviewFactory = Callable[[Sequence[dict[str, Any]], "str | None", Path, dict[str, Any]], Preview]
"""Makes the previews of a run from held-out samples, the control that the stage learns, a folder, and its settings."""

_PREVIEWED_CLIPS = 3
_SPRITE_CLIPS = 16  # held-out clips of the sprite world
HELD_OUT_SEED = 20_000  # is added to a world's seed; evaluation uses 10,000


def run_stage(config: TrainConfig, previews: PreviewFactory | None = None) -> TrainState:
    """Trains the stage that the settings name, to its end.

    Args:
        config: Of the stage's `Config`.
        previews: Makes the preview videos; sampling is not training's business.

    Raises:
        FileNotFoundError: The model folder, a network named in the settings, or a source of clips is missing.
        ValueError: The model does not fit the clips.
    """
    stage_class = find_stage(config.stage)
    check_inputs(config)
    data = Batches(build_samples(config), config.batch_size)
    shows_previews = previews is not None and config.preview_every
    held_out = read_held_out(config, config.held_out_clips or _SPRITE_CLIPS) if config.validation_every else []
    clips = (held_out or read_held_out(config, _PREVIEWED_CLIPS))[:_PREVIEWED_CLIPS] if shows_previews else []
    stage = stage_class(Networks.load(config.model), config)
    preview = None
    if previews is not None and clips:
        sampling = {"num_inference_steps": config.preview_steps, "guidance_scale": config.preview_guidance_scale}
        preview = previews(clips, stage.preview_control, Path(config.output) / "previews", sampling)
    return train(stage, data, config, preview, held_out)


def check_inputs(config: TrainConfig) -> None:
    """Makes sure, before any weights are read, that a run can begin or go on with its model, clips and files.

    Raises:
        FileNotFoundError: A part of the model, or a network named in the settings, is missing.
        ValueError: The model cannot make videos of the clips' shape, the run folder cannot be written, or it holds a
            run of other settings.
    """
    check_writable(Path(config.output))
    folder = Networks.check_folder(config.model)
    size = config.size if config.data else config.world.size
    num_frames = config.num_frames or (16 if config.data else config.world.num_frames)
    check_continuation(config)
    check_shape(folder, size, num_frames)
    find_stage(config.stage).check(config)


def read_held_out(config: TrainConfig, count: int) -> list[dict[str, Any]]:
    """The first held-out samples: of `data`, or of scenes of the sprite world that no stage is trained on."""
    if config.data:
        samples: Samples = ClipSamples(
            config.data,
            config.size,
            config.num_frames or 16,
            held_out_clips=config.held_out_clips,
            shows_held_out=True,
        )
        count = min(count, config.held_out_clips)
    else:
        world = replace(config.world, seed=config.world.seed + HELD_OUT_SEED)
        samples = SpriteSamples(world, config.sets)
    return [samples[position] for position in range(count)]


def build_samples(config: TrainConfig) -> Samples:
    """The samples that a run is trained on.

    Raises:
        FileNotFoundError: A source holds no clip.
        ValueError: The clips cannot be used together, or all of them are held out.
    """
    if not config.data:
        return SpriteSamples(config.world, config.sets, config.num_frames, config.max_frame_spacing)
    return ClipSamples(
        config.data,
        config.size,
        config.num_frames or 16,
        config.horizontal_flip,
        config.shuffle_shards,
        config.seed,
        config.held_out_clips,
    )
