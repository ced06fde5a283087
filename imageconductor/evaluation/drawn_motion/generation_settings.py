"""The settings that a method's videos of drawn motion depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imageconductor.checkpoints.few_step import few_step_lora_path
from imageconductor.checkpoints.model_folder import locate_model, read_sampling_defaults
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method, RequestSet
from imageconductor.evaluation.drawn_motion.fixed_requests import FixedRequests
from imageconductor.evaluation.drawn_motion.requests import Request
from imageconductor.evaluation.drawn_motion.video_format import VideoFormat
from imageconductor.evaluation.generation_settings import TASK, describe_files, list_weights
from imageconductor.models.lora_files import FOLDER_NAMES
from imageconductor.sampling.loras import find_lora
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
    weights = describe_files([*list_weights(folder), *map(Path, list_attached_files(method))])
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
    settings |= {f"{TASK}{name}": task.settings for name, task in config.tasks.items()}
    return json.loads(json.dumps(settings, default=str))
