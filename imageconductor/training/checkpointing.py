"""Checkpoints of a run: a folder each, complete or absent."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from imageconductor.files import atomic_folder, replace_folder

logger = logging.getLogger(__name__)
_PREFIX = "checkpoint-"


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
    folders = _folders(folder)
    place = folders.index(target) + 1  # Later ones could not be read, or the run would have gone on from them.
    for other in (*folders[: max(0, place - keep)], *folders[place:]):
        shutil.rmtree(other)
    return target


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read; others are passed over with a warning."""
    for path in reversed(_folders(folder)):
        try:
            state = json.loads((path / "state.json").read_text())
            tensors = {group: load_file(path / f"{group}.safetensors") for group in state["groups"]}
            optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # Every reader has its own way to say "truncated".
            logger.warning("checkpoint %s cannot be read (%s); trying the one before", path, error)
            continue
        return Checkpoint(state["step"], tensors, optimizer)
    return None


def latest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, readable or not; None without one."""
    folders = _folders(folder)
    return int(folders[-1].name.removeprefix(_PREFIX)) if folders else None


def save_result(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder and moves each part of it into `folder`, in the place of an older one."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".result.", suffix=".partial") as temporary:
        write(Path(temporary))
        for part in sorted(Path(temporary).iterdir()):
            replace_folder(part, folder / part.name)


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))
