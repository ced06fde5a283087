"""Which evaluations a guided step needs, and how they share work.

| depends on | evaluated |
|---|---|
| UNet encoder: (x_t, t, text) | once per video and distinct text |
| image ControlNet: (t, text, image) | once per condition and distinct text, whatever the number of videos |
| motion ControlNet: (t, text, trajectories, adapters) | once per condition and distinct (text, adapters) |
| UNet decoder | once per video and branch |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from imageconductor.diffusion.guidance import camera_free_guidance, classifier_free_guidance, trajectory_guidance
from imageconductor.models.adapters import Adapter, active
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet, Residuals
from imageconductor.models.motion_unet import MotionUNet

Text = Literal["null", "prompt"]


class Control(str, Enum):
    """What the trajectories move."""

    CAMERA = "camera"
    OBJECT = "object"
    MIXED = "mixed"  # theta_mixed of Eq. 2: both adapters; beyond the release
    BASE = "base"  # theta_0: no adapter, camera and objects as stage 1 learned them


ADAPTERS: dict[Control, tuple[Adapter, ...]] = {
    Control.CAMERA: (Adapter.CAMERA,),
    Control.OBJECT: (Adapter.OBJECT,),
    Control.MIXED: (Adapter.CAMERA, Adapter.OBJECT),
    Control.BASE: (),
}


@dataclass(frozen=True)
class Branch:
    """One evaluation of the model: its text, its motion control, and its weight in the guided prediction.

    Attributes:
        text: "null" is the negative prompt.
        adapters: Active LoRAs of the motion ControlNet, () for theta_0; None leaves that network out.
        weight: Coefficient; the coefficients of a step sum to 1.
    """

    text: Text
    adapters: tuple[Adapter, ...] | None
    weight: float


def plan(
    control: Control,
    guidance_scale: float,
    camera_free_scale: float | None = None,
    trajectory_guidance_scale: float = 1.0,
    has_trajectories: bool = True,
) -> tuple[Branch, ...]:
    """Branches of one guided step; one whose coefficient is zero is not among them.

    Args:
        control: What the trajectories move.
        guidance_scale: lambda_cfg, 1 = off.
        camera_free_scale: lambda_trajs of Eq. 5; None = classifier-free guidance under the control's adapter, as the
            release does.
        trajectory_guidance_scale: Away from what the model does without the trajectories, 1 = off.
        has_trajectories: False = plain image-to-video, without the motion ControlNet.

    Raises:
        ValueError: Camera-free guidance is asked for where it has no meaning.
    """
    if camera_free_scale is not None and control is not Control.OBJECT:
        raise ValueError(
            f"camera_free_scale removes camera motion, so it goes with control 'object', not {control.value!r}"
        )
    adapters = ADAPTERS[control] if has_trajectories else None
    evaluations: list[tuple[Text, tuple[Adapter, ...] | None]] = [("null", adapters), ("prompt", adapters)]
    if has_trajectories:
        evaluations += [("null", ()), ("prompt", ()), ("prompt", None)]
    # Guidance is linear, so its value at the unit vectors is the weight of each evaluation.
    null, prompt, *others = torch.eye(len(evaluations)).double()
    weights = classifier_free_guidance(null, prompt, guidance_scale)
    if others:
        base_null, base, undrawn = others
        if camera_free_scale is not None:
            weights = camera_free_guidance(base_null, base, prompt, guidance_scale, camera_free_scale)
        weights = trajectory_guidance(weights, prompt, undrawn, trajectory_guidance_scale)
    pairs = zip(evaluations, weights.tolist(), strict=True)
    return tuple(Branch(*evaluation, weight) for evaluation, weight in pairs if abs(weight) > 1e-12)


@dataclass(frozen=True)
class Conditions:
    """What P conditions hold fixed over a sampling run, on the device and in the dtype of the networks.

    Attributes:
        text: For each text, (P, L, D).
        first_frame: (P, C, T, h, w) scaled latents, zero but for frame 0.
        mask: (P, 1, T, h, w).
        flow: (P, 2, T, H, W) px, or None without trajectories.
    """

    text: dict[Text, Tensor]
    first_frame: Tensor
    mask: Tensor
    flow: Tensor | None


def guided_prediction(
    unet: MotionUNet,
    image_controlnet: ImageControlNet,
    motion_controlnet: MotionControlNet,
    branches: tuple[Branch, ...],
    conditions: Conditions,
    x_t: Tensor,
    t: Tensor,
) -> Tensor:
    """Weighted sum of the branches' predictions.

    Args:
        unet: And the two ControlNets.
        image_controlnet: RGB SparseCtrl.
        motion_controlnet: With the adapters that the branches name.
        branches: From `plan`.
        conditions: P conditions.
        x_t: (P*K, C, T, h, w): K videos of each condition, next to each other.
        t: () int64.

    Returns:
        (P*K, C, T, h, w), eps or v, as the model predicts.
    """
    texts: list[Text] = list(dict.fromkeys(branch.text for branch in branches))
    videos, num_frames = x_t.shape[0], x_t.shape[2]
    num_conditions = len(conditions.first_frame)
    per_condition = videos // num_conditions

    def stacked(names: Sequence[Text]) -> Tensor:
        return torch.cat([conditions.text[name] for name in names])

    def repeated(x: Tensor, count: int) -> Tensor:
        return x.repeat(count, 1, 1, 1, 1)

    def of_text(residuals: Residuals, index: int) -> Residuals:
        rows = residuals.videos(index * num_conditions, (index + 1) * num_conditions, num_frames)
        return rows.repeat_videos(per_condition, num_frames)

    video_text = stacked(texts).repeat_interleave(per_condition, dim=0)
    features = unet.encode(repeated(x_t, len(texts)), t, video_text)
    image = image_controlnet(
        t, stacked(texts), repeated(conditions.first_frame, len(texts)), repeated(conditions.mask, len(texts))
    )
    prediction = torch.zeros_like(x_t)
    for adapters in dict.fromkeys(branch.adapters for branch in branches):
        group = [branch for branch in branches if branch.adapters == adapters]
        motion = None
        if adapters is not None and conditions.flow is not None:
            with active(motion_controlnet, *adapters):
                motion = motion_controlnet(t, stacked([b.text for b in group]), repeated(conditions.flow, len(group)))
        for index, branch in enumerate(group):
            row = texts.index(branch.text)
            residuals = of_text(image, row)
            if motion is not None:
                residuals = residuals + of_text(motion, index)
            output = unet.decode(features.videos(row * videos, (row + 1) * videos), residuals)
            prediction = prediction + branch.weight * output
    return prediction
