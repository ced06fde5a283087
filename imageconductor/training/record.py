"""The record of a run in its folder: settings, versions, commit, and metrics by step.

The record also decides which run may be continued: one whose settings mean the same, unless the user says otherwise.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from imageconductor import config as config_file
from imageconductor.files import write_text
from imageconductor.training import checkpointing
from imageconductor.training.ignored_settings import reset_ignored
from imageconductor.training.train_config import LoopConfig

logger = logging.getLogger(__name__)

_STARTS = "environment.jsonl"  # one line for each time that the run was started
_CONSTANT = ("constant", "constant_with_warmup")  # schedules that do not depend on the length of the run
_PACKAGES = ("imageconductor", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")


class RunRecord:
    """Writes `config.yaml`, `environment.jsonl`, `metrics.jsonl` and `tensorboard/` into a run folder.

    Args:
        folder: The run folder.
        config: The run's settings.
        step: Optimiser steps done before; later metrics, of a run that was killed after its last checkpoint, go.
        num_processes: That train together.
        num_clips: From which the samples are taken; None = no end of them.
    """

    def __init__(
        self, folder: Path, config: LoopConfig, step: int, num_processes: int = 1, num_clips: int | None = None
    ):
        self.metrics = folder / "metrics.jsonl"
        # A permission and a time limit are for one start; whoever starts again with this file is asked again.
        config_file.save(replace(config, allow_changes=False, max_minutes=None), folder / "config.yaml")
        start = {
            "start": step,
            "clips_per_step": clips_per_step(config, num_processes),
            "num_clips": num_clips,
            **environment(),
            "settings": config_file.to_plain(config),
        }
        with (folder / _STARTS).open("a") as file:
            file.write(json.dumps(start) + "\n")
        if self.metrics.exists():
            lines = self.metrics.read_text().splitlines(keepends=True)
            write_text(self.metrics, "".join(line for line in lines if _step(line) <= step))
        self.tensorboard: Any = None  # Left out where it is not installed, as on a machine that is lent for a while.
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line of metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tensorboard is not None:
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
            self.tensorboard.flush()

    def close(self) -> None:
        """Closes the files."""
        if self.tensorboard is not None:
            self.tensorboard.close()


def clips_per_step(config: LoopConfig, num_processes: int) -> int:
    """The global batch: clips of an optimiser step, over all processes and micro-steps."""
    return config.batch_size * config.gradient_accumulation_steps * num_processes


def check_continuation(config: LoopConfig) -> None:
    """Makes sure that the run in `config.output`, if there is one, can go on with these settings.

    Settings of `config.FREE_TO_CHANGE` may differ, and `max_steps` where the learning rate does not depend on it.
    Others change what the run means: they are refused, or with `allow_changes` logged. Those of `config.FIXED` are
    refused in any case, as what was learned does not fit them.

    Raises:
        ValueError: In one line, with both values of each setting.
    """
    folder = Path(config.output)
    step, path = checkpointing.latest_step(folder), folder / "config.yaml"
    if step is None or not path.is_file():
        return
    if step > config.max_steps:
        raise ValueError(f"{folder} has {step} steps behind it, more than max_steps={config.max_steps}")
    changes = _changes(config, path)
    if fixed := [text for name, text in changes.items() if name.partition(".")[0] in config.FIXED]:
        raise ValueError(f"{folder} holds a run with {', '.join(fixed)}, which cannot change; choose another output")
    if changes:
        told = f"{folder} was trained for {step} steps with {', '.join(changes.values())}"
        _ask_permission(config, told, "go back to those settings")


def check_num_clips(config: LoopConfig, num_clips: int | None) -> None:
    """Makes sure that the run in `config.output`, if there is one, can go on with this number of clips.

    Another number maps the positions of the run to other clips: it is refused, or with `allow_changes` logged.

    Raises:
        ValueError: In one line, with both numbers.
    """
    folder = Path(config.output)
    step, before = checkpointing.latest_step(folder), _last_start(folder / _STARTS).get("num_clips")
    if step is not None and None not in (before, num_clips) and before != num_clips:
        told = f"{folder} was trained for {step} steps on {before} clips; there are {num_clips} now"
        _ask_permission(config, told, "put back those clips")


def _ask_permission(config: LoopConfig, told: str, remedy: str) -> None:
    if not config.allow_changes:
        raise ValueError(f"{told}; choose another output, {remedy}, or set allow_changes=true")
    logger.warning(told)


def _changes(config: LoopConfig, path: Path) -> dict[str, str]:
    """Settings that differ from a run's and matter, by dotted name, as "seed=0, now 1"."""
    raw = config_file.read_yaml(path)
    if (stage := raw.get("stage", config.stage)) != config.stage:
        return {"stage": f"stage={stage}, now {config.stage}"}
    try:
        before = reset_ignored(config_file.load(type(config), path))  # Values other than defaults are refused today.
    except ValueError as error:
        raise ValueError(
            f"the run in {path.parent} cannot be continued, its settings no longer hold: {error}"
        ) from None
    old = {field.key: field.default for field in config_file.list_fields(type(config), before)}
    new = {field.key: field.default for field in config_file.list_fields(type(config), config)}
    free = config.FREE_TO_CHANGE | ({"max_steps"} if config.lr_schedule in _CONSTANT else set())
    if (before_clips := _last_start(path.with_name(_STARTS)).get("clips_per_step")) is not None:
        old["clips_per_step"] = before_clips
        new["clips_per_step"] = clips_per_step(config, int(os.environ.get("WORLD_SIZE", 1)))
    if config.mixed_precision == "auto":
        free |= {"mixed_precision"}  # On another machine it may be another one.
    return {
        name: f"{name}={_show(old.get(name))}, now {_show(new.get(name))}"
        for name in {**old, **new}
        if name.partition(".")[0] not in free and old.get(name) != new.get(name)
    }


def _show(value: Any) -> str:
    plain = config_file.to_plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _last_start(starts: Path) -> dict[str, Any]:
    """The newest start that is on record; those of earlier versions lack `clips_per_step` or `num_clips`."""
    for line in reversed(starts.read_text().splitlines() if starts.is_file() else []):
        try:
            return json.loads(line)
        except ValueError:  # the half line of a run that was killed while it wrote
            continue
    return {}


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
