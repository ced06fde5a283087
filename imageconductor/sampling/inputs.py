"""The arguments of a call of the pipeline, checked and completed by the model's defaults."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from imageconductor.checkpoints.model_folder import SamplingDefaults, check_video_shape
from imageconductor.conditioning import (
    Boxes,
    Trajectories,
    build_flow_map,
    encode_first_frame,
    keyframe_condition,
    to_pixels,
    to_rgb,
)
from imageconductor.config import check_finite
from imageconductor.models.adapters import attached_adapters, describe_adapters
from imageconductor.models.denoiser import Condition
from imageconductor.models.weights import refuse_non_finite
from imageconductor.sampling.branches import ADAPTERS, Branch, Control, Text, plan
from imageconductor.sampling.gate_inputs import (
    FirstFrame,
    check_boxes,
    check_gate_scales,
    choose_first_frame,
    encode_boxes,
    warn_without_scene_lora,
)
from imageconductor.sampling.job_conditions import crop_drawn, suitable_control
from imageconductor.sampling.shortcuts import NO_SHORTCUTS, Shortcuts
from imageconductor.sampling.windows import choose_window, split_frames

Picture = Image.Image | Mapping[int, Image.Image]
"""A first frame, or pictures by the number of their frame."""

Mix = dict[Control, float]
"""Weight of each motion control."""


@dataclass(frozen=True)
class CallInputs:
    """What a call asks for.

    Attributes:
        images: RGB pictures by frame, of length 1, which serves all, or `count`; none for text-to-video.
        prompts, negative_prompts: Texts or their embeddings (P, L, D), of length 1, which serves all, or `count`.
        trajectories: Of length 1 or `count`, cropped to `size`; none without trajectories.
        count: P, number of conditions.
        size: (W, H) in pixels.
        num_frames: T.
        num_inference_steps: Denoising steps.
        guidance_scale: lambda_cfg; at most 1 = off.
        plan: Evaluations of the model in each step, by guidance scale, mix, and whether gates and guidance act.
        mix: Weights of the motion controls; None = one control.
        adapters: LoRAs that the motion ControlNet has.
        boxes: Of length 1 or `count`; none without boxes.
        first_frame_by: What carries the picture of frame 0.
        gated_fraction: Of the steps, in which gates act.
        windows: Frames of each window; a single one for a video of at most the model's number of frames.
        shortcuts: Work that is left out in some of the steps.
        device: Of the call; diffusers walks through all modules to find it.
    """

    images: list[dict[int, Image.Image]]
    trajectories: list[Trajectories]
    prompts: list[str] | Tensor
    negative_prompts: list[str] | Tensor
    count: int
    size: tuple[int, int]
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    plan: Callable[[float, Mix | None, bool, bool], tuple[Branch, ...]]
    mix: Mix | None
    adapters: tuple[str, ...]
    boxes: list[Boxes]
    first_frame_by: FirstFrame
    gated_fraction: float
    windows: tuple[range, ...]
    shortcuts: Shortcuts
    device: torch.device


def check_inputs(
    pipe: Any,
    image: Picture | Sequence[Picture] | None,
    trajectories: Trajectories | Sequence[Trajectories] | None,
    prompt: str | Sequence[str] | Tensor,
    negative_prompt: str | Sequence[str] | Tensor | None,
    *,
    control: Control | str | None = None,
    camera_free_scale: float | None = None,
    guidance_scale: float | None = None,
    trajectory_guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    num_frames: int | None = None,
    size: tuple[int | None, int | None] = (None, None),
    mix: Mapping[Any, float] | None = None,
    boxes: Boxes | Sequence[Boxes] | None = None,
    scene_guidance_scale: float = 1.0,
    first_frame_by: str | None = None,
    gated_fraction: float = 1.0,
    window_frames: int | None = None,
    window_overlap: int | None = None,
    shortcuts: Shortcuts = NO_SHORTCUTS,
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
            "scene_guidance_scale": scene_guidance_scale,
            "gated_fraction": gated_fraction,
        }
    )
    defaults = SamplingDefaults(**pipe.sampling_defaults)
    width, height = _given(size[0], defaults.width), _given(size[1], defaults.height)
    num_frames = defaults.num_frames if num_frames is None else num_frames
    steps = _given(num_inference_steps, defaults.num_inference_steps)
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    most = pipe.unet.config.get("motion_max_seq_length")
    windows = split_frames(num_frames, choose_window(window_frames, defaults.num_frames, most), window_overlap)
    check_video_shape((width, height), len(windows[0]), pipe.vae_scale_factor, most)
    drawn = [] if trajectories is None else _as_list(trajectories)
    control = parse_control(_given(control, _stated_control(drawn, defaults.control)))
    if pipe.motion_controlnet is None and (drawn or image is not None):
        raise ValueError("image and trajectories need ControlNets, and this is a text-to-video model, which has none")
    scale = _given(guidance_scale, defaults.guidance_scale)
    scales = {"camera_free_scale": camera_free_scale, "trajectory_guidance_scale": trajectory_guidance_scale}
    drawn = _place_drawn(drawn, num_frames, (width, height), {"mix": mix, **scales})
    if (weights := parse_mix(mix)) is not None:
        plan(control, scale, camera_free_scale, _given(trajectory_guidance_scale, 1.0), bool(drawn), weights)

    def branches(scale: float, mix: Mix | None, is_gated: bool, is_guided: bool) -> tuple[Branch, ...]:
        scene_scale = scene_guidance_scale if is_gated and is_guided else 1.0
        scale = scale if is_guided else 1.0
        if mix is not None:
            if drawn:
                _check_adapters(pipe, mix)
            return plan(control, scale, has_trajectories=bool(drawn), mix=mix, scene_guidance_scale=scene_scale)
        if not is_guided:
            return plan(control, has_trajectories=bool(drawn), guidance_scale=1.0)
        trajectory_scale = _given(trajectory_guidance_scale, defaults.trajectory_guidance_scale)
        return plan(control, scale, camera_free_scale, trajectory_scale, bool(drawn), None, scene_scale)

    branches(scale, weights, True, True)  # raises where the scales do not go together
    if drawn:
        _check_adapters(pipe, [control] if weights is None else weights)
    images = [] if image is None else [_read_pictures(one, num_frames) for one in _as_list(image)]
    placed = [] if boxes is None else list(_as_list(boxes))
    for one in placed:
        check_boxes(one, num_frames, None if pipe.object_gates is None else pipe.object_gates.max_objects)
    carrier = choose_first_frame(first_frame_by, images, bool(placed), pipe.scene_gates is not None)
    check_gate_scales(scene_guidance_scale, gated_fraction, bool(placed) or carrier != "controlnet")
    may_lack = {"trajectories", "image", "boxes"} if image is None else {"trajectories", "boxes"}
    prompts, negatives = _as_list(prompt), _as_list(_given(negative_prompt, defaults.negative_prompt))
    given = {"image": images, "prompt": prompts, "negative_prompt": negatives, "trajectories": drawn, "boxes": placed}
    return CallInputs(
        images=images,
        trajectories=drawn,
        prompts=prompts,
        negative_prompts=negatives,
        count=_count(given, may_lack),
        size=(width, height),
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance_scale=scale,
        plan=branches,
        mix=weights,
        adapters=() if pipe.motion_controlnet is None else attached_adapters(pipe.motion_controlnet),
        boxes=placed,
        first_frame_by=carrier,
        gated_fraction=gated_fraction,
        windows=windows,
        shortcuts=shortcuts,
        device=pipe._execution_device,
    )


def _count(given: Mapping[str, Sequence[Any]], may_lack: Collection[str]) -> int:
    """Number of conditions, from lists of which each has as many or one, or none where it may lack."""
    count = max(map(len, given.values()))
    for name, values in given.items():
        if len(values) not in (1, count) and (len(values) or name not in may_lack):
            raise ValueError(f"{name}: expected 1 or {count} of them, got {len(values)}")
    return count


def broadcast(values: list[Any], count: int) -> list[Any]:
    """`count` values, of which one may serve all."""
    return values * count if len(values) == 1 else values


def build_conditions(pipe: Any, inputs: CallInputs) -> dict[Text, Condition]:
    """The condition of all videos for each text, on the device and in the dtype of the networks.

    Of a video of several windows, it is that of the whole, but for the flow map, which is of the first window.

    Raises:
        ValueError: The text encoder, or the VAE, gives values that are not finite.
    """
    device, dtype, count = inputs.device, pipe.unet.dtype, inputs.count

    def embed(texts: list[str] | Tensor) -> Tensor:
        if isinstance(texts, Tensor):
            return texts.to(device, dtype).expand(count, -1, -1)
        return pipe.encode_prompt(broadcast(texts, count), device).to(dtype)

    texts: dict[Text, Tensor] = {"uncond": embed(inputs.negative_prompts), "prompt": embed(inputs.prompts)}
    if texts["uncond"].shape != texts["prompt"].shape:
        shapes = " and ".join(str(tuple(text.shape)) for text in texts.values())
        raise ValueError(f"embeddings of negative prompt and prompt must have one shape, got {shapes}")
    refuse_non_finite(pipe, torch.cat(list(texts.values())), "the text encoder")
    keyframes = mask = scene = None
    if inputs.images:
        pixels = torch.cat([to_pixels(image, inputs.size) for one in inputs.images for image in one.values()])
        latents = encode_first_frame(pipe.vae, pixels, device=device).to(device, dtype)
        refuse_non_finite(pipe, latents, "encoding of the first frame")
        parts = latents.transpose(0, 1)[None].split([len(one) for one in inputs.images], dim=2)
        if inputs.first_frame_by != "controlnet":
            warn_without_scene_lora(pipe)
            scene = torch.cat([part[:, :, 0] for part in parts]).expand(count, -1, -1, -1)
        clips = [
            keyframe_condition(part, tuple(one), inputs.num_frames)
            for part, one in zip(parts, inputs.images, strict=True)
        ]
        if inputs.first_frame_by != "gates":
            keyframes, mask = (torch.cat(part).expand(count, -1, -1, -1, -1) for part in zip(*clips, strict=True))
    flow = draw_flow(pipe, inputs, inputs.windows[0])
    shared = Condition(texts["prompt"], keyframes, mask, flow, scene=scene, input_frame=scene)
    if inputs.boxes:
        placed = [one.cover_crop(inputs.size) for one in inputs.boxes]
        shared = replace(shared, **encode_boxes(pipe, placed, count, device, dtype))
    return {name: replace(shared, text=text) for name, text in texts.items()}


def draw_flow(pipe: Any, inputs: CallInputs, frames: range) -> Tensor | None:
    """Flow maps (P, 2, T, H, W) of these frames, as of a clip of its own; None without trajectories."""
    if not inputs.trajectories:
        return None
    convention = pipe.motion_controlnet.flow_convention
    placed = [one.at_frames(frames) for one in inputs.trajectories]
    flows = torch.cat([build_flow_map(one, convention, inputs.device) for one in placed])
    return flows.to(pipe.unet.dtype).expand(inputs.count, -1, -1, -1, -1)


def choose_texts(
    prompt: str | Sequence[str], embeds: Tensor | None, negative: str | Sequence[str] | None, negative_embeds: Any
) -> tuple[Any, Any]:
    """Prompt and negative prompt, or their embeddings where these are given.

    Raises:
        ValueError: Both are given of one, or embeddings are not (P, L, D).
    """
    chosen: list[Any] = []
    for name, text, given in (("prompt", prompt, embeds), ("negative_prompt", negative, negative_embeds)):
        if given is not None and text:
            raise ValueError(f"{name} and {name}_embeds exclude each other; leave one out")
        if given is not None and given.ndim != 3:
            raise ValueError(f"{name}_embeds must be (P, L, D), got {tuple(given.shape)}")
        chosen.append(text if given is None else given)
    return chosen[0], chosen[1]


def parse_seeds(seed: int | Sequence[int] | None, generator: Any, num_videos_per_prompt: int) -> list[int]:
    """Seeds of the videos of each condition; none where generators stand in their place.

    Raises:
        ValueError: The list is empty or names what is no seed, a generator or another number of videos is given beside
            it, or that is below 1.
    """
    if num_videos_per_prompt < 1:
        raise ValueError(f"num_videos_per_prompt must be at least 1, got {num_videos_per_prompt}")
    given: Any = seed if isinstance(seed, Iterable) else [] if seed is None else [seed]
    seeds = list(given)
    if wrong := [one for one in seeds if not isinstance(one, Integral) or not -(2**63) <= int(one) < 2**64]:
        raise ValueError(f"seed must be whole numbers from -2^63 to 2^64 - 1, as torch takes them, got {wrong[0]!r}")
    seeds = [int(one) for one in seeds]
    if seed is not None and not seeds:
        raise ValueError("seed is an empty list; give one number for each video, or leave it out")
    if seeds and (generator is not None or num_videos_per_prompt not in (1, len(seeds))):
        raise ValueError(f"seed={seed} stands in place of generator and num_videos_per_prompt; leave them out")
    return seeds


def check_whole(**values: Any) -> None:
    """Raises ValueError if an argument, given by its name, is neither a whole number nor None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}")


def parse_control(value: Control | str) -> Control:
    """A control by its name.

    Raises:
        ValueError: There is none of that name.
    """
    try:
        return Control(value)
    except ValueError:
        raise ValueError(f"control must be one of {', '.join(c.value for c in Control)}, got {value!r}") from None


def parse_mix(value: Mapping[Any, float] | None) -> Mix | None:
    """A mix by the names of its controls.

    Raises:
        ValueError: There is no control of a name, or a weight is not finite.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f'mix must be a mapping from controls to weights, such as {{"camera": 1.0}}, got {value!r}')
    if not value:
        raise ValueError("mix is empty; give the weight of at least one control, or leave it out")
    check_finite({f"mix[{name!r}]": weight for name, weight in value.items()})
    return {parse_control(name): float(weight) for name, weight in value.items()}


def _check_adapters(pipe: Any, controls: Iterable[Control]) -> None:
    attached = set(attached_adapters(pipe.motion_controlnet))
    for control in controls:
        if missing := set(ADAPTERS[control]) - attached:
            names = describe_adapters(missing)
            raise ValueError(f"control {control.value!r} needs the {names}, which this model does not have")


def _stated_control(drawn: Sequence[Trajectories], default: str) -> str:
    """What all trajectories say that they move; the default where they say nothing or differ."""
    said = {suitable_control(one, default) for one in drawn}
    return said.pop() if len(said) == 1 else default


def _place_drawn(
    drawn: Sequence[Trajectories], num_frames: int, size: tuple[int, int], weights: Mapping[str, Any]
) -> list[Trajectories]:
    """The trajectories on the cropped picture; ValueError where they do not fit, or weights are given without any."""
    for name, value in () if drawn else weights.items():
        if value is not None and (name, value) != ("trajectory_guidance_scale", 1):  # which is off
            raise ValueError(f"{name}={value} weighs what trajectories do, and there are none; leave it out")
    for one in drawn:
        if one.num_frames != num_frames:
            raise ValueError(f"the video has {num_frames} frames, its trajectories {one.num_frames}")
        if not one.points[one.visible].isfinite().all():
            raise ValueError("trajectories: a visible point is not finite")
    return [crop_drawn(one, size, "trajectories") for one in drawn]


def _given(value: Any, default: Any) -> Any:
    """The value, or the default in place of None."""
    return default if value is None else value


def _read_pictures(value: Any, num_frames: int) -> dict[int, Image.Image]:
    """RGB pictures by frame, in order; one alone is the first frame, and frames count from the end below zero.

    Raises:
        ValueError: A frame is not among the video's, or stands there twice, or a picture is none.
    """
    if not isinstance(value, Mapping):
        return {0: to_rgb(value)}
    pictures: dict[int, Image.Image] = {}
    for frame, picture in cast("Mapping[Any, Any]", value).items():
        if not isinstance(frame, int) or not -num_frames <= frame < num_frames or frame % num_frames in pictures:
            raise ValueError(
                f"image: {frame!r} must be the number of one of the video's {num_frames} frames, each once; "
                f"got {', '.join(map(repr, value))}"
            )
        pictures[frame % num_frames] = to_rgb(picture, f"image {frame}")
    if not pictures:
        raise ValueError("image: a mapping from frames to pictures is empty; leave the image out for text-to-video")
    return dict(sorted(pictures.items()))


def _as_list(value: Any) -> Any:
    """A list as it is, one value as a list of it; a tensor of embeddings (P, L, D) stands for P of them."""
    return list(value) if isinstance(value, (list, tuple)) else value if isinstance(value, Tensor) else [value]
