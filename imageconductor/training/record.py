"""The record of a run in its folder: settings, versions, commit, and metrics by step."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard.writer import SummaryWriter

from imageconductor import config as config_file
from imageconductor.files import write_text

_PACKAGES = ("imageconductor", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")


class RunRecord:
    """Writes `config.yaml`, `environment.jsonl`, `metrics.jsonl` and `tensorboard/` into a run folder.

    Args:
        folder: The run folder.
        config: A dataclass instance, the run's settings.
        step: Optimiser steps done before; later metrics, of a run that was killed after its last checkpoint, go.
    """

    def __init__(self, folder: Path, config: Any, step: int):
        self.metrics = folder / "metrics.jsonl"
        config_file.save(config, folder / "config.yaml")
        with (folder / "environment.jsonl").open("a") as file:  # one line for each time that the run was started
            file.write(json.dumps({"start": step, **environment()}) + "\n")
        if self.metrics.exists():
            lines = self.metrics.read_text().splitlines(keepends=True)
            write_text(self.metrics, "".join(line for line in lines if _step(line) <= step))
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line of metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            self.tensorboard.add_scalar(key, value, step)
        self.tensorboard.flush()

    def close(self) -> None:
        """Closes the files."""
        self.tensorboard.close()


def environment() -> dict[str, Any]:
    """Versions, commit, machine and command of this process."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the half line of a run that was killed while it wrote
        return float("inf")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
