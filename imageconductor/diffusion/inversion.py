"""The noise from which a model makes a given clip, and its use as a prior for other videos (MotionDirector)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from einops import rearrange
from torch import Tensor


def ddim_inversion(
    predict: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, scheduler: Any, num_steps: int = 50
) -> Tensor:
    """Noise (B, C, T, h, w) from which deterministic DDIM steps lead back to about the clip.

    Each step takes the latent from the timestep before to t, by the model's output for it at t, as published.

    Args:
        predict: Model output (B, C, T, h, w) of (x, t), without guidance.
        x_0: (B, C, T, h, w), clean latents.
        scheduler: Of the model; its noise schedule, timesteps and kind of prediction are taken.
        num_steps: Evaluations of the model.

    Raises:
        ValueError: The model predicts neither noise nor v nor x_0.
    """
    ddim = cast(Any, DDIMScheduler).from_config(scheduler.config)
    ddim.set_timesteps(num_steps, device=x_0.device)
    kind, sample, before = scheduler.config["prediction_type"], x_0.float(), ddim.final_alpha_cumprod
    for t in ddim.timesteps.flip(0):
        output = predict(sample, t).float()
        signal, noise = before.sqrt(), (1 - before).sqrt()
        new_signal, new_noise = ddim.alphas_cumprod[t].sqrt(), (1 - ddim.alphas_cumprod[t]).sqrt()
        if kind in ("epsilon", "sample"):  # From x_0 follows the noise that the model sees in what it is given for x_t.
            eps = output if kind == "epsilon" else (sample - new_signal * output) / new_noise
            clean = (sample - noise * eps) / signal
        elif kind == "v_prediction":  # v = new_signal eps - new_noise clean, sample = signal clean + noise eps
            scale = signal * new_signal + noise * new_noise
            eps = (signal * output + new_noise * sample) / scale
            clean = (new_signal * sample - noise * output) / scale
        else:
            raise ValueError(f"only predictions of noise, v or x_0 can be inverted, the scheduler has {kind!r}")
        sample, before = new_signal * clean + new_noise * eps, ddim.alphas_cumprod[t]
    return sample


def mix_noise_prior(noise: Tensor, inverted: Tensor, fraction: float) -> Tensor:
    """Initial noise (B, C, T, h, w) of unit variance that remembers a clip: sqrt(p) z_inv + sqrt(1 - p) eps.

    Args:
        noise: (B, C, T, h, w), eps.
        inverted: (1 or B, C, T, h', w'), z_inv from `ddim_inversion`; resized frame by frame where h, w differ.
        fraction: p in [0, 1]. MotionDirector: 0 for a motion from several clips, 0.1 to 0.5 for one clip.

    Raises:
        ValueError: Channels or frames differ, or `fraction` lies outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction of a noise prior must lie in [0, 1], got {fraction}")
    if inverted.shape[1:3] != noise.shape[1:3]:
        shapes = [f"{shape[1]} channels and {shape[2]} frames" for shape in (inverted.shape, noise.shape)]
        raise ValueError(f"the noise prior has {shapes[0]}, the video's latents have {shapes[1]}")
    if inverted.shape[3:] != noise.shape[3:]:
        frames = inverted.transpose(1, 2).flatten(0, 1)
        resized = F.interpolate(frames, list(noise.shape[3:]), mode="bilinear", align_corners=False)
        inverted = rearrange(resized, "(b t) c h w -> b c t h w", b=len(inverted))
    return math.sqrt(fraction) * inverted.to(noise) + math.sqrt(1 - fraction) * noise
