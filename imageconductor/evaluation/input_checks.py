"""Checks of what an evaluation is given, before any network computes.

All faults are one line that names the file and the setting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from accelerate import PartialState

from imageconductor.data.trackers import CoTracker, LucasKanadeTracker, Tracker
from imageconductor.files import check_writable
from imageconductor.processes import local_main_process_first
from imageconductor.sampling.job import SampleJob

if TYPE_CHECKING:
    from imageconductor.evaluation.boxes.config import BoxEvaluateConfig
    from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
    from imageconductor.evaluation.learned_motion.config import LearnedMotionConfig
    from imageconductor.evaluation.metrics.frechet_names import FrechetName


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


def _is_path(name: str) -> bool:
    """Whether a name is meant as a local path and not as organisation/name on a hub."""
    return Path(name).exists() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w./-]+)?", name) is None
