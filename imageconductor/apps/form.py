"""What a visitor has filled in, checked field by field, as a job of the sampler."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

from imageconductor.apps.drawn_boxes import check_drawn_boxes, without_boxes
from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.shelf import Shelf
from imageconductor.checkpoints.model_folder import (
    SamplingDefaults,
    adapter_names,
    locate_model,
    read_gate_config,
    read_sampling_defaults,
)
from imageconductor.conditioning import Trajectories
from imageconductor.files import write_text
from imageconductor.models.networks import GATES
from imageconductor.sampling.branches import ADAPTERS, Control
from imageconductor.sampling.gate_inputs import FirstFrame
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.job_conditions import list_cropped_tracks

AUTOMATIC = "automatic"
"""The control that the tracks themselves state, or the object, and that of the only LoRA where a model lacks one; what
carries the first frame as the boxes say."""

_MAX_SEED = 2**31 - 1
_FIELD_WORDS = (  # in the order in which they are looked for in a message
    ("scene_guidance_scale", "scales"),
    ("gated_fraction", "scales"),
    ("first_frame_by", "scales"),
    ("boxes", "drawing"),
    ("camera_free_scale", "scales"),
    ("guidance", "scales"),
    ("LoRA", "loras"),
    ("lora", "loras"),
    ("base", "loras"),
    ("control", "control"),
    ("seed", "seed"),
    ("steps", "steps"),
    ("track", "drawing"),
    ("frames", "frames"),
    ("prompt", "prompt"),
)


@dataclass(frozen=True)
class Form:
    """The fields of the page; None = the model's default.

    Attributes:
        picture: File of the first frame; None = the prompt alone.
        drawing: Tracks and camera in pixels of the picture, docs/trajectories.md, and boxes as "objects"; None =
            nothing is drawn.
        drawing_size: (W, H) that the drawing must have; None = any.
        seed: Of the first video; those of further ones count up from it.
        camera_free_scale: 0 and None = off.
        scene_guidance_scale, gated_fraction: Of the gates; without boxes they say nothing, unless first_frame_by lets
            gates act.
        base: Name on the shelf; empty = the model's own.
        looks, motions: Names on the shelf, each with its scale.
    """

    picture: str | None = None
    drawing: Mapping[str, Any] | None = None
    drawing_size: tuple[int, int] | None = None
    prompt: str = ""
    negative_prompt: str | None = None
    seed: int = 0
    videos: int = 1
    steps: int | None = None
    frames: int | None = None
    control: str = AUTOMATIC
    guidance_scale: float | None = None
    trajectory_guidance_scale: float | None = None
    camera_free_scale: float | None = None
    scene_guidance_scale: float | None = None
    first_frame_by: str = AUTOMATIC
    gated_fraction: float | None = None
    base: str = ""
    looks: Mapping[str, float] = field(default_factory=dict)
    motions: Mapping[str, float] = field(default_factory=dict)


def read_defaults(base: SampleJob) -> SamplingDefaults:
    """The defaults of a job's model, with which the page begins, of the job's own size where it states one."""
    defaults = SamplingDefaults(**read_sampling_defaults(locate_model(base.model)))
    stated = {"width": base.width, "height": base.height}
    return replace(defaults, **{side: pixels for side, pixels in stated.items() if pixels is not None})


def list_gates(model: str) -> list[str]:
    """What a model folder has of "object_gates" and "scene_gates"."""
    return [name for name in GATES if read_gate_config(locate_model(model), name) is not None]


def list_controls(model: str) -> list[str]:
    """The controls whose LoRAs a model folder has."""
    names = adapter_names(locate_model(model))
    return [control.value for control in Control if set(ADAPTERS[control]) <= set(names)]


def read_max_objects(model: str) -> int | None:
    """Boxes that the object gates of a model folder take; None = it has none."""
    config = read_gate_config(locate_model(model), "object_gates")
    return None if config is None else int(config["max_objects"])


def build_job(form: Form, base: SampleJob, shelf: Shelf, limits: Limits, folder: Path) -> SampleJob:
    """The job that a form asks for.

    Args:
        form: Values from a browser, of which none is trusted.
        base: Model, device, dtype and memory settings.
        shelf: What the names of LoRAs stand for.
        limits: Bounds.
        folder: Of the visitor, where tracks and boxes are written as files, which `prepare` reads.

    Raises:
        FieldError: A field is out of bounds; names it.
    """
    defaults = read_defaults(base)
    if defaults.width * defaults.height > limits.video_pixels:
        raise FieldError("generate", f"a video of {defaults.width} x {defaults.height} is larger than allowed")
    if form.picture is None and not form.prompt.strip():
        raise FieldError("picture", "choose a picture, or write a prompt for a video without one")
    control = None if form.control == AUTOMATIC else form.control
    if control not in (None, *(one.value for one in Control)):
        names = ", ".join([AUTOMATIC, *(one.value for one in Control)])
        raise FieldError("control", f"control must be one of {names}")
    seed = limits.check_number("seed", "the seed", form.seed, 0, _MAX_SEED)
    videos = limits.check_number("seed", "the number of videos", form.videos, 1, limits.videos)
    steps = defaults.num_inference_steps if form.steps is None else form.steps
    frames = defaults.num_frames if form.frames is None else form.frames
    job = replace(
        base,
        image=None,
        trajectories=None,
        preset=None,
        motion_from=None,
        boxes=None,
        boxes_name=None,
        **_check_gate_settings(form),
        prompt=limits.check_text("prompt", "the prompt", form.prompt),
        negative_prompt=None
        if form.negative_prompt is None
        else limits.check_text("prompt", "the negative prompt", form.negative_prompt),
        control=cast(Any, control),
        camera_free_scale=_check_scale("the camera-free scale", form.camera_free_scale or None),
        guidance_scale=_check_scale("the guidance scale", form.guidance_scale),
        trajectory_guidance_scale=_check_scale("the trajectory guidance", form.trajectory_guidance_scale),
        seed=[seed + i for i in range(videos)],
        num_videos=None,
        repeat=None,
        steps=limits.check_number("steps", "the number of steps", steps, 1, limits.steps),
        num_frames=limits.check_number("frames", "the number of frames", frames, 1, limits.frames),
        base=_find(shelf.bases, form.base) if form.base else base.base,
        lora=[*base.lora, *_with_scales(shelf.looks, form.looks, is_run=False)],
        appearance_lora=[*base.appearance_lora, *_with_scales(shelf.looks, form.looks, is_run=True)],
        motion_lora=[*base.motion_lora, *_with_scales(shelf.motions, form.motions)],
    )
    if form.picture is not None:
        limits.check_picture(Path(form.picture))
        job = replace(job, image=form.picture)
    if form.drawing is not None:
        job = _with_drawing(job, form, limits, folder)
    if job.boxes is None and job.first_frame_by not in ("gates", "both"):  # no gate acts
        job = replace(job, scene_guidance_scale=1.0, gated_fraction=1.0)
    if job.trajectories is None:  # nor do the scales of what they do
        job = replace(job, camera_free_scale=None, trajectory_guidance_scale=None)
    return job


def _with_drawing(job: SampleJob, form: Form, limits: Limits, folder: Path) -> SampleJob:
    """The job with its tracks and its boxes as new files of the folder."""
    num_frames, max_objects = cast(int, job.num_frames), read_max_objects(job.model)
    drawing = limits.check_drawing(form.drawing, num_frames, max_objects=max_objects, size=form.drawing_size)
    boxes = check_drawn_boxes(drawing, num_frames, max_objects)
    name = secrets.token_hex(8)
    if _draws(drawing):
        path = folder / f"drawing-{name}.json"
        write_text(path, json.dumps(without_boxes(drawing)))
        job = replace(job, trajectories=str(path), control=job.control or cast(Any, _only_control(job.model)))
    if boxes is not None:
        path = folder / f"boxes-{name}.json"
        boxes.save(path)
        job = replace(job, boxes=str(path))
    return job


def _only_control(model: str) -> str | None:
    """What drawings move with a model folder that lacks the camera's or the object's LoRA; None = it has both."""
    controls = list_controls(model)
    if Control.MIXED.value in controls:
        return None
    return next(one for one in ("object", "camera", "base") if one in controls)


def list_cropped(drawing: Mapping[str, Any], job: SampleJob) -> list[str]:
    """A line for each track and each box of a checked drawing that the video's part of the picture never holds.

    Args:
        drawing: As the visitor drew it; its tracks are counted from 0 and its boxes from 1.
        job: From `build_job`.

    Raises:
        FieldError: It holds no track.
    """
    defaults, num_frames = read_defaults(job), cast(int, job.num_frames)
    size = defaults.width, defaults.height
    said = "outside of the bright part of the picture, which is all that the video shows; drag"
    drawn = Trajectories.from_drawing(without_boxes(drawing), num_frames)
    placed = drawn.cover_crop(size)
    if drawn.visible.any() and not placed.visible.any():
        raise FieldError("drawing", f"every track is {said} one into it")
    lines = [f"track {n} is {said} it there" for n in list_cropped_tracks(drawn, placed)]
    boxes = check_drawn_boxes(drawing, num_frames, read_max_objects(job.model))
    if boxes is not None:
        is_lost = boxes.present.any(1) & ~boxes.cover_crop(size).present.any(1)
        lines += [f"box {n + 1} ({boxes.names[n]}) is {said} it there" for n in is_lost.nonzero().flatten().tolist()]
    return lines


def _check_gate_settings(form: Form) -> dict[str, Any]:
    """Settings of the gates as fields of the job.

    Raises:
        FieldError: One is out of bounds.
    """
    carrier = None if form.first_frame_by == AUTOMATIC else form.first_frame_by
    if carrier not in (None, *get_args(FirstFrame)):
        names = ", ".join([AUTOMATIC, *get_args(FirstFrame)])
        raise FieldError("scales", f"what carries the first frame must be one of {names}")
    scale = _check_scale("the guidance by boxes", form.scene_guidance_scale)
    fraction = _check_scale("the part of the steps with boxes", form.gated_fraction)
    if fraction is not None and not 0 <= fraction <= 1:
        raise FieldError("scales", f"the part of the steps with boxes must be from 0 to 1, got {fraction:g}")
    return {
        "first_frame_by": carrier,
        "scene_guidance_scale": 1.0 if scale is None else scale,
        "gated_fraction": 1.0 if fraction is None else fraction,
    }


def explain(error: Exception, job: SampleJob | None = None) -> FieldError:
    """An error as a refusal beside the field that it concerns, without the paths of this machine.

    Args:
        error: A ValueError, FileNotFoundError or FieldError of the sampler.
        job: What was asked for.
    """
    if isinstance(error, FieldError):
        return error
    text = str(error).strip() or type(error).__name__
    if job is not None and job.image is not None and job.image in text:
        return FieldError("picture", text.replace(job.image, "the picture"))
    if job is not None and job.trajectories is not None and job.trajectories in text:
        return FieldError("drawing", text.replace(job.trajectories, "the drawing"))
    if job is not None and job.boxes is not None and job.boxes in text:
        return FieldError("drawing", text.replace(job.boxes, "the drawing"))
    field_ = next((name for word, name in _FIELD_WORDS if word in text), "generate")
    return FieldError(field_, text)


def _draws(drawing: Mapping[str, Any]) -> bool:
    return bool(drawing.get("tracks")) or drawing.get("camera") is not None


def _check_scale(what: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > 100:
        raise FieldError("scales", f"{what} must be a number from -100 to 100, got {str(value)[:40]}")
    return float(value)


def _find(row: Mapping[str, Path], name: str) -> str:
    if name not in row:
        known = f"there are {', '.join(row)}" if row else "this page offers none"
        raise FieldError("loras", f"{name[:80]!r} is not among the files of this page; {known}"[:400])
    return str(row[name])


def _with_scales(row: Mapping[str, Path], chosen: Mapping[str, float], is_run: bool | None = None) -> list[str]:
    """FILE:SCALE of each chosen name; of runs alone, or of files alone, where `is_run` says so."""
    texts = []
    for name, scale in chosen.items():
        path = _find(row, name)
        if is_run is None or is_run == Path(path).is_dir():
            number = _check_scale(f"the scale of {name}", scale)
            texts.append(f"{path}:{number:g}")
    return texts
