"""DeepSpeed's ZeRO as a back end of the loop, which keeps precision, schedule, clipping and checkpoints to itself."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from imageconductor.training.engines import Replicated, Tensors, find_unsupported, refuse, refuse_parts
from imageconductor.training.stages.base import Stage
from imageconductor.training.train_config import LoopConfig

_BUCKET = 50_000_000  # gradients that DeepSpeed exchanges at a time; it sets their memory aside, whatever learns


class DeepSpeed(Replicated):
    """ZeRO stage 1 splits the moments, stage 2 the gradients too. Precision stays the loop's."""

    accumulates_alone = False  # DeepSpeed counts micro-steps itself.
    saves_together = True

    def __init__(self, config: LoopConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.zero_stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        offload = {os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") for what in ("OPTIMIZER", "PARAM")}
        refused = find_unsupported(config, accelerator) | {
            f"zero_stage {self.zero_stage} (1 and 2 are possible)": self.zero_stage not in (1, 2),
            "offloading": bool(offload - {None, "none"}),
            "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ,
        }
        refuse("DeepSpeed", refused)
        try:
            import deepspeed  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("DeepSpeed is not installed: pip install 'imageconductor[deepspeed]'") from error
        self.deepspeed: Any = deepspeed
        if accelerator.device.type == "cpu":  # It would first compile an exchange through shared memory, for minutes.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def take(self, stage: Stage) -> dict[str, nn.Parameter]:
        """As `Replicated.take`. They are to become views of one flat tensor, which rules out channels-last.

        Raises:
            ValueError: The stage has several parameter groups.
        """
        refuse_parts("DeepSpeed", stage)
        super().take(stage)
        if len(self.groups) > 1:
            names = ", ".join(self.groups)
            raise ValueError(
                f"DeepSpeed takes one parameter group, stage {stage.name} has {names}; launch with --multi_gpu or FSDP"
            )
        for parameter in self.parameters.values():
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
            "gradient_clipping": self.config.max_grad_norm or 0.0,  # its word for none
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
            self._fill_moments(saved["optimizer"]["state"])
        return stage

    def backward(self, loss: Tensor) -> None:
        """As `Replicated.backward`. Weights change after the last micro-step."""
        self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()
        if self.zero.overflow:  # It would pass over the step and say nothing.
            self.norm = torch.tensor(math.inf, device=self.accelerator.device)

    def step(self) -> None:
        """Nothing: the last `backward` has changed the weights."""

    def gather_state(self, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """As `Replicated.gather_state`."""
        get: Any = self.deepspeed.utils.safe_get_full_optimizer_state
        part = next(iter(self.optimizer.state.values()), {})  # empty before the first step
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self.parameters.values()):
            full = {key: get(parameter, key) if value.ndim else value.clone() for key, value in part.items()}
            if self.accelerator.is_main_process:
                state[number] = {key: value.cpu() for key, value in full.items()}
        (group,) = self.optimizer.param_groups
        return tensors, {"optimizer": {"state": state, "param_groups": [{**group, "params": list(state)}]}}

    def _fill_moments(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Distributes moments that a checkpoint holds complete; one of step 0 holds none."""
        if not state.get(0):
            return
        ((flat,),) = [group["params"] for group in self.optimizer.param_groups]
        self.optimizer.state[flat] = {
            key: torch.zeros_like(flat) if value.ndim else value.to(flat) for key, value in state[0].items()
        }
        self.zero._lazy_init_hp_params_optimizer_state()  # Its first step would do that.
        for number, parameter in enumerate(self.parameters.values()):
            for key, value in state[number].items():
                if value.ndim:
                    self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value.contiguous().to(flat), key)
