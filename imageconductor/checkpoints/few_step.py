"""The few-step LoRA of a model folder, `few_step_lora/`, and the scheduler that goes with it.

The LoRA is a file of diffusers', so that `pipe.load_lora_weights("MODEL/few_step_lora")` takes it as well, with
`pipe.scheduler = few_step_scheduler(pipe.scheduler)` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from diffusers import DDIMScheduler

from imageconductor.models.adapters import DIFFUSERS_WEIGHTS_NAME

FEW_STEP_FOLDER = "few_step_lora"
MOST_STEPS = 8
"""At most so many steps are made with the LoRA where a model has one and nothing else is asked for."""


def few_step_defaults(steps: int) -> dict[str, Any]:
    """Settings of a job with the LoRA, which holds the guidance, in place of those of a model that takes `steps`."""
    return {"steps": min(steps, 4), "guidance_scale": 1.0, "trajectory_guidance_scale": 1.0}


def few_step_lora_path(folder: str | Path) -> Path:
    """Where a model folder keeps the LoRA, if it has one."""
    return Path(folder) / FEW_STEP_FOLDER / DIFFUSERS_WEIGHTS_NAME


def find_few_step_lora(folder: str | Path) -> Path | None:
    """The file of a model folder; None = it has none."""
    path = few_step_lora_path(folder)
    return path if path.is_file() else None


def few_step_scheduler(scheduler: Any) -> DDIMScheduler:
    """DDIM from the noisiest timestep to clean latents, at the noise levels of a model's scheduler.

    No noise is drawn between the steps, as a sampler of consistency models (LCM) does: errors of the single steps add
    up with it (Trajectory Consistency Distillation, arXiv 2402.19159; measured in docs/log.md). Six and seven steps,
    into which diffusers divides 1000 timesteps with a remainder, end at timestep 0, which holds a trace of noise.
    """
    whole = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    return cast(DDIMScheduler, DDIMScheduler.from_config(scheduler.config, **whole))
