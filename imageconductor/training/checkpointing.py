"""Checkpoints of a run: a folder each, complete or absent."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after `step` optimiser steps."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by group ("parameters", "ema"), then by name
    optimizer: dict[str, Any]  # states of "optimizer" and, in fp16, of the loss "scaler"


def save(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], optimizer: Any, keep: int) -> Path:
    """Writes `folder/checkpoint-STEP` under another name, renames it, and removes all but the last `keep`."""
    target = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for group, state in tensors.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary / f"{group}.safetensors")
    torch.save(optimizer, temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps({"step": step, "groups": sorted(tensors)}))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read whole; unreadable ones are passed over with a warning."""
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


def save_result(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder and moves what it wrote into `folder`, each part whole."""
    temporary = folder / f".result.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    for part in temporary.iterdir():
        shutil.rmtree(folder / part.name, ignore_errors=True)
        part.rename(folder / part.name)
    temporary.rmdir()


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))
