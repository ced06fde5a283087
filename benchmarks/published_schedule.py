"""A guided step as the published release evaluates it: what the shared schedule is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from unittest import mock

import torch
from torch import Tensor

from imageconductor.diffusion.guidance import camera_free_guidance, classifier_free_guidance
from imageconductor.models import text_attention
from imageconductor.models.denoiser import Condition, Denoiser
from imageconductor.sampling.branches import ADAPTERS, Adapters, Control, Text


def published_step(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    conditions: Mapping[Text, Condition],
    control: Control,
    guidance_scale: float,
    camera_free_scale: float | None = None,
) -> Tensor:
    """Guided prediction (B, C, T, h, w), each video by itself.

    Both ControlNets, their LoRAs unmerged, and the whole UNet run on negative prompt and prompt together, which are
    repeated for every frame. Eq. 5 takes two such passes, of which the second's negative prompt is not used.

    Args:
        denoiser: The networks.
        x_t: (B, C, T, h, w).
        t: () int64.
        conditions: Of one video, for both texts.
        control: What the trajectories move.
        guidance_scale: lambda_cfg, above 1.
        camera_free_scale: lambda_trajs of Eq. 5; None = classifier-free guidance.
    """
    condition = Condition.stack([conditions["uncond"], conditions["prompt"]])

    def run(video: Tensor, adapters: Adapters) -> tuple[Tensor, ...]:
        motion = denoiser.motion_residuals(t, condition, adapters)
        image = denoiser.image_residuals(t, condition)
        features = denoiser.encode(video.repeat(2, 1, 1, 1, 1), t, condition)
        return denoiser.decode(features, motion if image is None else image + motion).chunk(2)

    guided: list[Tensor] = []
    with mock.patch.object(text_attention, "FOLDING", ()):
        for video in x_t.split(1):
            if camera_free_scale is None:
                eps_uncond, eps_text = run(video, ADAPTERS[control])
                guided.append(classifier_free_guidance(eps_uncond, eps_text, guidance_scale))
            else:
                eps_uncond, eps_base = run(video, ())
                eps_object = run(video, ADAPTERS[Control.OBJECT])[1]
                scales = guidance_scale, camera_free_scale
                guided.append(camera_free_guidance(eps_uncond, eps_base, eps_object, *scales))
    return torch.cat(guided)
