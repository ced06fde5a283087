r"""Trains every stage for some steps on generated clips, and prints what the real runs will take: time and memory.

The first thing to run on a new machine: model, launcher, precision and memory are those of the real runs, and nothing
but the model has to be there. Clips are rendered on the CPU in place of being decoded. A finished stage is not
repeated.

    python scripts/smoke_training.py --config configs/train/smoke.yaml
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \
        scripts/smoke_training.py --config configs/train/smoke.yaml
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from imageconductor.command_line import parse_command_line
from imageconductor.data.sprite_world import SpriteSet
from imageconductor.devices import free_memory, resident_peak_bytes
from imageconductor.files import check_record, write_record, write_text
from imageconductor.processes import start_processes
from imageconductor.training.ignored_settings import reset_ignored
from imageconductor.training.loop import leave
from imageconductor.training.record import clips_per_step
from imageconductor.training.run import run_stage
from imageconductor.training.stage_configs import load_config
from imageconductor.training.train_config import TrainConfig


@dataclass
class SmokeConfig:
    """What is tried."""

    model: str = "models/animatediff_v3"  # model folder that the real runs start from
    stages: list[str] = field(default_factory=list)  # YAML files of the real runs, in order
    max_steps: int = 100  # optimiser steps of each stage; the first tenth is not timed
    settings: list[str] = field(
        default_factory=list
    )  # changes in every stage, e.g. 'settings=[batch_size=2,num_workers=8]'
    clips_per_step: int | None = None  # of the real runs; other steps are timed with a warning; null = any
    output: str = "runs/smoke"  # run folders of the stages, and results.md

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must name at least one YAML file of a stage")
        if self.max_steps < 2:
            raise ValueError(f"max_steps must be at least 2, got {self.max_steps}")


@dataclass
class Measured:
    """One stage on this machine."""

    name: str
    seconds_per_step: float  # median over the intervals that were logged
    clips_per_step: int
    peak_gib: float  # allocated on this process's GPU; without one, the process's resident memory so far
    real_steps: int
    device: str


def main() -> int:
    """Runs the stages one after the other and writes their table."""
    config, _ = parse_command_line(SmokeConfig, __doc__ or "")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made: dict[str, str] = {}
    trials: list[tuple[TrainConfig, TrainConfig]] = []
    try:
        for path in config.stages:
            real = load_config(Path(path), config.settings)
            if not isinstance(real, TrainConfig):
                raise ValueError(f"{path}: stage {real.stage} is not trained on annotated clips, as these stages are")
            trials.append((real, shorten(real, config, Path(path).stem, made)))
            made[real.stage] = f"{trials[-1][1].output}/{real.stage}"
        warnings = [text for real, _ in trials if (text := warn_of_batch(real, config.clips_per_step)) is not None]
        for text in warnings:
            logging.warning(text)
        results = [measure(real, trial) for real, trial in trials]
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        text = "\n".join([table(results), *(f"{warning}\n" for warning in warnings)])
        write_text(Path(config.output) / "results.md", text)
        print(text, end="")
    leave()
    return 0


def warn_of_batch(real: TrainConfig, wanted: int | None) -> str | None:
    """What to say of a stage whose steps have other clips here than in the real run, and so take another time."""
    processes = start_processes().num_processes
    clips = clips_per_step(real, processes)
    if wanted is None or clips == wanted:
        return None
    remedy = f"processes x batch_size x gradient_accumulation_steps must be {wanted}"
    if wanted % (real.batch_size * processes) == 0:
        remedy = f"set 'settings=[gradient_accumulation_steps={wanted // (real.batch_size * processes)}]'"
    return f"{Path(real.output).name}: a step has {clips} clips here and {wanted} in the real run; {remedy}"


def shorten(real: TrainConfig, smoke: SmokeConfig, name: str, made: dict[str, str]) -> TrainConfig:
    """A stage's settings for the trial: few steps on generated clips, from what the stages before it have made.

    Args:
        real: Settings of the real run.
        smoke: Of the trial.
        name: Of the run folder.
        made: Folders of earlier results by stage.
    """
    num_frames = real.num_frames or 16
    world = replace(real.world, size=real.size if real.data else real.world.size, num_frames=num_frames)
    inputs = {key: made.get(key) for key in ("motion_controlnet", "camera_lora") if hasattr(real, key)}
    trial = replace(
        real,
        model=smoke.model,
        data=[],
        held_out_clips=0,
        world=world,
        sets=[SpriteSet.CAMERA] if real.stage == "camera_lora" else [SpriteSet.MIXED],
        max_steps=smoke.max_steps,
        max_minutes=None,
        warmup_steps=min(real.warmup_steps, smoke.max_steps // 4),
        log_every=max(1, smoke.max_steps // 10),
        save_every=smoke.max_steps,
        preview_every=0,
        validation_every=0,
        output=str(Path(smoke.output) / name),
        **inputs,
    )
    return reset_ignored(trial)  # `settings` are for all stages, of which one may ignore some.


def measure(real: TrainConfig, trial: TrainConfig) -> Measured:
    """Trains a stage, or reads what was measured when it was."""
    kept = Path(trial.output) / "measured.json"
    record, made_with = kept.with_name("measured_with.json"), {**asdict(trial), "machine": _machine()}
    check_record(record, made_with, kept)
    if kept.is_file():
        return Measured(**json.loads(kept.read_text()))
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        free_memory()
        torch.cuda.reset_peak_memory_stats()
    run_stage(trial)
    peak = (torch.cuda.max_memory_allocated() if has_gpu else resident_peak_bytes()) / 2**30
    lines = [json.loads(line) for line in (Path(trial.output) / "metrics.jsonl").read_text().splitlines()]
    start = json.loads((Path(trial.output) / "environment.jsonl").read_text().splitlines()[-1])
    measured = Measured(
        name=Path(trial.output).name,
        seconds_per_step=statistics.median(line["seconds"] for line in lines[1:] or lines),
        clips_per_step=start["clips_per_step"],
        peak_gib=peak,
        real_steps=real.max_steps,
        device=start["device"],
    )
    if PartialState().is_main_process:
        write_record(record, made_with)
        write_text(kept, json.dumps(asdict(measured)))
    return measured


def _machine() -> str:
    """What the figures are of, beside the settings."""
    state = start_processes()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{state.num_processes} x {name}"


def table(results: list[Measured]) -> str:
    """Markdown: a row for each stage, and the sum."""
    memory = "peak GPU memory" if torch.cuda.is_available() else "peak memory"
    rows: list[list[Any]] = [["stage", "s a step", "clips/s", memory, "steps of the real run", "time of the real run"]]
    rows.append(["---"] * len(rows[0]))
    total = 0.0
    for result in results:
        seconds = result.seconds_per_step * result.real_steps
        total += seconds
        rows.append(
            [
                result.name,
                f"{result.seconds_per_step:.2f}",
                f"{result.clips_per_step / result.seconds_per_step:.2f}",
                f"{result.peak_gib:.1f} GiB",
                f"{result.real_steps:,}",
                duration(seconds),
            ]
        )
    rows.append(["all", "", "", "", "", duration(total)])
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"{PartialState().num_processes} x {results[0].device}", "", *lines, ""])


def duration(seconds: float) -> str:
    """Time in the largest unit that leaves at least one, such as "2.5 days"."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


if __name__ == "__main__":
    raise SystemExit(main())
