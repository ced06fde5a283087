"""A LoRA with which few steps without guidance give what many guided ones give, by consistency distillation.

The timesteps are a grid in segments. On it, the model without the LoRA makes one guided DDIM step from x_t to an
earlier x_s. The model with it learns to reach from x_t, by one DDIM step to the end of the segment, what it reaches
from x_s: then one evaluation a segment suffices. Guidance, camera-free guidance too, is part of the step, so that the
LoRA holds it. ControlNets and the LoRAs of camera and object act alike in both models, and stay as they are.

Source: Latent Consistency Models (arXiv 2310.04378), as a LoRA (LCM-LoRA, arXiv 2311.05556), in segments
(Hyper-SD, arXiv 2404.13686); one segment is LCM-LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imageconductor.checkpoints.few_step import FEW_STEP_FOLDER, few_step_scheduler
from imageconductor.checkpoints.model_folder import check_adapters, load_adapters, read_sampling_defaults
from imageconductor.diffusion.clean_estimate import estimate_x_0
from imageconductor.diffusion.guidance import camera_free_guidance, classifier_free_guidance, trajectory_guidance
from imageconductor.diffusion.losses import pseudo_huber_loss
from imageconductor.models.adapters import (
    activate,
    active,
    add_adapter,
    freeze_all_but_adapter,
    lora_targets,
    save_for_diffusers,
)
from imageconductor.models.controlnets import ADAPTERS, Control, Residuals
from imageconductor.models.denoiser import Condition, add
from imageconductor.models.networks import Networks
from imageconductor.training.stage_configs import FewStepConfig
from imageconductor.training.stages.base import TrajectoryStage

FEW_STEP = "few_step"


class FewStepStage(TrajectoryStage):
    """A LoRA of the UNet, spatial layers and motion modules; every micro-step is under one motion control."""

    name = FEW_STEP
    Config = FewStepConfig
    learns_loras = True
    validated = "consistency"

    def __init__(self, networks: Networks, config: FewStepConfig):
        super().__init__(networks, config)
        networks.freeze()
        load_adapters(self.motion_controlnet, config.model)
        targets = lora_targets(self.unet, config.lora_targets)
        add_adapter(self.unet, FEW_STEP, rank=config.lora_rank, targets=targets, seed=config.seed)
        activate(self.unet, FEW_STEP)
        freeze_all_but_adapter(self.unet, FEW_STEP)
        defaults = read_sampling_defaults(config.model)
        given = config.guidance_scale, config.trajectory_guidance_scale
        usual = defaults["guidance_scale"], defaults["trajectory_guidance_scale"]
        self.guidance_scale, self.trajectory_scale = (
            default if scale is None else scale for scale, default in zip(given, usual, strict=True)
        )
        self.controls, self.camera_free_scale = config.controls, config.camera_free_scale
        self.negative_prompt: str = defaults["negative_prompt"]
        self._negative: Tensor | None = None  # (1, L, D)
        self.solver_steps, self.segments, self.huber_width = config.solver_steps, config.segments, config.huber_width
        self.sampler = few_step_scheduler(self.scheduler)
        self.preview_control = self.controls[0]
        self.preview_settings = {"trajectory_guidance_scale": 1.0}
        self._control = self.controls[0]

    @classmethod
    def check(cls, config: FewStepConfig) -> None:
        """As `Stage.check`: the LoRAs of the controls, too."""
        super().check(config)
        for control in config.controls:
            check_adapters(config.model, ADAPTERS[Control(control)], f"control {control!r} of stage {FEW_STEP}")

    @property
    def acting(self) -> tuple[str, ...]:
        """LoRAs of the motion ControlNet under the control of the micro-step."""
        return ADAPTERS[Control(self._control)]

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> tuple[Tensor, Condition]:
        """As `Stage.encode`; the first clip's generator draws the control of the micro-step."""
        encoded = super().encode(batch, generators)
        self._control = self.controls[int(torch.randint(len(self.controls), (), generator=generators[0]))]
        return encoded

    def loss_terms(self, x_0: Tensor, t: Tensor, eps: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Distance between clean latents that lead the model with the LoRA to the same end of the segment."""
        t, earlier, end = self._on_grid(t)
        x_t = self.scheduler.add_noise(x_0, eps, t)
        with torch.no_grad():
            image = self.denoiser.image_residuals(t, condition)
            drawn = add(image, self._motion(t, condition, self.acting))
            guided = self._clean(x_t, t, self._guided(x_t, t, condition, image, drawn))
            x_s = self._step(x_t, t, earlier, guided)
            target = self._clean_for(x_t, t, end, self._follow(x_s, earlier, end, condition))
        # Autocast of older PyTorch keeps the LoRA's casts of the block above, which have no gradient (pytorch#112583).
        torch.clear_autocast_cache()
        found = self._clean(x_t, t, self.denoiser.decode(self.denoiser.encode(x_t, t, condition), drawn))
        return {"consistency": pseudo_huber_loss(found, target, self.huber_width)}

    @contextmanager
    def previewing(self) -> Iterator[None]:
        """Inside the block the networks have the sampler of few steps."""
        before = self.networks.scheduler
        self.networks.scheduler = self.sampler
        try:
            yield
        finally:
            self.networks.scheduler = before

    def save(self, folder: Path) -> None:
        """Writes few_step_lora/pytorch_lora_weights.safetensors, which a model folder carries along."""
        save_for_diffusers(self.unet, FEW_STEP, folder / FEW_STEP_FOLDER, torch.float16)

    def _on_grid(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The timesteps (B,) of the grid that stand for `t`, the ones before them, and the ends of their segments.

        Clean latents are timestep -1.
        """
        total = self.scheduler.config["num_train_timesteps"]
        step, length = total // self.solver_steps, self.solver_steps // self.segments
        place = t // step
        return (place + 1) * step - 1, place * step - 1, place // length * length * step - 1

    def _motion(self, t: Tensor, condition: Condition, adapters: tuple[str, ...]) -> Residuals | None:
        """What the motion ControlNet adds under these LoRAs; None without trajectories."""
        return None if condition.flow is None else self.denoiser.motion_residuals(t, condition, adapters)

    def _guided(
        self, x_t: Tensor, t: Tensor, condition: Condition, image: Residuals | None, drawn: Residuals | None
    ) -> Tensor:
        """The guided prediction (B, C, T, h, w) of the model without the LoRA.

        Args:
            x_t: (B, C, T, h, w).
            t: (B,).
            condition: Of the prompt.
            image: What the image ControlNet adds under it.
            drawn: What both ControlNets add under it and the control.
        """
        denoiser, scale = self.denoiser, self.guidance_scale
        if self._negative is None:
            self._negative = self.encode_text({"caption": [self.negative_prompt]}, [False])
        without = replace(condition, text=self._negative.expand(len(x_t), -1, -1))
        camera_free_scale = self.camera_free_scale if self._control == "object" else None
        with active(self.unet):
            features = denoiser.encode(x_t, t, condition)
            prompt = guided = denoiser.decode(features, drawn)
            if camera_free_scale is not None or scale > 1:
                motion = self._motion(t, without, self.acting if camera_free_scale is None else ())
                residuals = add(denoiser.image_residuals(t, without), motion)
                uncond = denoiser.decode(denoiser.encode(x_t, t, without), residuals)
                if camera_free_scale is None:
                    guided = classifier_free_guidance(uncond, prompt, scale)
                else:
                    base = denoiser.decode(features, add(image, self._motion(t, condition, ())))
                    guided = camera_free_guidance(uncond, base, prompt, scale, camera_free_scale)
            if self.trajectory_scale != 1:
                undrawn = denoiser.decode(features, image)
                guided = trajectory_guidance(guided, prompt, undrawn, self.trajectory_scale)
        return guided

    def _follow(self, x_s: Tensor, t: Tensor, end: Tensor, condition: Condition) -> Tensor:
        """Where the model with the LoRA gets from x_s at `t` by one step to the segment's end, if it is not there."""
        is_there = (t == end).view(-1, 1, 1, 1, 1)
        t = t.clamp(min=0)  # Those that are there are evaluated too: to ask which would be to wait for the device.
        residuals = add(self.denoiser.image_residuals(t, condition), self._motion(t, condition, self.acting))
        prediction = self.denoiser.decode(self.denoiser.encode(x_s, t, condition), residuals)
        return torch.where(is_there, x_s, self._step(x_s, t, end, self._clean(x_s, t, prediction)))

    def _step(self, x_t: Tensor, t: Tensor, earlier: Tensor, x_0: Tensor) -> Tensor:
        """x_s (B, C, T, h, w) of a DDIM step from t to `earlier`, each (B,), by an estimate of the clean latents."""
        (signal, noise), (signal_s, noise_s) = self._levels(t), self._levels(earlier)
        return signal_s * x_0 + noise_s * (x_t - signal * x_0) / noise

    def _clean_for(self, x_t: Tensor, t: Tensor, end: Tensor, x_s: Tensor) -> Tensor:
        """The clean latents (B, C, T, h, w) by which a DDIM step from t to `end` gets to `x_s`."""
        (signal, noise), (signal_s, noise_s) = self._levels(t), self._levels(end)
        return (x_s - noise_s / noise * x_t) / (signal_s - noise_s / noise * signal)

    def _clean(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        kind: str = self.scheduler.config["prediction_type"]
        return estimate_x_0(prediction.float(), x_t.float(), self._levels(t)[0] ** 2, kind)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of signal and noise, each (B, 1, 1, 1, 1) float32, at timesteps (B,); -1 = clean latents."""
        alphas = F.pad(self.scheduler.alphas_cumprod.float(), (0, 1), value=1.0).to(t.device)[t].view(-1, 1, 1, 1, 1)
        return alphas**0.5, (1 - alphas) ** 0.5
