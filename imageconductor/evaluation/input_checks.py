"""Checks of what an evaluation is given, before any network computes: folders, models, networks of metrics, references.

All faults are one line that names the file and the setting.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from imageconductor.checkpoints.model_folder import check_adapters, check_controlnets, check_shape, locate_model
from imageconductor.checkpoints.personalise import check_base, check_loras
from imageconductor.data.trackers import CoTracker, LucasKanadeTracker, Tracker
from imageconductor.evaluation.appearance import ssim
from imageconductor.evaluation.box_config import BoxEvaluateConfig
from imageconductor.evaluation.evaluate_config import EvaluateConfig, FrechetName, Method, Task
from imageconductor.evaluation.frechet import load_network
from imageconductor.evaluation.generation_settings import list_attached_files
from imageconductor.evaluation.learned_motion_config import LearnedMotionConfig
from imageconductor.evaluation.reference_videos import list_reference_files
from imageconductor.evaluation.video_files import count_frames
from imageconductor.files import check_writable
from imageconductor.processes import local_main_process_first, own_part
from imageconductor.sampling.branches import ADAPTERS, Control
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.loras import find_job_loras

logger = logging.getLogger(__name__)

_THREADS = 8  # that read the headers of videos, which is waiting for ffmpeg to start


def check_output(output: Path) -> None:
    """Raises ValueError if something else lies where the evaluation is to be, or if nothing can be written there."""
    check_writable(output)
    if output.exists() and any(output.iterdir()) and not (output / "scores").is_dir():
        raise ValueError(f"{output} exists and holds something else; name another --output")


def agree_on_shape(jobs: Mapping[str, SampleJob]) -> tuple[tuple[int, int], int]:
    """(W, H) and the number of frames of all methods' videos, which must be comparable.

    Args:
        jobs: By method, with the models' defaults.

    Raises:
        ValueError: They differ; names two methods.
    """
    shapes = {
        name: (cast(int, job.width), cast(int, job.height), cast(int, job.num_frames)) for name, job in jobs.items()
    }
    (first, shape), *others = shapes.items()
    if other := next((name for name, found in others if found != shape), None):
        told = " and ".join(f"{name} {'x'.join(map(str, shapes[name]))}" for name in (first, other))
        raise ValueError(f"the methods must make videos of one size and length: {told}; set size and num_frames")
    return shape[:2], shape[2]


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


def check_clip(setting: str, name: str | None, kind: str = "CLIP model") -> None:
    """Raises FileNotFoundError if a setting names a local folder that is no model of transformers."""
    if name is not None and _is_path(name) and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"{setting}: no {kind} at {name} (config.json is missing)")


def check_tracker(config: EvaluateConfig | LearnedMotionConfig) -> None:
    """Raises FileNotFoundError if CoTracker is asked for from a local folder that does not hold it."""
    is_clone = config.tracker == "cotracker" and _is_path(config.cotracker)
    if is_clone and not Path(config.cotracker, "hubconf.py").is_file():
        raise FileNotFoundError(f"cotracker: {config.cotracker} is no clone of CoTracker (hubconf.py is missing)")


def build_tracker(config: EvaluateConfig | LearnedMotionConfig, device: str) -> Tracker:
    """The point tracker that the settings name; every process has to call it.

    Raises:
        ValueError: CoTracker cannot be loaded.
    """
    if config.tracker != "cotracker":
        return LucasKanadeTracker()
    with local_main_process_first(PartialState()):  # torch.hub downloads into a folder that a machine's processes share
        return CoTracker(config.cotracker, device=device)


def network_file(config: EvaluateConfig | BoxEvaluateConfig, distance: FrechetName) -> Path | None:
    """File of a Fréchet distance's network; None for the embedded one."""
    weights = {"fid": config.fid_weights, "fvd": config.fvd_weights}.get(distance)
    return None if weights is None else Path(weights)


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


def _is_path(name: str) -> bool:
    """Whether a name is meant as a local path and not as organisation/name on a hub."""
    return Path(name).exists() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w./-]+)?", name) is None
