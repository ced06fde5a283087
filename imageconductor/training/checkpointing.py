"""Checkpoints of a run: a folder each, complete or absent."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from imageconductor.files import atomic_folder, lock, replace_folder
from imageconductor.processes import run_together

logger = logging.getLogger(__name__)
_PATIENCE_S = 10.0  # The workers of a run that was just killed hold its lock until they notice.
_PREFIX = "checkpoint-"
_NAME = re.compile(rf"{_PREFIX}\d{{8,}}")
# What readers raise for a file that is not whole. Memory or a disk that fails says nothing of the file.
_DAMAGE = (
    SafetensorError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    FileNotFoundError,
    KeyError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after `step` optimiser steps."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by group ("parameters", "ema"), then by name
    optimizer: dict[str, Any]  # states of "optimizer" and, in fp16, of the loss "scaler"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: Any,
    keep: int,
    write: Callable[[Path], None] | None = None,
) -> Path:
    """Writes `folder/checkpoint-STEP`, which appears when it is complete, and removes all but the last `keep` up to it.

    Later ones, which could not be read when the run went on from an earlier one, stay until their step is saved again.
    `write` may put more into it.
    """
    target = folder / f"{_PREFIX}{step:08d}"
    with atomic_folder(target, replace=True) as path:
        for group, state in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path / f"{group}.safetensors")
        torch.save(optimizer, path / "optimizer.pt")
        if write is not None:
            write(path)
        (path / "state.json").write_text(json.dumps({"step": step, "groups": sorted(tensors)}))
    done = [path for path in _folders(folder) if _step(path) <= step]
    for old in done[:-keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # of a network disk whose file is still open somewhere
            logger.warning("the old checkpoint %s cannot be deleted (%s)", old, error)
    return target


def load(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step.

    Raises:
        ValueError: It is not there, or damaged.
    """
    path = folder / f"{_PREFIX}{step:08d}"
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = {group: load_file(path / f"{group}.safetensors") for group in state["groups"]}
        return Checkpoint(state["step"], tensors, _read_optimizer(path / "optimizer.pt"))
    except _DAMAGE as error:
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ValueError(f"checkpoint {path} cannot be read ({reason})") from error


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is not damaged, others being passed over with a warning; None in a fresh folder.

    Raises:
        ValueError: There are checkpoints, and all are damaged.
    """
    folders = _folders(folder)
    for path in reversed(folders):
        try:
            return load(folder, _step(path))
        except ValueError as error:
            logger.warning("%s; trying the one before", error)
    if folders:
        raise ValueError(
            f"{folder}: none of its {len(folders)} checkpoints can be read; delete them to begin anew, or choose "
            "another output"
        )
    return None


def latest_agreed(folder: Path) -> Checkpoint | None:
    """What `latest` gives the main process, in every process of a run.

    Raises:
        ValueError: As of `latest`, or a process cannot read what the main process has read.
    """
    processes = PartialState()
    found = run_together(lambda: latest(folder) if processes.is_main_process else None)
    (step,) = broadcast_object_list([found and found.step])

    def read() -> Checkpoint | None:
        if processes.is_main_process or step is None:
            return found
        try:
            return load(folder, step)
        except ValueError as error:
            raise ValueError(
                f"process {processes.process_index}: {error}, which the main process has read; put output={folder} "
                "on a disk that all processes share"
            ) from error

    return run_together(read)


def latest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, readable or not; None without one."""
    folders = _folders(folder)
    return _step(folders[-1]) if folders else None


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """A block in which no other run writes into a run folder, which all processes of a run begin, or none.

    Raises:
        ValueError: Another run writes into it.
    """
    with ExitStack() as stack:
        run_lock = lock(folder / ".lock", patience_s=_PATIENCE_S)
        run_together(lambda: stack.enter_context(run_lock) if PartialState().is_main_process else None)
        yield


def save_result(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder and moves each part of it into `folder`, in the place of an older one."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".result.", suffix=".partial") as temporary:
        write(Path(temporary))
        for part in sorted(Path(temporary).iterdir()):
            replace_folder(part, folder / part.name)


def _read_optimizer(path: Path) -> Any:
    zipfile.ZipFile(path).close()  # A file that is cut off is told apart here; torch has many words for it.
    is_copied = torch.accelerator.is_available()  # to its memory; else the moments would stay in the file
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_copied)
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise zipfile.BadZipFile(str(error)) from error


def _folders(folder: Path) -> list[Path]:
    """Checkpoints by step; copies under other names and links are the user's."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))
