"""From a stage's settings to its training: what `train.py` calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from imageconductor.data.batches import Batches
from imageconductor.devices import choose_precision, free_memory
from imageconductor.files import check_writable
from imageconductor.models.networks import Networks
from imageconductor.processes import start_processes
from imageconductor.training import checkpointing
from imageconductor.training.ignored_settings import check_ignored
from imageconductor.training.loop import Preview, TrainState, train
from imageconductor.training.record import check_continuation, check_num_clips
from imageconductor.training.stages.registry import find_stage
from imageconductor.training.train_config import StageConfig

PreviewFactory = Callable[[Sequence[dict[str, Any]], "str | None", Path, dict[str, Any]], Preview]
"""Makes the previews of a run from held-out samples, the control that the stage learns, a folder, and its settings."""

_PREVIEWED_CLIPS = 3


def run_stage(config: StageConfig, previews: PreviewFactory | None = None) -> TrainState:
    """Trains the stage that the settings name, to its end.

    Args:
        config: Of the stage's `Config`.
        previews: Makes the preview videos; sampling is not training's business.

    Raises:
        FileNotFoundError: The model folder, a network named in the settings, or a source of clips is missing.
        ValueError: The model does not fit the clips, or the run folder is that of another process or of other clips.
    """
    start = time.monotonic()  # A queue's time runs while networks are read and clips are listed, too.
    free_memory()  # of a stage before this one
    stage_class = find_stage(config.stage)
    check_inputs(config)
    processes = start_processes()
    device = cast(torch.device, processes.device)
    config = replace(config, mixed_precision=cast(Any, choose_precision(config.mixed_precision, device)))
    data = Batches(stage_class.build_samples(config), config.batch_size)
    check_num_clips(config, data.num_clips)
    shows_previews = previews is not None and config.preview_every
    held_out = stage_class.read_held_out(config) if config.validation_every else []
    shown = held_out if getattr(config, "data", None) else []  # Of sprite clips previews show all frames.
    clips = (shown or stage_class.read_held_out(config, _PREVIEWED_CLIPS)) if shows_previews else []
    with checkpointing.lock_folder(Path(config.output)):
        stage = stage_class(Networks.load(config.model), config)
        preview = None
        if previews is not None and clips:
            sampling = {"num_inference_steps": config.preview_steps, "guidance_scale": config.preview_guidance_scale}
            sampling |= stage.preview_settings
            folder = Path(config.output) / "previews"
            preview = previews(clips[:_PREVIEWED_CLIPS], stage.preview_control, folder, sampling)
        return train(stage, data, config, preview, held_out, start)


def check_inputs(config: StageConfig) -> None:
    """Makes sure, before any weights are read, that a run can begin or go on with its model, clips and files.

    Raises:
        FileNotFoundError: A part of the model, or a network named in the settings, is missing.
        ValueError: The model cannot make videos of the clips' shape, the run folder cannot be written or holds a run
            of other settings, or a setting would do nothing.
    """
    check_ignored(config)
    check_writable(Path(config.output))
    Networks.check_folder(config.model)
    check_continuation(config)
    find_stage(config.stage).check(config)
