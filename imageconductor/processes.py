"""The processes that share the work of a training or an evaluation, and their progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env, patch_environment
from tqdm.auto import tqdm

from imageconductor.devices import warn_of_idle_gpu

T = TypeVar("T")


def start_processes(device: str | None = None) -> PartialState:
    """The processes that share the work; on CPUs, accelerate lets them know of each other only if `cpu` is set.

    Without it each would train the whole, and all would write into one folder.
    """
    is_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    if not is_cpu:
        warn_of_idle_gpu()
    # Where DeepSpeed is asked for accelerate would want it at every step; `training.deepspeed` speaks to it itself.
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
        return PartialState(cpu=is_cpu or not torch.accelerator.is_available())


@contextmanager
def local_main_process_first(state: PartialState) -> Iterator[None]:
    """Lets the first process of each machine do the block before the others, e.g. download what they then find.

    Unlike with accelerate's own, the others go on where it fails, and fail or succeed by themselves.
    """
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def own_part(state: PartialState, jobs: list[Any]) -> list[Any]:
    """Every n-th one, where n processes share the work."""
    return jobs[state.process_index :: state.num_processes]


def show_progress(state: PartialState, jobs: list[Any], title: str) -> Any:
    """The jobs one after the other, with a progress bar of the main process."""
    return tqdm(jobs, desc=title, dynamic_ncols=True, disable=not jobs or not state.is_main_process)


def run_together(work: Callable[[], T]) -> T:
    """The result of `work`, which every process has to call; if it fails in one, it fails in all, and none waits on.

    Raises:
        ValueError: The input is bad in some process.
        Exception: What `work` has raised here, or RuntimeError if it has failed elsewhere.
    """
    failure, result = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    is_bad_input = isinstance(failure, ValueError | FileNotFoundError)
    text = str(failure) if is_bad_input else repr(failure)
    failures: list[tuple[bool, str]] = gather_object([] if failure is None else [(is_bad_input, text)])
    if failure is not None:
        raise failure
    if failures:
        raise (ValueError if failures[0][0] else RuntimeError)(failures[0][1])
    return cast(T, result)
