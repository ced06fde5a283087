"""Who holds what of a run: everything everywhere (one process, or DDP), or a share in each (FSDP2, DeepSpeed's ZeRO).

`accelerate launch` says which by its configuration (configs/accelerate). Checkpoints are whole under each of them, so a
run may begin under one and go on under another, on another number of processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env, patch_environment
from torch import Tensor, nn

from imageconductor.training import sharding
from imageconductor.training.stages import Stage
from imageconductor.training.train_config import LoopConfig

_BUCKET = 50_000_000  # gradients that DeepSpeed exchanges at a time; it sets their memory aside, whatever learns
Groups = dict[str, Mapping[str, Tensor]]


class Replicated:
    """A copy of everything in each process: one of them, or DDP.

    Args:
        config: Of the run.
        accelerator: Of this process.

    Attributes:
        parameters: What learns, by name.

    Raises:
        ValueError: The run's settings do not go with it; names them.
    """

    accumulates_alone = True  # whether processes may add up gradients before they exchange them
    saves_together = False  # whether every process has to take part in a checkpoint

    def __init__(self, config: LoopConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.parameters: dict[str, nn.Parameter] = {}
        self.module: nn.Module
        self.optimizer: Any

    def take(self, stage: Stage) -> dict[str, nn.Parameter]:
        """What learns, by name, split if this engine splits weights."""
        self.parameters = stage.trainable()
        return self.parameters

    def prepare(
        self, stage: Stage, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any] | None = None
    ) -> nn.Module:
        """What is called to denoise. The optimiser belongs to the engine from then on.

        Args:
            stage: Whose weights were taken.
            optimizer: Of them.
            saved: States of optimiser and loss scaler from a checkpoint.
        """
        if saved is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            optimizer.load_state_dict(sharding.split_optimizer(saved["optimizer"], parameters))
            for group in optimizer.param_groups:  # The run's settings are the config's, not the checkpoint's.
                group["weight_decay"] = self.config.weight_decay
        self.module, self.optimizer = self._prepared(stage, optimizer)
        if self._scaler is not None and "scaler" in (saved or {}):
            self._scaler.load_state_dict((saved or {})["scaler"])
        return self.module

    def micro_step(self, is_last: bool) -> Any:
        """Context of forward and backward pass."""
        return nullcontext() if is_last or not self.accumulates_alone else self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients; `loss` is this micro-step's share of the step."""
        self.accelerator.backward(loss)

    def step(self) -> None:
        """Clips the gradients, changes the weights and forgets the gradients."""
        self.accelerator.unscale_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole(self, groups: Groups) -> tuple[Groups, dict[str, Any]]:
        """Tensors and states for a checkpoint, whole in the main process and of no use in others."""
        scaler = {} if self._scaler is None else {"scaler": self._scaler.state_dict()}
        return groups, {"optimizer": self.optimizer.state_dict(), **scaler}

    def gather(self, stage: Stage) -> None:
        """Makes the stage's weights whole again, to be saved and not to be run."""

    def _prepared(self, stage: Stage, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        return self.accelerator.prepare(stage, optimizer)

    @property
    def _scaler(self) -> Any:
        return self.accelerator.scaler  # of fp16 losses


class FSDP(Replicated):
    """Weights, gradients and moments of what learns are shared out by PyTorch's FSDP2 (training/sharding.py)."""

    accumulates_alone = False
    saves_together = True

    def __init__(self, config: LoopConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        offloads = parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
        recomputes = parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")
        refused = _unsupported(config, accelerator) | {
            "preview_every": config.preview_every > 0,
            "fsdp_version other than 2": os.environ.get("FSDP_VERSION") != "2",
            "fsdp_offload_params": offloads,
            "fsdp_activation_checkpointing (gradient_checkpointing=true does it)": recomputes,
        }
        _refuse("FSDP", refused)

    def take(self, stage: Stage) -> dict[str, nn.Parameter]:
        """As `Replicated.take`."""
        sharding.shard(list(stage.children()), self.accelerator.device)
        return super().take(stage)

    def step(self) -> None:
        """As `Replicated.step`."""
        sharding.check_gradients(list(self.parameters.values()))
        super().step()

    def whole(self, groups: Groups) -> tuple[Groups, dict[str, Any]]:
        """As `Replicated.whole`."""
        return sharding.whole(super().whole(groups), keep=self.accelerator.is_main_process)

    def gather(self, stage: Stage) -> None:
        """As `Replicated.gather`."""
        sharding.gather(stage)

    def _prepared(self, stage: Stage, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        return stage, self.accelerator.prepare_optimizer(optimizer)


class DeepSpeed(Replicated):
    """Moments, at ZeRO stage 2 gradients too, are shared out by DeepSpeed. Precision stays the loop's."""

    accumulates_alone = False  # DeepSpeed counts micro-steps itself.
    saves_together = True

    def __init__(self, config: LoopConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.zero_stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        offload = {os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") for what in ("OPTIMIZER", "PARAM")}
        refused = _unsupported(config, accelerator) | {
            f"zero_stage {self.zero_stage} (1 and 2 are possible)": self.zero_stage not in (1, 2),
            "offloading": bool(offload - {None, "none"}),
            "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ,
        }
        _refuse("DeepSpeed", refused)
        try:
            import deepspeed  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("DeepSpeed is not installed: pip install 'imageconductor[deepspeed]'") from error
        self.deepspeed: Any = deepspeed
        if accelerator.device.type == "cpu":  # It would first compile an exchange through shared memory, for minutes.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def take(self, stage: Stage) -> dict[str, nn.Parameter]:
        """As `Replicated.take`. They are to become views of one flat tensor, which rules out channels-last."""
        for parameter in super().take(stage).values():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        return self.parameters

    def prepare(
        self, stage: Stage, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any] | None = None
    ) -> nn.Module:
        """As `Replicated.prepare`."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        settings = {
            "train_micro_batch_size_per_gpu": self.config.batch_size,
            "gradient_accumulation_steps": self.config.gradient_accumulation_steps,
            "gradient_clipping": self.config.max_grad_norm,
            "zero_optimization": {"stage": self.zero_stage, "reduce_bucket_size": min(_BUCKET, count)},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": sys.maxsize,  # The loop has a bar of its own.
        }
        learned = nn.ParameterList(self.parameters.values())  # All of the stage that DeepSpeed has to know.
        self.engine, self.zero, *_ = self.deepspeed.initialize(
            model=learned, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.module, self.optimizer = stage, optimizer
        if saved is not None:
            self._fill_shares(saved["optimizer"]["state"])
        return stage

    def backward(self, loss: Tensor) -> None:
        """As `Replicated.backward`. Weights change after the last micro-step."""
        self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()
        if self.zero.overflow:  # It would pass over the step and say nothing.
            raise FloatingPointError("the gradients are not finite")

    def step(self) -> None:
        """Has been done by then."""

    def whole(self, groups: Groups) -> tuple[Groups, dict[str, Any]]:
        """As `Replicated.whole`."""
        get: Any = self.deepspeed.utils.safe_get_full_optimizer_state
        (share,) = self.optimizer.state.values()
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self.parameters.values()):
            whole = {key: get(parameter, key) if value.ndim else value.clone() for key, value in share.items()}
            if self.accelerator.is_main_process:
                state[number] = {key: value.cpu() for key, value in whole.items()}
        (group,) = self.optimizer.param_groups
        return groups, {"optimizer": {"state": state, "param_groups": [{**group, "params": list(state)}]}}

    def _fill_shares(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        ((flat,),) = [group["params"] for group in self.optimizer.param_groups]
        self.optimizer.state[flat] = {
            key: torch.zeros_like(flat) if value.ndim else value.to(flat) for key, value in state[0].items()
        }
        self.zero._lazy_init_hp_params_optimizer_state()  # Its first step would do that.
        for number, parameter in enumerate(self.parameters.values()):
            for key, value in state[number].items():
                if value.ndim:
                    whole = value.contiguous().to(flat)
                    self.deepspeed.utils.safe_set_full_optimizer_state(parameter, whole, key)


def build_engine(config: LoopConfig) -> Replicated:
    """The engine that the launcher asks for, with an accelerator in the run's precision.

    Raises:
        ValueError: Neither of those above, or settings that do not go with it.
    """
    AcceleratorState._reset_state()  # A stage may want another precision than the one trained before it.
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):  # accelerate would hand it the loop's precision as well.
        accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError("MEGATRON_LM is not supported; configs/accelerate has configurations that are")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if deepspeed:
        return DeepSpeed(config, accelerator)
    return FSDP(config, accelerator) if parse_flag_from_env("ACCELERATE_USE_FSDP") else Replicated(config, accelerator)


def _unsupported(config: LoopConfig, accelerator: Accelerator) -> dict[str, bool]:
    return {
        "mixed_precision=fp16": config.mixed_precision == "fp16",
        f"optimizer={config.optimizer}": config.optimizer != "adamw",
        "torch_compile=true": config.torch_compile,
        "one process": accelerator.num_processes == 1,
    }


def _refuse(name: str, refused: Mapping[str, bool]) -> None:
    if found := [setting for setting, is_asked in refused.items() if is_asked]:
        raise ValueError(f"{name} does not go with {', '.join(found)}; change that or launch with --multi_gpu")
