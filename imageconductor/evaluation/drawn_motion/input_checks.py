"""Checks of what an evaluation of drawn motion is given, before any network computes: models, metrics, references.

All faults are one line that names the file and the setting.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from imageconductor.checkpoints.model_folder import check_adapters, check_controlnets, check_shape, locate_model
from imageconductor.checkpoints.personalise import check_base, check_loras
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method, Task
from imageconductor.evaluation.drawn_motion.generation_settings import list_attached_files
from imageconductor.evaluation.drawn_motion.reference_videos import list_reference_files
from imageconductor.evaluation.input_checks import check_clip, check_tracker, network_file
from imageconductor.evaluation.metrics.appearance import ssim
from imageconductor.evaluation.metrics.frechet import load_network
from imageconductor.evaluation.video_files import count_frames
from imageconductor.processes import own_part
from imageconductor.sampling.branches import ADAPTERS, Control
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.loras import find_job_loras

logger = logging.getLogger(__name__)

_THREADS = 8  # that read the headers of videos, which is waiting for ffmpeg to start


def check_models(config: EvaluateConfig, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Makes sure that models can make their videos and have the tasks' LoRAs, and that what is attached fits them.

    Args:
        config: Settings of the evaluation.
        sizes: (W, H) of each method's videos.

    Raises:
        ValueError, FileNotFoundError: Something is missing, damaged, or of another model.
    """
    for name, method in config.all_methods.items():
        if method.model is not None:
            try:
                _check_model(locate_model(method.model), method, config.tasks.values(), sizes[name])
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"method {name}: {error}") from None


def _check_model(folder: Path, method: Method, tasks: Iterable[Task], size: tuple[int, int]) -> None:
    check_shape(folder, size)
    for task in tasks:
        if task.image or task.control != "none":
            check_controlnets(folder, "a video of an image or trajectories")
        if task.control != "none":
            check_adapters(folder, ADAPTERS[Control(task.control)], f"control {task.control!r}")
    for file in list_attached_files(method):
        if not Path(file).is_file():
            raise FileNotFoundError(f"no file at {file}")
    asked = SampleJob(model=str(folder), lora=method.lora, motion_lora=method.motion_lora, few_step=method.few_step)
    check_loras(folder, *([path for path, _ in loras] for loras in find_job_loras(asked)))
    if method.base is not None:
        check_base(method.base)


def check_instruments(config: EvaluateConfig) -> None:
    """Makes sure that the networks of the metrics can be read, as far as that takes seconds.

    Raises:
        ValueError, FileNotFoundError: A file is missing or holds something else, or a library is not installed.
    """
    ssim(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8))
    for name in config.frechet:
        try:
            load_network(name, network_file(config, name))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{name}_weights: {error}") from None
    check_clip("clip", config.clip)
    check_tracker(config)


def check_references(config: EvaluateConfig, num_frames: int, state: PartialState) -> None:
    """Makes sure, by their headers, that the reference videos can be read, and that some are long enough.

    Each process reads a part of the headers, and all of them judge the whole: every process has to call it.

    Args:
        config: Settings of the evaluation.
        num_frames: Frames that are needed of each video, `reference_stride` apart.
        state: The processes that share the work.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Files cannot be read, or all are too short; the message names the first one.
    """
    own = own_part(state, list_reference_files(config))
    needed = (num_frames - 1) * config.reference_stride + 1
    with ThreadPoolExecutor(_THREADS) as pool:
        bar = tqdm(pool.map(count_frames, own), total=len(own), desc="reference: checks", dynamic_ncols=True)
        found: list[tuple[Path, float | None]] = gather_object(list(zip(own, bar, strict=True)))
    if unreadable := [path for path, count in found if count is None]:
        raise ValueError(
            f"reference: {unreadable[0]} cannot be read as a video; take {len(unreadable)} such file(s) out of "
            f"{config.reference}"
        )
    short = [(path, count) for path, count in found if count is not None and count < needed]
    if short:
        path, count = short[0]
        told = f"{len(short)} of {len(found)} files have fewer than {needed} frames, as {path} with {count:.0f}"
        if len(short) == len(found):
            raise ValueError(f"reference: {told}; lower reference_stride={config.reference_stride}")
        if state.is_main_process:
            logger.warning("reference: %s; they are left out", told)
