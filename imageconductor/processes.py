"""The processes that share the work of a training or an evaluation, and their progress bars."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm


def start_processes(device: str | None = None) -> PartialState:
    """The processes that share the work; on CPUs, accelerate lets them know of each other only if `cpu` is set.

    Without it each would train the whole, and all would write into one folder.
    """
    # torch.accelerator, from PyTorch 2.6 on, also knows those that are neither CUDA's nor Apple's.
    has_gpu = getattr(torch, "accelerator", torch.cuda).is_available() or torch.backends.mps.is_available()
    return PartialState(cpu=device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not has_gpu)


def own_part(state: PartialState, jobs: list[Any]) -> list[Any]:
    """Every n-th one, where n processes share the work."""
    return jobs[state.process_index :: state.num_processes]


def show_progress(state: PartialState, jobs: list[Any], title: str) -> Any:
    """The jobs one after the other, with a progress bar of the main process."""
    return tqdm(jobs, desc=title, dynamic_ncols=True, disable=not jobs or not state.is_main_process)
