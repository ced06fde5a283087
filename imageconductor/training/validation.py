"""The denoising loss on held-out clips, which tells whether a run still learns, and whether trajectories help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from imageconductor.data.batches import collate
from imageconductor.training import sharding
from imageconductor.training.engines import Replicated
from imageconductor.training.hooks import TrainState
from imageconductor.training.stages.base import Stage
from imageconductor.training.train_config import LoopConfig
from imageconductor.training.weight_average import WeightAverage

TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)  # fractions of the scheduler's training timesteps


class Validate:
    """Every `validation_every` steps, the denoising loss on held-out clips at fixed timesteps, logged in that step.

    Each clip has the same frames, tracks and noise every time, and nothing is dropped from its condition, so that two
    values of a run differ by the weights alone: the average where there is one. `validation/loss` is the mean over
    `TIMESTEPS`, `validation/t500` that at t = 500; `..._without_trajectories` is the same without flow map, and
    `..._without_boxes` with every object absent. Where the two do not differ, the model does not follow trajectories,
    or boxes.

    Args:
        config: Of the run.
        engine: Whose processes share the clips.
        average: Of the parameters.
        stage: Whose conditions are taken.
        module: The stage as the engine runs it.
        clips: Held-out samples; a number that is a multiple of the clips per micro-step over all processes, or some
            count twice.
    """

    def __init__(
        self,
        config: LoopConfig,
        engine: Replicated,
        average: WeightAverage,
        stage: Stage,
        module: nn.Module,
        clips: Sequence[dict[str, Any]],
    ):
        self.config, self.accelerator, self.average = config, engine.accelerator, average
        self.stage, self.module, self.clips = stage, module, clips
        num_timesteps = stage.scheduler.config["num_train_timesteps"]
        self.timesteps = [int(fraction * num_timesteps) for fraction in TIMESTEPS]

    def __call__(self, state: TrainState) -> None:
        """Measures the step if its time has come."""
        every = self.config.validation_every
        if not self.clips or not every or state.step % every:
            return
        with torch.no_grad(), self.average.in_place(), self.stage.without_dropout(), self.accelerator.autocast():
            losses = [self._measure(batch) for batch in self._batches()]
        sharding.forget_gathered(self.module)  # They are of the average.
        reduce: Any = self.accelerator.reduce
        for key in losses[0]:
            mean = torch.stack([measured[key] for measured in losses]).mean()
            state.measured[f"validation/{key}"] = cast(Tensor, reduce(mean, "mean")).item()

    def _batches(self) -> list[list[int]]:
        """Numbers of the clips of this process, as many batches in each process, all of the training's size."""
        size, rank, world = self.config.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        count = -(-len(self.clips) // (size * world)) * world
        return [[p % len(self.clips) for p in range(i * size, (i + 1) * size)] for i in range(rank, count, world)]

    def _measure(self, numbers: list[int]) -> dict[str, Tensor]:
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        x_0, condition = self.stage.encode(collate([self.clips[number] for number in numbers]), generators)
        eps = torch.stack([torch.randn(x_0.shape[1:], generator=generator) for generator in generators]).to(x_0.device)
        conditions = {"": condition}
        if condition.flow is not None:
            conditions["_without_trajectories"] = replace(condition, flow=None, has_flow=None)
        if condition.present is not None:
            conditions["_without_boxes"] = replace(condition, present=torch.zeros_like(condition.present))
        losses: dict[str, Tensor] = {}
        for name, given in conditions.items():
            for step in self.timesteps:
                t = torch.full((len(numbers),), step, dtype=torch.int64, device=x_0.device)
                losses[f"t{step}{name}"] = self.module(x_0, t, eps, given)[self.stage.validated].float()
            losses[f"loss{name}"] = torch.stack([losses[f"t{step}{name}"] for step in self.timesteps]).mean()
        return losses
