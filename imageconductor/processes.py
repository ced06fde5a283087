"""The processes that share the work of a training or an evaluation, and their progress bars."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from imageconductor.devices import warn_of_idle_gpu


def start_processes(device: str | None = None) -> PartialState:
    """The processes that share the work; on CPUs, accelerate lets them know of each other only if `cpu` is set.

    Without it each would train the whole, and all would write into one folder.
    """
    is_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    if not is_cpu:
        warn_of_idle_gpu()
    return PartialState(cpu=is_cpu or not torch.accelerator.is_available())


def own_part(state: PartialState, jobs: list[Any]) -> list[Any]:
    """Every n-th one, where n processes share the work."""
    return jobs[state.process_index :: state.num_processes]


def show_progress(state: PartialState, jobs: list[Any], title: str) -> Any:
    """The jobs one after the other, with a progress bar of the main process."""
    return tqdm(jobs, desc=title, dynamic_ncols=True, disable=not jobs or not state.is_main_process)
