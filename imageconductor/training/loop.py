"""The training loop of every stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from imageconductor.data.batches import sample_generators, send, send_clips
from imageconductor.data.clip_records import CorruptClipError
from imageconductor.devices import HALF
from imageconductor.files import remove_partial
from imageconductor.models.motion_module import Float32Attention
from imageconductor.models.networks import cast_network
from imageconductor.training import checkpointing, sharding
from imageconductor.training.engines import REMEDY, build_engine
from imageconductor.training.hooks import Log, Preview, Save, ShowPreview, TrainState, count_loading
from imageconductor.training.optimizers import build_optimizer
from imageconductor.training.stages.base import Stage
from imageconductor.training.stopping import Stop, spare_worker
from imageconductor.training.train_config import LoopConfig
from imageconductor.training.validation import Validate
from imageconductor.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

_CLIPS_BEFORE_JUDGING = 100  # One bad clip among the first few says nothing about the rest.
# Kept to the end of the process. DDP would hold the last reference and drop it with the GIL in hand, while
# a thread of gloo waits for the GIL to let go of the last barrier: a process that never ends.
_PROCESS_GROUPS: list[Any] = []


def train(
    stage: Stage,
    data: Dataset[dict[str, Any]],
    config: LoopConfig,
    preview: Preview | None = None,
    held_out: Sequence[dict[str, Any]] = (),
    start: float | None = None,
) -> TrainState:
    """Runs a stage to `config.max_steps`, continuing what its output folder holds, and saves what it learned.

    A run whose `config.max_minutes` are over, or that gets SIGTERM, ends before that, with a checkpoint; the state says
    at which step.

    Args:
        stage: What is trained.
        data: Item i is the batch of global micro-step i (over all processes), so a resumed run sees what the
            uninterrupted one would have seen.
        config: Of the run.
        preview: Called every `config.preview_every` steps, on the main process.
        held_out: Samples on which the loss is measured every `config.validation_every` steps.
        start: When `config.max_minutes` begin, by `time.monotonic()`; None = now.

    Raises:
        FloatingPointError: A loss is not finite, which names step, process and clips, or gradients are not; under fp16,
            in many steps one after the other.
        CorruptClipError: More clips than `config.max_corrupt_fraction` cannot be read.
        ValueError: The run folder belongs to another stage or cannot be read, or the launcher asks for what is not
            supported.
    """
    engine = build_engine(config)
    accelerator, output = engine.accelerator, Path(config.output)
    place(stage, config, accelerator.device)
    parameters = engine.take(stage)
    with accelerator.autocast():
        stage.begin(data)
    optimizer = build_optimizer(engine.groups.values(), config, accelerator.device)
    average = WeightAverage(parameters, config.ema_decay)
    checkpoint = checkpointing.latest_agreed(output)
    state = TrainState(step=_restore(checkpoint, parameters, average))
    lr_scheduler = get_scheduler(
        config.lr_schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    module = engine.prepare(stage, optimizer, checkpoint.optimizer if checkpoint else None)
    del checkpoint  # Its files are mapped into memory, and may have to go.
    _set_step(lr_scheduler, state.step)

    if accelerator.is_main_process:
        for folder in (output, output / "previews"):  # Folders within may be those of other runs.
            remove_partial(folder, below=False)
    log = Log(config, engine, lr_scheduler, state, stage, getattr(data, "num_clips", None))
    save = Save(config, engine, average, stage)
    hooks = (
        Validate(config, engine, average, stage, module, held_out),
        log,
        save,
        ShowPreview(config, engine, average, stage, preview),
    )
    batches = count_loading(_batches(data, config, accelerator, start=state.step), state)
    num_micro_steps, num_timesteps = config.gradient_accumulation_steps, stage.scheduler.config["num_train_timesteps"]
    with Stop(config.max_minutes, start, state.step) as stop:
        while state.step < config.max_steps and not stop.is_due(state.step):
            state.terms = {}
            found: list[tuple[Tensor, list[str]]] = []
            for micro_step in range(num_micro_steps):
                if micro_step and stop.breaks_step():
                    break
                batch, generators = next(batches)
                is_last = micro_step + 1 == num_micro_steps
                with engine.micro_step(is_last):
                    with accelerator.autocast():
                        x_0, condition = stage.encode(batch, generators)  # frozen parts, no grad
                        t, eps = draw_noise(x_0, num_timesteps, config.timestep_shift, generators)
                        losses: dict[str, Tensor] = module(x_0, t, eps, condition)  # Eq. 1 | Eq. 3 + lambda * Eq. 4
                    total = torch.stack(list(losses.values())).sum() / num_micro_steps
                    found.append((total.detach(), batch["key"]))
                    if is_last and not engine.skips_steps:  # The GPU is waited for once, before any weight can change.
                        _check_finite(found, engine.norm, state.step, accelerator.process_index)
                    engine.backward(total)
                for key, value in losses.items():
                    state.terms[key] = state.terms.get(key, 0) + value.detach() / num_micro_steps
                _count_corrupt(state, batch, config)
            else:  # No signal came between the micro-steps.
                engine.step()
                lr_scheduler.step()
                average.update()
                state.step += 1
                for hook in hooks:
                    hook(state)

        if state.step < config.max_steps:
            save.write(state)
        average.copy_to_weights()
        engine.gather_weights(stage)
        if accelerator.is_main_process:
            checkpointing.save_result(output, stage.save)
    log.close()
    accelerator.wait_for_everyone()
    return state


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
    return send(t, x_0.device), send(eps, x_0.device)


def place(stage: Stage, config: LoopConfig, device: torch.device) -> None:
    """Moves a stage to its device, in the memory layout and precision that its networks are fastest in.

    Networks that do not learn are cast to `config.mixed_precision`.
    """
    if config.mixed_precision != "no":
        for network in stage.children():
            if not any(parameter.requires_grad for parameter in network.parameters()):
                cast_network(network, HALF[config.mixed_precision])
        if device.type == "cpu":
            for network in filter(None, (stage.unet, stage.image_controlnet, stage.motion_controlnet)):
                network.set_attn_processor(Float32Attention())
    has_3d = any(parameter.ndim == 5 for parameter in stage.parameters())  # which this layout is not for
    cast(Any, stage).to(device, **({} if has_3d else {"memory_format": torch.channels_last}))
    for network in filter(None, (stage.unet, stage.motion_controlnet)):
        network.checkpoint_blocks = config.gradient_checkpointing
    if config.torch_compile:
        torch.compiler.reset()  # A stage before this one with other shapes would make every size a dynamic one.
        stage.compile()  # In place, which leaves the parameters' names alone.


def leave() -> None:
    """Ends this process's part in a command that has trained, together with the others; no stage can follow."""
    state = PartialState()
    state.wait_for_everyone()
    if torch.distributed.is_initialized():
        _PROCESS_GROUPS.append(torch.distributed.group.WORLD)
    state.destroy_process_group()


def _batches(
    data: Dataset[dict[str, Any]], config: LoopConfig, accelerator: Accelerator, start: int
) -> Iterator[tuple[dict[str, Any], list[torch.Generator]]]:
    """This process's batches from optimiser step `start` on, each with a generator for every clip."""
    rank, world, micro_steps = accelerator.process_index, accelerator.num_processes, config.gradient_accumulation_steps
    indices = range(start * micro_steps * world + rank, config.max_steps * micro_steps * world, world)
    workers: dict[str, Any] = {"num_workers": config.num_workers, "persistent_workers": config.num_workers > 0}
    workers["worker_init_fn"] = spare_worker
    loader = DataLoader(data, batch_size=None, sampler=indices, pin_memory=accelerator.device.type == "cuda", **workers)
    for index, batch in zip(indices, send_clips(loader, accelerator.device), strict=True):
        yield batch, sample_generators(config.seed, index * config.batch_size, len(batch["key"]))


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


def _restore(
    checkpoint: checkpointing.Checkpoint | None, parameters: Mapping[str, nn.Parameter], average: WeightAverage
) -> int:
    """Puts a checkpoint's weights back, and gives its step; 0 without one."""
    if checkpoint is None:
        return 0
    saved = checkpoint.tensors["parameters"]
    if saved.keys() != parameters.keys():
        different = sorted(saved.keys() ^ parameters.keys())
        raise ValueError(
            f"the run folder holds another stage's checkpoint ({len(different)} parameters differ, "
            f"e.g. {different[0]}); choose another output"
        )
    for key, parameter in parameters.items():
        if saved[key].shape != parameter.shape:
            raise ValueError(
                f"the run folder's checkpoint has {key} of shape {tuple(saved[key].shape)}, the model's is "
                f"{tuple(parameter.shape)}; choose another output"
            )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(sharding.split_like(saved[key], parameter))
    average.load(checkpoint.tensors.get("ema", saved), checkpoint.step)  # A run without an average may go on with one.
    logger.info("continuing at step %d", checkpoint.step)
    return checkpoint.step


def _set_step(lr_scheduler: Any, step: int) -> None:
    """Puts a learning-rate schedule, a pure function of the step, where an uninterrupted run would have it."""
    lr_scheduler.last_epoch = step - 1
    lr_scheduler.optimizer._opt_called = True
    lr_scheduler.step()


def _check_finite(losses: Sequence[tuple[Tensor, list[str]]], norm: Tensor | None, step: int, rank: int) -> None:
    """Makes sure that the losses of a step are finite, and so was the length () of the gradients of the step before.

    Raises:
        FloatingPointError: Names the step, and of a loss the process and the clips of the first such micro-step.
    """
    values = torch.stack([*(loss for loss, _ in losses), *([] if norm is None else [norm])]).tolist()
    if norm is not None and not math.isfinite(values[-1]):
        raise FloatingPointError(f"the gradients of step {step - 1} are not finite, {REMEDY}")
    for value, (_, keys) in zip(values, losses, strict=False):
        if not math.isfinite(value):
            raise FloatingPointError(f"loss is {value} at step {step} on process {rank}; clips: {', '.join(keys)}")
