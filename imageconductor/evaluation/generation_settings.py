"""The settings that a method's videos depend on, so that videos made with others are never taken for them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imageconductor.checkpoints.few_step import FEW_STEP_FOLDER, few_step_lora_path, find_few_step_lora
from imageconductor.checkpoints.model_folder import locate_model, read_gate_config, read_sampling_defaults
from imageconductor.checkpoints.reference_run import NOISE_PRIOR_NAME
from imageconductor.evaluation.box_config import BoxEvaluateConfig, BoxMethod
from imageconductor.evaluation.evaluate_config import EvaluateConfig, Method, RequestSet
from imageconductor.evaluation.fixed_requests import FixedRequests
from imageconductor.evaluation.learned_motion_config import LearnedMethod
from imageconductor.evaluation.requests import Request
from imageconductor.evaluation.score_files import identify_file
from imageconductor.evaluation.video_format import VideoFormat
from imageconductor.models.lora_files import FOLDER_NAMES
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.loras import find_job_loras, find_lora, parse_noise_prior
from imageconductor.sampling.shortcuts import NO_SHORTCUTS

_SETTINGS = (
    "images",
    "motions",
    "strength",
    "world_seed",
    "style",
    "num_points",
    "seed",
)
_SAMPLING = ("num_inference_steps", "guidance_scale", "trajectory_guidance_scale")
_TASK = "task "
_MOTION = "motion "


def list_attached_files(method: Method) -> list[str]:
    """Files that a method puts on its model: base weights and LoRAs, also of folders and of runs.

    Raises:
        FileNotFoundError, ValueError: As `find_lora`.
    """
    loras = [find_lora(text, "style")[0] for text in method.lora]
    loras += [find_lora(text, "motion")[0] for text in method.motion_lora]
    files = [
        str(next((Path(lora, name) for name in FOLDER_NAMES if Path(lora, name).is_file()), lora)) for lora in loras
    ]
    if method.few_step:
        files.append(str(few_step_lora_path(locate_model(method.model or ""))))
    return [*([method.base] if method.base else []), *files]


def collect_settings(
    config: EvaluateConfig,
    method: Method,
    requests: Mapping[RequestSet, Sequence[Request]],
    drawn: VideoFormat,
    wanted: VideoFormat,
    dtype: str,
) -> dict[str, Any]:
    """All that the videos of a model depend on, in types of JSON; weights by the size and date of their files.

    Args:
        config: Settings of the evaluation.
        method: A method with a model.
        requests: The requests of each set.
        drawn: Format in which requests are drawn.
        wanted: Format of the method's videos.
        dtype: Precision of the networks.
    """
    folder = locate_model(method.model or "")
    weights = _describe_files([*_list_weights(folder), *map(Path, list_attached_files(method))])
    settings = {key: getattr(config, key) for key in _SETTINGS} | {"dtype": dtype}
    settings |= {key: None if method.few_step else getattr(config, key) for key in _SAMPLING}
    settings["world"] = asdict(config.world)
    made_by = {key: getattr(method, key) for key in ("model", "videos", "base", "lora", "motion_lora")}
    own = {key: getattr(method, key) for key in ("num_inference_steps", "guidance_scale")}
    made_by |= {key: value for key, value in own.items() if value is not None}
    made_by |= {"few_step": True} if method.few_step else {}
    shortcuts = {key: getattr(method, key) for key in ("guidance_interval", "controlnet_interval")}
    made_by |= {key: value for key, value in shortcuts.items() if value != getattr(NO_SHORTCUTS, key)}
    settings |= {"size": wanted.size, "num_frames": wanted.num_frames, "method": made_by, "weights": weights}
    if wanted != drawn:
        settings |= {"fit": wanted.fit, "frames": wanted.frames, "requests_drawn_in": asdict(drawn)}
    if config.fixed_requests is not None:
        settings |= {"fixed_requests": FixedRequests.load(config.fixed_requests).sha256}
    settings |= {"sampling_defaults": read_sampling_defaults(folder)}
    if config.motions == "presets":  # The seed of a request is its number, so another list changes the seeds.
        settings |= {"presets": [config.camera_presets, config.object_presets]}
        settings |= {"keys": [r.key for r in next(iter(requests.values()))] if config.images else None}
    settings |= {f"{_TASK}{name}": task.settings for name, task in config.tasks.items()}
    return json.loads(json.dumps(settings, default=str))


def locate_record(output: Path, name: str) -> Path:
    """File of what the videos of a method were made with, in the folder of an evaluation."""
    return output / "videos" / name / "made_with.json"


def merge_with_record(
    record: Path, settings: dict[str, Any], unknown: Collection[str] = (), idle: Collection[str] = ()
) -> dict[str, Any]:
    """The settings that the record keeps together with these; a task or a motion may be added later.

    Args:
        record: From `locate_record`; there need not be a file yet.
        settings: From `collect_settings`.
        unknown: Settings that may be anything where the record says null.
        idle: Settings that may be anything, as nothing is made of them.

    Raises:
        ValueError: The videos were made with other settings; names the first one, and both values.
    """
    old: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    compared = {
        key for key in (*old, *settings) if not key.startswith((_TASK, _MOTION)) or (key in old and key in settings)
    } - {key for key in unknown if old.get(key) is None}
    if old and (changed := sorted(key for key in compared.difference(idle) if old.get(key) != settings.get(key))):
        more = f", and {', '.join(changed[1:])}" if len(changed) > 1 else ""
        told = _describe_change(changed[0], old.get(changed[0]), settings.get(changed[0]))
        raise ValueError(f"{record.parent} was made with other settings: {told}{more}; name another --output")
    return {**old, **settings}


def _describe_change(name: str, old: Any, new: Any) -> str:
    """Both values of a setting, or of the first thing that differs inside it."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = next((key for key in {**old, **new} if old.get(key) != new.get(key)), None)
        if inner is not None:
            return _describe_change(f"{name}.{inner}", old.get(inner), new.get(inner))
    return f"{name} was {str(old)[:80]} and now {str(new)[:80]}"


def collect_learned_settings(method: LearnedMethod, jobs: Mapping[str, SampleJob]) -> dict[str, Any]:
    """All that a method's videos of learned motions depend on but prompt and seed; weights by size and date.

    Args:
        method: The method, whose model is one for all motions or has {motion} in its path.
        jobs: By motion, as `prepare` gives them.
    """
    kept = ("negative_prompt", "guidance_scale", "steps", "width", "height", "num_frames", "dtype")
    settings: dict[str, Any] = {"protocol": "learned_motion"}
    for name, job in jobs.items():
        filled = method.of_motion(name)
        loras = [Path(find_lora(text, "motion")[0]) for text in filled.motion_lora]
        loras += [Path(find_lora(text, "appearance")[0]) for text in filled.appearance_lora]
        priors = [] if filled.noise_prior is None else [parse_noise_prior(filled.noise_prior)[0] / NOISE_PRIOR_NAME]
        files = [file for path in (*loras, *priors) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        settings[f"{_MOTION}{name}"] = {
            "method": asdict(filled) | {"model": job.model},
            "weights": _describe_files([*_list_weights(Path(job.model)), *files]),
            **{key: getattr(job, key) for key in kept},
            **_describe_few_steps(job),
        }
    return json.loads(json.dumps(settings, default=str))


def collect_box_settings(config: BoxEvaluateConfig, method: BoxMethod, job: SampleJob) -> dict[str, Any]:
    """All that a method's videos depend on, beside the clips; weights by size and date.

    Args:
        config: Settings of the evaluation.
        method: The method.
        job: Its settings, with its model's defaults.
    """
    loras = [path for path, _ in find_job_loras(job)[1]]
    of_clips = ("dataset", "data", "split", "captions", "world", "frame_step", "seed")
    kept = ("negative_prompt", "guidance_scale", "trajectory_guidance_scale", "steps", "width", "height", "num_frames")
    settings: dict[str, Any] = {
        "protocol": "boxes",
        **{key: getattr(config, key) for key in of_clips},
        **{key: getattr(job, key) for key in (*kept, "dtype", "first_frame_by")},
        "method": asdict(method) | {"model": job.model},
        "weights": _describe_files([*_list_weights(Path(job.model)), *map(Path, loras)]),
        "gates": read_gate_config(str(job.model), "object_gates"),
        **_describe_few_steps(job),
    }
    return json.loads(json.dumps(settings, default=str))


def _describe_few_steps(job: SampleJob) -> dict[str, bool]:
    """Whether the model's few-step LoRA acts, where it has one."""
    return {} if find_few_step_lora(job.model) is None else {"few_step": bool(job.few_step)}


def _describe_files(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and date of files by their paths."""
    return {str(path): identify_file(path)[1:] for path in sorted(paths)}


def _list_weights(folder: Path) -> list[Path]:
    """Weight files of a model; not the style LoRA beside it, which acts only if a method names it."""
    unused = "style_lora", FEW_STEP_FOLDER
    return [path for path in folder.rglob("*.safetensors") if path.relative_to(folder).parts[0] not in unused]
