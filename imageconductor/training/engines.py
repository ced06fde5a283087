"""Distributed back ends: DDP (or one process), FSDP2, and DeepSpeed's ZeRO (`training/deepspeed.py`).

`accelerate launch` chooses by its configuration (configs/accelerate). Checkpoints are gathered under each of them, so a
run may begin under one and go on under another, on another number of processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import parse_flag_from_env, patch_environment
from torch import Tensor, nn

from imageconductor.training import sharding
from imageconductor.training.stages.base import ParameterGroup, Stage
from imageconductor.training.train_config import LoopConfig

_MAX_SKIPPED = 50  # steps in a row; the scale of fp16's losses, which each halves, is hopeless then

REMEDY = "and are not saved; go on from the last checkpoint with a lower learning_rate, or with mixed_precision=no"
"""What is to be done after gradients that are not finite."""

Tensors = dict[str, Mapping[str, Tensor]]
"""Tensors of a checkpoint by kind ("parameters", "ema"), then by name."""


class Replicated:
    """A copy of everything in each process: DDP, or a single process.

    Args:
        config: Of the run.
        accelerator: Of this process.

    Attributes:
        groups: What learns, as the stage groups it.
        parameters: The same by name.
        norm: Length () of the last step's gradients, of the group with the longest; None under fp16, whose steps are
            skipped where it is not finite.
        skipped: Number of such steps since the start.

    Raises:
        ValueError: The run's settings do not go with it; names them.
    """

    accumulates_alone = True  # whether processes may add up gradients before they exchange them
    saves_together = False  # whether every process has to take part in a checkpoint

    def __init__(self, config: LoopConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.groups: dict[str, ParameterGroup] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.norm: Tensor | None = None
        self.skipped = self.skipped_in_a_row = 0
        self.module: nn.Module
        self.optimizer: Any

    def take(self, stage: Stage) -> dict[str, nn.Parameter]:
        """What learns, by name, split if this engine splits weights."""
        self.groups = stage.trainable()
        self.parameters = {name: p for group in self.groups.values() for name, p in group.parameters.items()}
        if len(self.parameters) < sum(len(group.parameters) for group in self.groups.values()):
            raise ValueError(f"stage {stage.name} has a parameter in two of its groups {', '.join(self.groups)}")
        chosen = {id(parameter) for parameter in self.parameters.values()}
        if lost := [name for name, p in stage.named_parameters() if p.requires_grad and id(p) not in chosen]:
            raise ValueError(f"stage {stage.name} has {lost[0]} in none of its groups, though it requires a gradient")
        return self.parameters

    def prepare(
        self, stage: Stage, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any] | None = None
    ) -> nn.Module:
        """The module that gives a stage's losses. The optimiser belongs to the engine from then on.

        Args:
            stage: Whose weights were taken.
            optimizer: Of them.
            saved: States of optimiser and loss scaler from a checkpoint.
        """
        if saved is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            optimizer.load_state_dict(sharding.split_optimizer(saved["optimizer"], parameters))
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay  # The run's settings are the config's, not the checkpoint's.
        self.module, self.optimizer = self._wrap(stage, optimizer)
        if self._scaler is not None and "scaler" in (saved or {}):
            self._scaler.load_state_dict((saved or {})["scaler"])
        return self.module

    def micro_step(self, is_last: bool) -> Any:
        """Context of forward and backward pass."""
        return nullcontext() if is_last or not self.accumulates_alone else self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients; `loss` is this micro-step's part of the step's."""
        self.accelerator.backward(loss)

    def step(self) -> None:
        """Clips the gradients group by group, changes the weights and forgets the gradients.

        Raises:
            FloatingPointError: Under fp16, no gradients are finite any more, at whatever scale.
        """
        self.accelerator.unscale_gradients()
        longest = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norms: list[Tensor] = []
        for group in self.groups.values():
            norm = torch.nn.utils.clip_grad_norm_(group.parameters.values(), longest)
            norms.append(sharding.gather(norm).to(self.accelerator.device))
        scaler = self._scaler
        scale = 0.0 if scaler is None else scaler.get_scale()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if scaler is None:
            self.norm = torch.stack(norms).max()
        else:  # A fused optimiser skips within its kernel, which accelerate's `step_was_skipped` does not see.
            self._count_skipped(scaler.get_scale() < scale)

    def check_finite(self, step: int) -> None:
        """Makes sure, in all processes alike, that what the run has learned after `step` steps can be gone on with.

        Raises:
            FloatingPointError: A weight is not finite, or the last gradients were not.
        """
        parts = [sharding.own_part(parameter.detach()) for parameter in self.parameters.values()]
        checks = [part.isfinite().all() for part in parts] + ([] if self.norm is None else [self.norm.isfinite()])
        reduce: Any = self.accelerator.reduce
        if reduce(1 - torch.stack(checks).all().float(), "sum").item():
            raise FloatingPointError(f"weights or gradients are not finite after step {step}, {REMEDY}")

    def gather_state(self, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """Tensors and states for a checkpoint, complete in the main process and of no use in others."""
        scaler = {} if self._scaler is None else {"scaler": self._scaler.state_dict()}
        return tensors, {"optimizer": self.optimizer.state_dict(), **scaler}

    def gather_weights(self, stage: Stage) -> None:
        """Puts the stage's weights together again, to be saved and not to be run."""

    def _wrap(self, stage: Stage, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        if stage.learns_in_parts:
            cast(Any, self.accelerator).ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        return self.accelerator.prepare(stage, optimizer)

    def _count_skipped(self, is_skipped: bool) -> None:
        self.skipped += is_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
        if self.skipped_in_a_row >= _MAX_SKIPPED:
            raise FloatingPointError(f"the last {_MAX_SKIPPED} steps had no finite gradients under fp16, {REMEDY}")

    @property
    def skips_steps(self) -> bool:
        """Whether steps with numbers that are not finite are left out and counted: under fp16, where some are usual."""
        return self._scaler is not None

    @property
    def _scaler(self) -> Any:
        return self.accelerator.scaler  # of fp16 losses


class FSDP(Replicated):
    """PyTorch's FSDP2: weights, gradients and moments of what learns are split (training/sharding.py)."""

    accumulates_alone = False
    saves_together = True

    def __init__(self, config: LoopConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        offloads = parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
        recomputes = parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")
        refused = find_unsupported(config, accelerator) | {
            # Behind a launcher a single process tries what several will do.
            "one process": not torch.distributed.is_initialized(),
            "preview_every": config.preview_every > 0,
            "fsdp_version other than 2": os.environ.get("FSDP_VERSION") != "2",
            "fsdp_offload_params": offloads,
            "fsdp_activation_checkpointing (gradient_checkpointing=true does it)": recomputes,
        }
        refuse("FSDP", refused)

    def take(self, stage: Stage) -> dict[str, nn.Parameter]:
        """As `Replicated.take`."""
        refuse_parts("FSDP", stage)
        sharding.shard(list(stage.children()), self.accelerator.device)
        return super().take(stage)

    def step(self) -> None:
        """As `Replicated.step`."""
        sharding.check_gradients(list(self.parameters.values()))
        super().step()

    def gather_state(self, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """As `Replicated.gather_state`."""
        return sharding.gather_tensors(super().gather_state(tensors), keep=self.accelerator.is_main_process)

    def gather_weights(self, stage: Stage) -> None:
        """As `Replicated.gather_weights`."""
        sharding.gather_weights(stage)

    def _wrap(self, stage: Stage, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        return stage, self.accelerator.prepare_optimizer(optimizer)


def build_engine(config: LoopConfig) -> Replicated:
    """The back end that the launcher asks for, with an accelerator in the run's precision.

    Raises:
        ValueError: It is not supported, or does not go with the settings.
    """
    AcceleratorState._reset_state()  # A stage may want another precision than the one trained before it.
    _forget_fsdp()
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):  # accelerate would hand it the loop's precision as well.
        accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError("MEGATRON_LM is not supported; configs/accelerate has configurations that are")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if deepspeed:
        from imageconductor.training.deepspeed import DeepSpeed

        return DeepSpeed(config, accelerator)
    return FSDP(config, accelerator) if parse_flag_from_env("ACCELERATE_USE_FSDP") else Replicated(config, accelerator)


def _forget_fsdp() -> None:
    """Lets a second stage of a process begin as the first one did.

    On GPUs accelerate notes FSDP as the kind of launch, and then has no settings of it for another `Accelerator`.
    """
    state = PartialState._shared_state
    if state.get("distributed_type") == DistributedType.FSDP:
        kind = "GPU" if state["device"].type == "cuda" else state["device"].type.upper()
        state["distributed_type"] = DistributedType[f"MULTI_{kind}"]


def find_unsupported(config: LoopConfig, accelerator: Accelerator) -> dict[str, bool]:
    """Settings that neither FSDP nor DeepSpeed goes with here, and whether the run has them."""
    return {
        "mixed_precision=fp16": config.mixed_precision == "fp16",
        f"optimizer={config.optimizer}": config.optimizer != "adamw",
        "torch_compile=true": config.torch_compile,
        "one process": accelerator.num_processes == 1,
    }


def refuse_parts(name: str, stage: Stage) -> None:
    """Raises ValueError where a back end cannot split a stage, or its steps need not reach all that learns."""
    if not stage.can_be_split:
        raise ValueError(f"{name} does not go with stage {stage.name}, whose gates it cannot split; use --multi_gpu")
    if stage.learns_in_parts:
        raise ValueError(f"{name} does not go with stage {stage.name}, which fits on one GPU; launch with --multi_gpu")


def refuse(name: str, refused: Mapping[str, bool]) -> None:
    """Raises ValueError that names the settings that are asked for and do not go with a back end."""
    if found := [setting for setting, is_asked in refused.items() if is_asked]:
        raise ValueError(f"{name} does not go with {', '.join(found)}; change that or launch with --multi_gpu")
