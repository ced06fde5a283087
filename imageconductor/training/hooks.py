"""What happens between the steps of a run: a line of metrics, a checkpoint, preview videos, each at its interval."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from imageconductor.models.networks import Networks
from imageconductor.training import checkpointing
from imageconductor.training.engines import Replicated
from imageconductor.training.record import RunRecord, clips_per_step
from imageconductor.training.stages.base import Stage
from imageconductor.training.train_config import LoopConfig
from imageconductor.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

Preview = Callable[[int, Networks], None]
"""Called with the step and the networks as they would be saved then."""

T = TypeVar("T")


@dataclass
class TrainState:
    """Where a run is."""

    step: int = 0
    terms: dict[str, Tensor] = field(default_factory=dict)  # losses of this process in the last step, by name
    losses: dict[str, float] = field(default_factory=dict)  # means over all processes of the last step that was logged
    measured: dict[str, float] = field(default_factory=dict)  # on held-out clips in this step; logged and emptied
    clips: int = 0  # read by this process, since the start
    corrupt: int = 0  # clips among them that could not be used
    loading_s: float = 0.0  # seconds in which this process waited for batches, since the start


def count_loading(batches: Iterable[T], state: TrainState) -> Iterator[T]:
    """The batches; the time that each is waited for is added to the state's."""
    waiting, end = iter(batches), object()
    while True:
        start = time.perf_counter()
        batch = next(waiting, end)
        state.loading_s += time.perf_counter() - start
        if batch is end:
            return
        yield cast(T, batch)


class Log:
    """The progress bar, and every `log_every` steps a line of metrics: losses, learning rate, speed, damaged clips.

    Args:
        config: Of the run.
        engine: Whose processes are averaged over.
        lr_scheduler: Of the optimiser.
        state: Of the run as it starts.
        stage: Whose name is shown beside the bar, and whose measures are logged.
        num_clips: As of `RunRecord`.
    """

    def __init__(
        self,
        config: LoopConfig,
        engine: Replicated,
        lr_scheduler: Any,
        state: TrainState,
        stage: Stage,
        num_clips: int | None = None,
    ):
        self.stage, self.config, self.engine = stage, config, engine
        self.accelerator, self.lr_scheduler = engine.accelerator, lr_scheduler
        is_main = self.accelerator.is_main_process
        processes = self.accelerator.num_processes
        self.record = RunRecord(Path(config.output), config, state.step, processes, num_clips) if is_main else None
        self.bar = tqdm(
            total=config.max_steps,
            initial=state.step,
            desc=stage.name.replace("_", " "),
            unit="step",
            dynamic_ncols=True,
            disable=not is_main,
        )
        self.time, self.step, self.loading_s = time.perf_counter(), state.step, state.loading_s
        self.validation = ""  # the last validation loss, as the bar shows it

    def __call__(self, state: TrainState) -> None:
        """Counts a step, and logs it if its time has come."""
        self.bar.update()
        if state.step % self.config.log_every and state.step != self.config.max_steps and not state.measured:
            return
        reduce: Any = self.accelerator.reduce
        state.losses = {key: cast(Tensor, reduce(value, "mean")).item() for key, value in state.terms.items()}
        corrupt = reduce(torch.tensor(state.corrupt, device=self.accelerator.device), "sum").item()
        seconds = (time.perf_counter() - self.time) / (state.step - self.step)
        loading = (state.loading_s - self.loading_s) / (state.step - self.step)
        self.time, self.step, self.loading_s = time.perf_counter(), state.step, state.loading_s
        held_out, state.measured = state.measured, {}
        own = self.stage.measures()
        if self.record is None:
            return
        clips_per_second = clips_per_step(self.config, self.accelerator.num_processes) / seconds
        rates = {
            f"learning_rate_{i}" if i else "learning_rate": r for i, r in enumerate(self.lr_scheduler.get_last_lr())
        }
        measured = {
            **{name: float(rate) for name, rate in rates.items()},
            "seconds": round(seconds, 4),
            "loading_seconds": round(loading, 4),
            "clips_per_second": round(clips_per_second, 3),
            "corrupt_clips": float(corrupt),
        }
        if self.config.mixed_precision == "fp16":
            measured["skipped_steps"] = float(self.engine.skipped)
        self.record.log(state.step, {**state.losses, **own, **held_out, **measured})
        shown = {key: f"{value:.4f}" for key, value in state.losses.items()}
        if "validation/loss" in held_out:
            self.validation = f"{held_out['validation/loss']:.4f}"
        shown |= {key: f"{value:.3f}" for key, value in own.items()}
        shown |= {"validation": self.validation} if self.validation else {}
        speed = {"clips/s": f"{clips_per_second:.2f}", "loading": f"{100 * loading / seconds:.0f} %"}
        self.bar.set_postfix(shown | speed)

    def close(self) -> None:
        """Closes bar and files."""
        self.bar.close()
        if self.record is not None:
            self.record.close()


class Save:
    """A checkpoint every `save_every` steps, after the last one, and when it is asked for.

    Args:
        config: Of the run.
        engine: That holds parameters and optimiser.
        average: Of the parameters.
        stage: What learns; its LoRAs are written into the checkpoint where every process holds them whole.
    """

    def __init__(self, config: LoopConfig, engine: Replicated, average: WeightAverage, stage: Stage):
        self.config, self.engine, self.average, self.stage = config, engine, average, stage

    def __call__(self, state: TrainState) -> None:
        """Saves the step if its time has come."""
        if state.step % self.config.save_every == 0 or state.step == self.config.max_steps:
            self.write(state)

    def write(self, state: TrainState) -> None:
        """Saves the step.

        Raises:
            FloatingPointError: Weights are not finite.
        """
        self.engine.check_finite(state.step)
        config, is_main = self.config, self.engine.accelerator.is_main_process
        if not (is_main or self.engine.saves_together):
            return
        averages = {"ema": average} if (average := self.average.named()) else {}
        groups, states = self.engine.gather_state({"parameters": self.engine.parameters, **averages})
        if is_main:
            write = self._write_loras if self.stage.learns_loras and not self.engine.saves_together else None
            checkpointing.save(Path(config.output), state.step, groups, states, config.keep_checkpoints, write)

    def _write_loras(self, folder: Path) -> None:
        with self.average.in_place():
            self.stage.save(folder)


class ShowPreview:
    """Preview videos every `preview_every` steps, by the average of the weights where there is one.

    Args:
        config: Of the run.
        engine: Whose first process makes them.
        average: Of the parameters.
        stage: Whose networks are trained.
        preview: Makes them; None = no previews.
    """

    def __init__(
        self,
        config: LoopConfig,
        engine: Replicated,
        average: WeightAverage,
        stage: Stage,
        preview: Preview | None,
    ):
        self.config, self.accelerator, self.average = config, engine.accelerator, average
        self.stage, self.preview = stage, preview

    def __call__(self, state: TrainState) -> None:
        """Makes previews of the step if their time has come; one that fails costs a warning, not the run."""
        every = self.config.preview_every
        if self.preview is None or not every or state.step % every or not self.accelerator.is_main_process:
            return
        try:
            with self.average.in_place(), self.stage.previewing(), self.accelerator.autocast():
                self.preview(state.step, self.stage.networks)
        except Exception as error:
            logger.warning("no preview of step %d: %s", state.step, str(error) or repr(error))
        else:
            return
        if torch.cuda.is_available():  # Of what the preview took, nothing is held after the except clause.
            torch.cuda.empty_cache()
