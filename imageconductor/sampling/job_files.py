"""The files of a job: `run.yaml`, which repeats it, and its videos."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from imageconductor import config as config_file
from imageconductor.sampling.job import MOTIONS, Inputs, SampleJob
from imageconductor.sampling.loras import absolute_lora, absolute_noise_prior, takes_few_steps

if TYPE_CHECKING:
    from imageconductor.sampling.video import Frames


def load_job(path: Path) -> SampleJob:
    """A job from YAML; files that it names are looked for beside it first, then in the working folder."""
    job = config_file.load(SampleJob, path)
    beside = {
        name: str(path.parent / value)
        for name in ("image", "trajectories", "motion_from", "boxes", "model")
        if (value := getattr(job, name)) is not None and (path.parent / value).exists()
    }
    return replace(job, **beside)


def change_job(job: SampleJob, changes: Mapping[str, Any]) -> SampleJob:
    """A recorded job with some settings changed; what the record has because of those is the default again.

    Another motion brings its own control, start and strength, boxes what carries the first frame, the end of a mix the
    model's guidance by trajectories. The few-step LoRA comes and goes with the number of steps, unless the record shows
    that it was asked for, and the guidance that goes with it, unless that is a visitor's own.
    """
    reset: set[str] = set()
    if any(changes.get(name) is not None for name in MOTIONS):
        reset |= {*MOTIONS, "trajectories_size", "start", "strength", "control", "camera_free_scale"}
    if changes.get("boxes") is not None:
        reset.add("first_frame_by")
    if job.mix is not None and "mix" in changes and changes["mix"] is None:
        reset.add("trajectory_guidance_scale")
    old, new, few_step = job.steps, changes.get("steps"), changes.get("few_step")
    if few_step is not None:
        reset |= {"steps", *_usual_guidance(job)}
    elif old is not None and new is not None and job.few_step == takes_few_steps(job.model, None, old):
        few_step = takes_few_steps(changes.get("model", job.model), None, new)
        if few_step != job.few_step:
            reset |= {"few_step", *_usual_guidance(job)}
    defaults = SampleJob()
    return replace(job, **{name: getattr(defaults, name) for name in reset} | dict(changes))


def _usual_guidance(job: SampleJob) -> list[str]:
    """The guidance scales of a record that are the defaults of its model, or of the few-step LoRA."""
    from imageconductor.checkpoints.few_step import few_step_defaults
    from imageconductor.checkpoints.model_folder import locate_model, read_sampling_defaults

    usual = read_sampling_defaults(locate_model(job.model))
    if job.few_step:
        usual |= few_step_defaults(usual["num_inference_steps"])
    return [name for name in ("guidance_scale", "trajectory_guidance_scale") if getattr(job, name) == usual[name]]


def write(inputs: Inputs, videos: Sequence[Frames], folder: Path) -> None:
    """Writes video-SEED.mp4 and overlay-SEED.mp4 for each seed, first_frame.png, run.yaml, and what was drawn.

    That is trajectories.json and boxes.json. Videos of a prompt alone are called PROMPT-SEED.mp4, and what there is not
    is not written.

    Args:
        inputs: From `prepare`.
        videos: From `render`, one for each seed.
        folder: An existing folder; `files.atomic_folder` gives one that appears when it is complete.
    """
    from imageconductor.sampling.video import draw_boxes, draw_trajectories, upscale_for_viewing, write_mp4

    job, trajectories = inputs.job, inputs.trajectories
    record = replace(
        job,
        image=None if inputs.image is None else "first_frame.png",
        trajectories="trajectories.json" if trajectories.num_tracks else None,
        trajectories_size=None,
        preset=None,
        motion_from=None,
        start=None,
        strength=1.0,
        boxes=None if inputs.boxes is None else "boxes.json",
        boxes_name=None,
        model=str(Path(job.model).resolve()),
        base=None if job.base is None else str(Path(job.base).resolve()),
        lora=[absolute_lora(text) for text in job.lora],
        motion_lora=[absolute_lora(text) for text in job.motion_lora],
        appearance_lora=[absolute_lora(text) for text in job.appearance_lora],
        noise_prior=None if job.noise_prior is None else absolute_noise_prior(job.noise_prior),
    )
    fps, name = cast(int, job.fps), "video"
    if inputs.image is None:
        words = re.sub(r"\W+", "-", job.prompt.lower()).strip("-")
        name = words.encode()[:160].decode(errors="ignore") or name  # File systems take 255 bytes.
        name = f"video-{name}" if name.startswith("overlay") else name
    else:
        inputs.image.save(folder / "first_frame.png")
    if inputs.image is not None or trajectories.num_tracks:
        trajectories.save(folder / "trajectories.json")
    if inputs.boxes is not None:
        inputs.boxes.save(folder / "boxes.json")
    config_file.save(record, folder / "run.yaml")
    for seed, video in zip(job.seeds, videos, strict=True):
        large, factor = upscale_for_viewing(video)
        write_mp4(folder / f"{name}-{seed}.mp4", large, fps)
        if inputs.image is None and not trajectories.num_tracks and inputs.boxes is None:
            continue
        drawn = large if inputs.boxes is None else draw_boxes(large, inputs.boxes, factor)
        write_mp4(folder / f"overlay-{seed}.mp4", draw_trajectories(drawn, trajectories, factor), fps)
