"""The files of a job: `run.yaml`, which repeats it, and its videos."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
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
    settings = config_file.read_yaml(path)
    unused = []  # Records of former versions keep the strength of a preset that became tracks, and scales of no tracks.
    if settings.get("trajectories") is not None and settings.get("preset") is None and "strength" in settings:
        unused.append("strength=1.0")
    if "trajectories" in settings and not any(settings.get(name) for name in MOTIONS):
        unused += ["camera_free_scale=null", "trajectory_guidance_scale=null"]
    job = config_file.load(SampleJob, path, unused)
    found: dict[str, Any] = {}
    for name in ("image", "trajectories", "motion_from", "boxes", "model", "base", "noise_prior"):
        if (value := getattr(job, name)) is not None:
            found[name] = _look_beside(path.parent, value)
    for name in ("lora", "motion_lora", "appearance_lora"):
        found[name] = [_look_beside(path.parent, text) for text in getattr(job, name)]
    return replace(job, **found)


def _look_beside(folder: Path, text: str) -> str:
    """FILE or FILE:NUMBER with the file as one of the folder where it is there, else as it is."""
    file, _, number = text.rpartition(":")
    if (folder / text).exists():
        return str(folder / text)
    return f"{folder / file}:{number}" if file and (folder / file).exists() else text


def change_job(job: SampleJob, changes: Mapping[str, Any]) -> SampleJob:
    """A recorded job with some settings changed; what the record has because of those is the default again.

    Another motion brings its own control, start and strength, boxes what carries the first frame, another model its own
    defaults where the record has those of the old one. Of a mix, a control and the scales that only one of them takes,
    what was asked for last stays. The few-step LoRA comes and goes with the number of steps, unless the record shows
    that it was asked for, and the guidance that goes with it, unless that is a visitor's own.
    """
    given = {name for name, value in changes.items() if value is not None}
    reset: set[str] = set()
    if given & set(MOTIONS):
        reset |= {*MOTIONS, "trajectories_size", "start", "strength", "control", "camera_free_scale", "mix"}
    if "boxes" in given:
        reset.add("first_frame_by")
    if "mix" in given:
        reset |= {"camera_free_scale", "trajectory_guidance_scale"}
    elif given & {"control", "camera_free_scale"} or changes.get("trajectory_guidance_scale") not in (None, 1):
        reset.add("mix")
    if changes.get("control") not in (None, "object"):
        reset.add("camera_free_scale")
    if job.mix is not None and ("mix" in reset or ("mix" in changes and changes["mix"] is None)):
        reset.add("trajectory_guidance_scale")  # 1 in a mix, the model's own elsewhere
    reset |= _reset_by_steps(job, changes)
    defaults = SampleJob()
    return replace(job, **{name: getattr(defaults, name) for name in reset} | dict(changes))


def _reset_by_steps(job: SampleJob, changes: Mapping[str, Any]) -> set[str]:
    """Settings of a record that are the default again because of another model, few-step LoRA or number of steps."""
    model, old, new = changes.get("model"), job.steps, changes.get("steps")
    if model is not None and Path(model).resolve() != Path(job.model).resolve():
        return {"few_step", *_usual(job)}
    if changes.get("few_step") is not None:
        return {"steps", *_usual(job, _GUIDANCE)}
    if old is None or new is None or job.few_step != takes_few_steps(job.model, None, old):
        return set()
    return {"few_step", *_usual(job, _GUIDANCE)} if takes_few_steps(job.model, None, new) != job.few_step else set()


_GUIDANCE = ("guidance_scale", "trajectory_guidance_scale")


def _usual(job: SampleJob, names: Collection[str] | None = None) -> set[str]:
    """Settings of a record, of these names if given, that are the defaults of its model or its few-step LoRA.

    Where the model is gone nobody knows them: those named are taken for its own.
    """
    from imageconductor.checkpoints.few_step import few_step_defaults
    from imageconductor.checkpoints.model_folder import locate_model, read_sampling_defaults

    try:
        usual = read_sampling_defaults(locate_model(job.model))
    except FileNotFoundError:
        return set(names or ())
    usual |= {"steps": usual.pop("num_inference_steps"), "window_frames": usual["num_frames"]}
    if job.few_step:
        usual |= few_step_defaults(usual["steps"])
    del usual["control"]  # depends on the trajectories
    return {name for name in names or usual if getattr(job, name) == usual[name]}


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
        model=str(Path(job.model).absolute()),
        base=None if job.base is None else str(Path(job.base).absolute()),
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
