"""The noise from which a model makes a given clip, and its use as a prior for other videos (MotionDirector)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from diffusers import DDIMInverseScheduler
from torch import Tensor


def ddim_inversion(
    predict: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, scheduler: Any, num_steps: int = 50
) -> Tensor:
    """Noise (B, C, T, h, w) from which deterministic DDIM steps lead back to about the clip.

    Each step takes the latent for one of the timestep before, and the model is evaluated at the timestep that it goes
    to, as published.

    Args:
        predict: Model output (B, C, T, h, w) of (x_t, t), without guidance.
        x_0: (B, C, T, h, w), clean latents.
        scheduler: Of the model; its noise schedule and kind of prediction are taken.
        num_steps: Evaluations of the model.
    """
    inverse: Any = DDIMInverseScheduler.from_config(scheduler.config, clip_sample=False)
    inverse.set_timesteps(num_steps, device=x_0.device)
    sample = x_0.float()
    for t in inverse.timesteps:
        sample = inverse.step(predict(sample, t).float(), t, sample).prev_sample
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
        resized = F.interpolate(frames, noise.shape[3:], mode="bilinear", align_corners=False)
        inverted = resized.unflatten(0, (len(inverted), -1)).transpose(1, 2)
    return math.sqrt(fraction) * inverted.to(noise) + math.sqrt(1 - fraction) * noise
