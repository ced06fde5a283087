"""Which evaluations a guided step needs, and how they share work.

| depends on | evaluated |
|---|---|
| UNet encoder: (x_t, t, text) | once per video and distinct text |
| image ControlNet: (t, text, image) | once per condition and distinct text, whatever the number of videos |
| motion ControlNet: (t, text, trajectories, adapters) | once per condition and distinct (text, adapters) |
| UNet decoder | once per video and branch |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from imageconductor.diffusion.guidance import camera_free_guidance, classifier_free_guidance, trajectory_guidance
from imageconductor.models.adapters import Adapter, merge_copy
from imageconductor.models.controlnets import MotionControlNet, Residuals
from imageconductor.models.denoiser import Condition, Denoiser, add

Text = Literal["uncond", "prompt"]
Adapters = tuple[str, ...] | None


class Control(str, Enum):
    """What the trajectories move."""

    CAMERA = "camera"
    OBJECT = "object"
    MIXED = "mixed"  # theta_mixed of Eq. 2: both adapters; beyond the release
    BASE = "base"  # theta_0: no adapter, camera and objects as stage 1 learned them


ADAPTERS: dict[Control, tuple[str, ...]] = {
    Control.CAMERA: (Adapter.CAMERA.value,),
    Control.OBJECT: (Adapter.OBJECT.value,),
    Control.MIXED: (Adapter.CAMERA.value, Adapter.OBJECT.value),
    Control.BASE: (),
}


@dataclass(frozen=True)
class Branch:
    """One evaluation of the model: its text, its motion control, and its weight in the guided prediction.

    Attributes:
        text: "uncond" is the negative prompt.
        adapters: Active LoRAs of the motion ControlNet, () for theta_0; None leaves that network out.
        weight: Coefficient; the coefficients of a step sum to 1.
    """

    text: Text
    adapters: Adapters
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
    evaluations: list[tuple[Text, Adapters]] = [("uncond", adapters), ("prompt", adapters)]
    if has_trajectories:
        evaluations += [("uncond", ()), ("prompt", ()), ("prompt", None)]
    # Guidance is linear, so its value at the unit vectors is the weight of each evaluation.
    uncond, prompt, *others = torch.eye(len(evaluations)).double()
    weights = classifier_free_guidance(uncond, prompt, guidance_scale)
    if others:
        base_uncond, base, undrawn = others
        if camera_free_scale is not None:
            weights = camera_free_guidance(base_uncond, base, prompt, guidance_scale, camera_free_scale)
        weights = trajectory_guidance(weights, prompt, undrawn, trajectory_guidance_scale)
    pairs = zip(evaluations, weights.tolist(), strict=True)
    return tuple(Branch(*evaluation, weight) for evaluation, weight in pairs if abs(weight) > 1e-12)


class GuidedDenoiser:
    """Guided prediction `denoise(x_t, t)` for P conditions, built once for all steps of a call.

    In half precision, LoRAs that act in every branch with trajectories are merged into a copy (docs/decisions.md, 29).

    Args:
        denoiser: The networks, the motion ControlNet with the adapters that the branches name.
        branches: From `plan`.
        conditions: For each text that the branches name, that of P videos.
    """

    def __init__(self, denoiser: Denoiser, branches: Sequence[Branch], conditions: Mapping[Text, Condition]):
        self.branches = branches
        self.texts: list[Text] = list(dict.fromkeys(branch.text for branch in branches))
        self.conditions = Condition.stack([conditions[text] for text in self.texts])
        self.num_conditions = len(self.conditions.text) // len(self.texts)
        # Branches under the same adapters are one evaluation of the motion ControlNet.
        self.groups = {branch.adapters: [b for b in branches if b.adapters == branch.adapters] for branch in branches}
        sets = [adapters for adapters in self.groups if adapters is not None]
        self.merges = len(sets) == 1 and bool(sets[0]) and _can_merge(denoiser.motion_controlnet)
        if self.merges:
            merged = merge_copy(denoiser.motion_controlnet, *(sets[0] or ()))
            denoiser = replace(denoiser, motion_controlnet=merged)
        self.denoiser = denoiser
        self.group_conditions = {
            adapters: Condition.stack([conditions[branch.text] for branch in group])
            for adapters, group in self.groups.items()
        }

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Weighted sum of the branches' predictions.

        Args:
            x_t: (P*K, C, T, h, w): K videos of each condition, next to each other.
            t: () int64.

        Returns:
            (P*K, C, T, h, w), eps or v, as the model predicts.
        """
        videos, num_frames = x_t.shape[0], x_t.shape[2]
        per_condition = videos // self.num_conditions

        def repeat_row(residuals: Residuals | None, row: int) -> Residuals | None:
            if residuals is None:
                return None
            rows = residuals.videos(row * self.num_conditions, (row + 1) * self.num_conditions, num_frames)
            return rows.repeat_videos(per_condition, num_frames)

        text = self.conditions.text.repeat_interleave(per_condition, dim=0)
        features = self.denoiser.encode(x_t.repeat(len(self.texts), 1, 1, 1, 1), t, text)
        image = self.denoiser.image_residuals(t, self.conditions)
        prediction = torch.zeros_like(x_t)
        for adapters, group in self.groups.items():
            motion = None
            if adapters is not None and self.conditions.flow is not None:
                acting = None if self.merges else adapters
                motion = self.denoiser.motion_residuals(t, self.group_conditions[adapters], acting)
            for index, branch in enumerate(group):
                row = self.texts.index(branch.text)
                residuals = add(repeat_row(image, row), repeat_row(motion, index))
                output = self.denoiser.decode(features.videos(row * videos, (row + 1) * videos), residuals)
                prediction = prediction + branch.weight * output
        return prediction


def _can_merge(network: MotionControlNet) -> bool:
    """Whether LoRAs may be merged into a copy: in half precision, where a copy is what is evaluated.

    In float32 the output stays that of theta_0 + Delta theta, layer by layer. A copy of a compiled network is not
    compiled, one of an offloaded network is not moved.
    """
    modules = list(network.modules())
    hooked = any(hasattr(module, name) for module in modules for name in ("_hf_hook", "_diffusers_hook"))
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    dtypes = {cast(Tensor, layer.get_base_layer().weight).dtype for layer in layers}
    is_merged = any(layer.merged for layer in layers)
    return dtypes <= {torch.float16, torch.bfloat16} and not (hooked or is_merged or network._compiled_call_impl)
