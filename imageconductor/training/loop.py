"""The training loop of every stage."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
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

from imageconductor import config as config_file
from imageconductor.models.motion_module import Float32Attention
from imageconductor.training import checkpointing
from imageconductor.training.config import LoopConfig
from imageconductor.training.stages import Stage

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where a run is."""

    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)


Hook = Callable[[TrainState, Stage], None]


def train(
    stage: Stage, data: Dataset[dict[str, Any]], config: LoopConfig, hooks: Sequence[Hook] = (), name: str = "train"
) -> TrainState:
    """Runs a stage to `config.max_steps`, continuing what its output folder holds, and saves what it learned.

    Args:
        stage: What is trained.
        data: Item i is the batch of global micro-step i (over all processes), so a resumed run sees what the
            uninterrupted one would have seen.
        config: How.
        hooks: Called after each step on the main process.
        name: Shown beside the progress bar.

    Raises:
        FloatingPointError: A loss is not finite; names step, process and clips.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    output, device = Path(config.output), accelerator.device
    if device.type == "cpu" and config.mixed_precision == "bf16":
        for network in (stage.unet, stage.image_controlnet, stage.motion_controlnet):
            network.set_attn_processor(Float32Attention())
    stage.to(device)
    parameters = stage.trainable()
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    ema = None if config.ema_decay is None else _average(parameters, config.ema_decay)

    state = TrainState()
    if checkpoint := checkpointing.latest(output):
        _restore(checkpoint, parameters, optimizer, ema)
        state.step = checkpoint.step
        logger.info("continuing %s at step %d", output, state.step)
    lr_scheduler = get_scheduler(
        config.lr_schedule,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )
    _set_step(lr_scheduler, state.step)
    denoise, optimizer = accelerator.prepare(stage, optimizer)
    noise_scheduler = stage.networks.scheduler
    if accelerator.is_main_process:
        config_file.save(config, output / "config.yaml")

    batches = _batches(data, config, accelerator, start=state.step)
    bar = tqdm(
        total=config.max_steps,
        initial=state.step,
        desc=name,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    while state.step < config.max_steps:
        started = time.perf_counter()
        terms: dict[str, Tensor] = {}
        for micro in range(config.gradient_accumulation_steps):
            batch = next(batches)
            generator = _generator(config.seed, accelerator.process_index, state.step, micro)
            x_0, condition = stage.encode(batch, generator)  # frozen parts, no grad
            t = torch.randint(noise_scheduler.config["num_train_timesteps"], (len(x_0),), generator=generator)
            t, eps = t.to(device), torch.randn(x_0.shape, generator=generator).to(device)
            x_t = noise_scheduler.add_noise(x_0, eps, t)  # Eq. 6
            target = eps
            if noise_scheduler.config["prediction_type"] == "v_prediction":
                target = noise_scheduler.get_velocity(x_0, eps, t)
            with accelerator.no_sync(denoise) if micro + 1 < config.gradient_accumulation_steps else nullcontext():
                with accelerator.autocast():
                    prediction = denoise(x_t, t, condition)  # eps_theta(x_t, t, c)
                losses = stage.loss_terms(prediction, target)  # Eq. 1 | Eq. 3 + lambda * Eq. 4
                total = torch.stack(list(losses.values())).sum() / config.gradient_accumulation_steps
                _check_finite(total, state.step, accelerator.process_index, batch["key"])
                accelerator.backward(total)
            for key, value in losses.items():
                terms[key] = terms.get(key, 0) + value.detach() / config.gradient_accumulation_steps
        accelerator.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        state.step += 1
        if ema is not None:
            ema.step(parameters.values())

        bar.update()
        if state.step % config.log_every == 0 or state.step == config.max_steps:
            state.losses = {key: cast(Tensor, accelerator.reduce(value, "mean")).item() for key, value in terms.items()}
            seconds = time.perf_counter() - started
            if accelerator.is_main_process:
                _log(output, state, bar, float(lr_scheduler.get_last_lr()[0]), seconds)
        last = state.step == config.max_steps
        if accelerator.is_main_process and (last or state.step % config.save_every == 0):
            groups = {"parameters": parameters, **({} if ema is None else {"ema": _named(ema, parameters)})}
            checkpointing.save(output, state.step, groups, optimizer.state_dict(), config.keep_checkpoints)
        if accelerator.is_main_process:
            for hook in hooks:
                hook(state, stage)
    bar.close()

    if ema is not None:
        ema.copy_to(parameters.values())
    if accelerator.is_main_process:
        stage.save(output)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return state


def _batches(
    data: Dataset[dict[str, Any]], config: LoopConfig, accelerator: Accelerator, start: int
) -> Iterator[dict[str, Any]]:
    """This process's batches from optimiser step `start` on."""
    rank, world, micro_steps = accelerator.process_index, accelerator.num_processes, config.gradient_accumulation_steps
    indices = range(start * micro_steps * world + rank, config.max_steps * micro_steps * world, world)
    loader = DataLoader(data, batch_size=None, sampler=indices, num_workers=config.num_workers)
    return iter(loader)


def _generator(*key: int) -> torch.Generator:
    """A generator that depends on (seed, process, step, micro-step) alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def _average(parameters: dict[str, torch.nn.Parameter], decay: float) -> EMAModel:
    # The warm-up keeps the random start out of the average of a short run.
    return EMAModel(list(parameters.values()), decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)


def _named(ema: EMAModel, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return dict(zip(parameters, ema.shadow_params, strict=True))


def _restore(
    checkpoint: checkpointing.Checkpoint,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
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
            parameter.copy_(saved[key])
    optimizer.load_state_dict(checkpoint.optimizer)
    if ema is not None and "ema" in checkpoint.tensors:
        for shadow, key in zip(ema.shadow_params, parameters, strict=True):
            shadow.copy_(checkpoint.tensors["ema"][key])
        ema.optimization_step = checkpoint.step


def _set_step(lr_scheduler: Any, step: int) -> None:
    """Puts a learning-rate schedule, a pure function of the step, where an uninterrupted run would have it."""
    lr_scheduler.last_epoch = step - 1
    lr_scheduler.optimizer._opt_called = True
    lr_scheduler.step()


def _check_finite(loss: Tensor, step: int, rank: int, keys: list[str]) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss is {loss.item()} at step {step} on process {rank}; clips: {', '.join(keys)}")


def _log(output: Path, state: TrainState, bar: Any, learning_rate: float, seconds: float) -> None:
    bar.set_postfix({key: f"{value:.4f}" for key, value in state.losses.items()})
    record = {"step": state.step, **state.losses, "learning_rate": learning_rate, "seconds": round(seconds, 4)}
    with (output / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
