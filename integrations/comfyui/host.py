"""What ComfyUI offers to the nodes: device, folders, progress and interruption. Outside of it, none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CATEGORY = "Image Conductor"
MODEL = "IMAGECONDUCTOR_MODEL"
TRACKS = "IMAGECONDUCTOR_TRACKS"

MODELS_FOLDER = "image_conductor"
"""Name of the folder of model folders, under ComfyUI's `models`."""


def choose_device() -> str:
    """The device that ComfyUI samples on; outside of it, a GPU if there is one."""
    management = _find_module("comfy.model_management")
    if management is not None:
        return str(management.get_torch_device())
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_room(num_bytes: float) -> None:
    """Lets ComfyUI take its own models off the GPU until so much of it is free; they come back when they are needed."""
    management = _find_module("comfy.model_management")
    if management is not None:
        management.free_memory(num_bytes, management.get_torch_device())


def list_model_folders() -> dict[str, Path]:
    """Model folders by name, under ComfyUI's `models/image_conductor` and then under its extra model paths."""
    folder_paths = _find_module("folder_paths")
    if folder_paths is None:
        return {}
    roots = [Path(folder_paths.models_dir) / MODELS_FOLDER]
    if MODELS_FOLDER in folder_paths.folder_names_and_paths:
        roots += map(Path, folder_paths.get_folder_paths(MODELS_FOLDER))
    found: dict[str, Path] = {}
    for index in (index for root in roots for index in sorted(root.glob("*/model_index.json"))):
        found.setdefault(index.parent.name, index.parent)
    return found


def find_weights_file(name: str, kind: str) -> str:
    """A file as it is named, or that of ComfyUI's folder `kind` ("checkpoints", "loras") with this name.

    Raises:
        FileNotFoundError: Neither exists.
    """
    if Path(name).exists():
        return name
    folder_paths = _find_module("folder_paths")
    known = None if folder_paths is None else folder_paths.get_full_path(kind, name)
    if known is None:
        raise FileNotFoundError(f"no file at {name}, nor among ComfyUI's {kind}")
    return str(known)


def check_interrupted() -> None:
    """Raises ComfyUI's exception if its user has cancelled the run."""
    management = _find_module("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()


def report_steps() -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A `callback_on_step_end` that moves ComfyUI's progress bar and stops the call when its user cancels."""
    comfy = _find_module("comfy.utils")
    bar: Any = None

    def on_step(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal bar
        check_interrupted()
        if comfy is not None:
            total = pipe.num_timesteps * pipe.num_windows
            bar = bar or comfy.ProgressBar(total)
            bar.update_absolute(pipe.window * pipe.num_timesteps + step + 1, total)
        return tensors

    return on_step


def _find_module(name: str) -> Any:
    """A module of ComfyUI's, or None outside of it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise  # ComfyUI is there and lacks a package of its own.
        return None
