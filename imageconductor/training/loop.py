"""The training loop of every stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from imageconductor.data.clips import CorruptClipError
from imageconductor.models.motion_module import Float32Attention
from imageconductor.models.networks import Networks
from imageconductor.training import checkpointing, sharding
from imageconductor.training.engines import build_engine
from imageconductor.training.optimizers import build_optimizer
from imageconductor.training.record import RunRecord
from imageconductor.training.stages import Stage
from imageconductor.training.train_config import LoopConfig

logger = logging.getLogger(__name__)

_CLIPS_BEFORE_JUDGING = 100  # One bad clip among the first few says nothing about the rest.
# Kept to the end of the process. DDP would hold the last reference and drop it with the GIL in hand, while
# a thread of gloo waits for the GIL to let go of the last barrier: a process that never ends.
_PROCESS_GROUPS: list[Any] = []


@dataclass
class TrainState:
    """Where a run is."""

    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)  # of the last step that was logged
    clips: int = 0  # this process read, since the start
    corrupt: int = 0  # of them could not be used


Preview = Callable[[int, Networks], None]
"""Called with the step and the networks as they would be saved then."""


def train(
    stage: Stage,
    data: Dataset[dict[str, Any]],
    config: LoopConfig,
    preview: Preview | None = None,
    name: str = "train",
) -> TrainState:
    """Runs a stage to `config.max_steps`, continuing what its output folder holds, and saves what it learned.

    Args:
        stage: What is trained.
        data: Item i is the batch of global micro-step i (over all processes), so a resumed run sees what the
            uninterrupted one would have seen.
        config: How.
        preview: Called every `config.preview_every` steps, on the main process.
        name: Shown beside the progress bar.

    Raises:
        FloatingPointError: A loss is not finite; names step, process and clips.
        CorruptClipError: More clips than `config.max_corrupt_fraction` cannot be read.
        ValueError: The run folder belongs to another stage, or the launcher asks for what is not supported.
    """
    engine = build_engine(config)
    accelerator = engine.accelerator
    output, device = Path(config.output), accelerator.device
    _place(stage, config, device)
    parameters = engine.take(stage)
    optimizer = build_optimizer(parameters, config, device)
    ema = None if config.ema_decay is None else _average(parameters, config.ema_decay)

    state = TrainState()
    checkpoint = checkpointing.latest(output)
    if checkpoint:
        _restore(checkpoint, parameters, ema)
        state.step = checkpoint.step
        logger.info("continuing %s at step %d", output, state.step)
    lr_scheduler = get_scheduler(
        config.lr_schedule,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )
    denoise = engine.prepare(stage, optimizer, checkpoint.optimizer if checkpoint else None)
    _set_step(lr_scheduler, state.step)
    noise_scheduler = stage.networks.scheduler
    record = RunRecord(output, config, state.step) if accelerator.is_main_process else None

    batches = _batches(data, config, accelerator, start=state.step)
    bar = tqdm(
        total=config.max_steps,
        initial=state.step,
        desc=name,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    logged_at, logged_step = time.perf_counter(), state.step
    while state.step < config.max_steps:
        terms: dict[str, Tensor] = {}
        for micro in range(config.gradient_accumulation_steps):
            index, batch = next(batches)
            generators = _generators(config.seed, index * config.batch_size, len(batch["key"]))
            with accelerator.autocast():
                x_0, condition = stage.encode(batch, generators)  # frozen parts, no grad
            num_timesteps = noise_scheduler.config["num_train_timesteps"]
            t, eps = draw_noise(x_0, num_timesteps, config.timestep_shift, generators)
            x_t = noise_scheduler.add_noise(x_0, eps, t)  # Eq. 6
            target = eps
            if noise_scheduler.config["prediction_type"] == "v_prediction":
                target = noise_scheduler.get_velocity(x_0, eps, t)
            with engine.micro_step(is_last=micro + 1 == config.gradient_accumulation_steps):
                with accelerator.autocast():
                    prediction = denoise(x_t, t, condition)  # eps_theta(x_t, t, c)
                losses = stage.loss_terms(prediction.float(), target)  # Eq. 1 | Eq. 3 + lambda * Eq. 4
                total = torch.stack(list(losses.values())).sum() / config.gradient_accumulation_steps
                _check_finite(total, state.step, accelerator.process_index, batch["key"])
                engine.backward(total)
            for key, value in losses.items():
                terms[key] = terms.get(key, 0) + value.detach() / config.gradient_accumulation_steps
            _count_corrupt(state, batch, config)
        engine.step()
        lr_scheduler.step()
        state.step += 1
        if ema is not None:
            ema.step(parameters.values())

        bar.update()
        last = state.step == config.max_steps
        if state.step % config.log_every == 0 or last:
            state.losses = {key: cast(Tensor, accelerator.reduce(value, "mean")).item() for key, value in terms.items()}
            corrupt = accelerator.reduce(torch.tensor(state.corrupt, device=device), "sum")
            seconds = (time.perf_counter() - logged_at) / (state.step - logged_step)
            logged_at, logged_step = time.perf_counter(), state.step
            if record is not None:
                clips = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
                measured = {
                    "learning_rate": float(lr_scheduler.get_last_lr()[0]),
                    "seconds": round(seconds, 4),
                    "clips_per_second": round(clips / seconds, 3),
                    "corrupt_clips": float(cast(Tensor, corrupt).item()),
                }
                record.log(state.step, {**state.losses, **measured})
                shown = {key: f"{value:.4f}" for key, value in state.losses.items()}
                bar.set_postfix(shown | {"clips/s": f"{clips / seconds:.2f}"})
        if (accelerator.is_main_process or engine.saves_together) and (last or state.step % config.save_every == 0):
            averages = {} if ema is None else {"ema": _named(ema, parameters)}
            groups, states = engine.whole({"parameters": parameters, **averages})
            if accelerator.is_main_process:
                checkpointing.save(output, state.step, groups, states, config.keep_checkpoints)
        if accelerator.is_main_process and preview and config.preview_every and state.step % config.preview_every == 0:
            with _averaged(ema, parameters), accelerator.autocast():
                preview(state.step, stage.networks)
    bar.close()

    if ema is not None:
        ema.copy_to(parameters.values())
    engine.gather(stage)
    if record is not None:
        checkpointing.save_result(output, stage.save)
        record.close()
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        _PROCESS_GROUPS.append(torch.distributed.group.WORLD)
    accelerator.end_training()
    return state


def _place(stage: Stage, config: LoopConfig, device: torch.device) -> None:
    """Moves a stage to its device, in the memory layout and precision that its networks are fastest in."""
    if config.mixed_precision != "no":
        for network in stage.children():
            if not any(parameter.requires_grad for parameter in network.parameters()):
                network.to(getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[config.mixed_precision]))
        if device.type == "cpu":
            for network in (stage.unet, stage.image_controlnet, stage.motion_controlnet):
                network.set_attn_processor(Float32Attention())
    cast(Any, stage).to(device, memory_format=torch.channels_last)
    for network in (stage.unet, stage.motion_controlnet):
        network.checkpoint_blocks = config.gradient_checkpointing
    if config.torch_compile:
        torch.compiler.reset()  # A stage before this one with other shapes would make every size a dynamic one.
        stage.compile()  # In place, which leaves the parameters' names alone.


def _batches(
    data: Dataset[dict[str, Any]], config: LoopConfig, accelerator: Accelerator, start: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """This process's batches from optimiser step `start` on, with their numbers."""
    rank, world, micro_steps = accelerator.process_index, accelerator.num_processes, config.gradient_accumulation_steps
    indices = range(start * micro_steps * world + rank, config.max_steps * micro_steps * world, world)
    workers: dict[str, Any] = {"num_workers": config.num_workers, "persistent_workers": config.num_workers > 0}
    loader = DataLoader(data, batch_size=None, sampler=indices, pin_memory=accelerator.device.type == "cuda", **workers)
    return zip(indices, loader, strict=True)


def _generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """A generator for each of `count` samples; sample p's depends on (seed, p) alone, not on process or batch."""
    keys = [np.random.SeedSequence((seed, first + i)).generate_state(1, np.uint64)[0] >> 1 for i in range(count)]
    return [torch.Generator().manual_seed(int(key)) for key in keys]


def draw_noise(
    x_0: Tensor, num_timesteps: int, shift: float, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Timesteps (B,) int64, and noise like x_0.

    `shift` s moves an evenly drawn u in [0, 1) to s u / (1 + (s - 1) u), as Stable Diffusion 3 is trained
    (Esser et al., 2024, Eq. 23): 1 leaves it even, more draws noisier steps, where motion is decided.
    """
    t = torch.stack([torch.randint(num_timesteps, (), generator=generator) for generator in generators])
    u = (t.double() + 0.5) / num_timesteps
    t = (shift * u / (1 + (shift - 1) * u) * num_timesteps).long()
    eps = torch.stack([torch.randn(x_0.shape[1:], generator=generator) for generator in generators])
    return t.to(x_0.device), eps.to(x_0.device)


def _count_corrupt(state: TrainState, batch: dict[str, Any], config: LoopConfig) -> None:
    state.clips += len(batch["key"])
    skipped = [reason for reasons in batch.get("skipped", []) for reason in reasons]
    state.corrupt += len(skipped)
    for reason in skipped:
        logger.warning("skipped a clip: %s", reason)
    if skipped and state.corrupt > config.max_corrupt_fraction * max(state.clips, _CLIPS_BEFORE_JUDGING):
        raise CorruptClipError(
            f"{state.corrupt} of {state.clips} clips cannot be read, more than max_corrupt_fraction="
            f"{config.max_corrupt_fraction}; the last: {skipped[-1]}"
        )


@contextmanager
def _averaged(ema: EMAModel | None, parameters: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Puts the average in place of the parameters, as at the end of the run."""
    if ema is None:
        yield
        return
    ema.store(parameters.values())
    ema.copy_to(parameters.values())
    try:
        yield
    finally:
        ema.restore(parameters.values())


def _average(parameters: dict[str, torch.nn.Parameter], decay: float) -> EMAModel:
    # The warm-up keeps the random start out of the average of a short run.
    return EMAModel(list(parameters.values()), decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)


def _named(ema: EMAModel, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return dict(zip(parameters, ema.shadow_params, strict=True))


def _restore(
    checkpoint: checkpointing.Checkpoint,
    parameters: dict[str, torch.nn.Parameter],
    ema: EMAModel | None,
) -> None:
    saved = checkpoint.tensors["parameters"]
    if saved.keys() != parameters.keys():
        different = sorted(saved.keys() ^ parameters.keys())
        raise ValueError(
            f"the run folder holds another stage's checkpoint ({len(different)} parameters differ, "
            f"e.g. {different[0]}); choose another output"
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(sharding.split_like(saved[key], parameter))
    if ema is not None and "ema" in checkpoint.tensors:
        for shadow, key in zip(ema.shadow_params, parameters, strict=True):
            shadow.copy_(sharding.split_like(checkpoint.tensors["ema"][key], shadow))
        ema.optimization_step = checkpoint.step


def _set_step(lr_scheduler: Any, step: int) -> None:
    """Puts a learning-rate schedule, a pure function of the step, where an uninterrupted run would have it."""
    lr_scheduler.last_epoch = step - 1
    lr_scheduler.optimizer._opt_called = True
    lr_scheduler.step()


def _check_finite(loss: Tensor, step: int, rank: int, keys: list[str]) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss is {loss.item()} at step {step} on process {rank}; clips: {', '.join(keys)}")
