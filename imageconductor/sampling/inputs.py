"""The arguments of a call of the pipeline, checked and completed by the model's defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from imageconductor.checkpoints.model_folder import SamplingDefaults, check_video_shape
from imageconductor.conditioning import Trajectories, to_rgb
from imageconductor.config import check_finite
from imageconductor.models.adapters import attached_adapters, describe_adapters
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.sampling.branches import ADAPTERS, Branch, Control, plan


@dataclass(frozen=True)
class CallInputs:
    """What a call asks for.

    Attributes:
        images, prompts, negative_prompts: Each of length 1, which serves all, or `count`; images are RGB.
        trajectories: Of length 1 or `count`; none without trajectories.
        count: P, number of conditions.
        size: (W, H) in pixels.
        num_frames: T.
        num_inference_steps: Denoising steps.
        guidance_scale: lambda_cfg; at most 1 = off.
        plan: Evaluations of the model in each step, by guidance scale.
    """

    images: list[Image.Image]
    trajectories: list[Trajectories]
    prompts: list[str]
    negative_prompts: list[str]
    count: int
    size: tuple[int, int]
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    plan: Callable[[float], tuple[Branch, ...]]


def check_inputs(
    pipe: Any,
    image: Image.Image | Sequence[Image.Image],
    trajectories: Trajectories | Sequence[Trajectories] | None,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    control: Control | str | None,
    camera_free_scale: float | None,
    guidance_scale: float | None,
    trajectory_guidance_scale: float | None,
    num_inference_steps: int | None,
    num_frames: int | None,
    size: tuple[int | None, int | None],
) -> CallInputs:
    """The inputs of a call; `pipe` is the pipeline, the rest are its arguments, with `size` = (width, height).

    Raises:
        ValueError: Arguments that do not fit the model or each other.
    """
    check_finite(
        {
            "guidance_scale": guidance_scale,
            "camera_free_scale": camera_free_scale,
            "trajectory_guidance_scale": trajectory_guidance_scale,
        }
    )
    defaults = SamplingDefaults(**pipe.sampling_defaults)
    unet: MotionUNet = pipe.unet
    width, height = size[0] or defaults.width, size[1] or defaults.height
    num_frames = num_frames or defaults.num_frames
    steps = _given(num_inference_steps, defaults.num_inference_steps)
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    check_video_shape((width, height), num_frames, pipe.vae_scale_factor, unet.config["motion_max_seq_length"])
    control = parse_control(_given(control, defaults.control))
    drawn = [] if trajectories is None else _as_list(trajectories)
    scale = _given(guidance_scale, defaults.guidance_scale)
    branches = partial(
        plan,
        control,
        camera_free_scale=camera_free_scale,
        trajectory_guidance_scale=_given(trajectory_guidance_scale, defaults.trajectory_guidance_scale),
        has_trajectories=bool(drawn),
    )
    branches(scale)  # raises where the scales do not go together
    if drawn:
        _check_trajectories(pipe, drawn, num_frames, control)
    images, prompts = [to_rgb(one) for one in _as_list(image)], _as_list(prompt)
    negatives = _as_list(_given(negative_prompt, defaults.negative_prompt))
    given = {"image": images, "prompt": prompts, "negative_prompt": negatives, "trajectories": drawn}
    count = max(map(len, given.values()))
    for name, values in given.items():
        if len(values) not in (1, count) and (values or name != "trajectories"):
            raise ValueError(f"{name}: expected 1 or {count} of them, got {len(values)}")
    return CallInputs(images, drawn, prompts, negatives, count, (width, height), num_frames, steps, scale, branches)


def broadcast(values: list[Any], count: int) -> list[Any]:
    """`count` values, of which one may serve all."""
    return values * count if len(values) == 1 else values


def parse_control(value: Control | str) -> Control:
    """A control by its name.

    Raises:
        ValueError: There is none of that name.
    """
    try:
        return Control(value)
    except ValueError:
        raise ValueError(f"control must be one of {', '.join(c.value for c in Control)}, got {value!r}") from None


def _check_trajectories(pipe: Any, drawn: list[Trajectories], num_frames: int, control: Control) -> None:
    for one in drawn:
        if one.num_frames != num_frames:
            raise ValueError(f"the video has {num_frames} frames, its trajectories {one.num_frames}")
        if not one.points[one.visible].isfinite().all():
            raise ValueError("trajectories: a visible point is not finite")
    if missing := set(ADAPTERS[control]) - set(attached_adapters(pipe.motion_controlnet)):
        names = describe_adapters(missing)
        raise ValueError(f"control {control.value!r} needs the {names}, which this model does not have")


def _given(value: Any, default: Any) -> Any:
    """The value, or the default in place of None."""
    return default if value is None else value


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
