"""Recipes of model folders: their settings, and their parts on the disk or the hub, complete before any is read.

| part | layouts |
|---|---|
| Stable Diffusion 1.5 | diffusers folder (tokenizer, text_encoder, vae, unet) |
| published networks | `unet.ckpt`, `image_controlnet.ckpt`, `flow_controlnet.ckpt`, also as safetensors |
| AnimateDiff v3 motion module | original `.ckpt`, or diffusers' MotionAdapter folder |
| RGB SparseCtrl | original `.ckpt`, or diffusers' folder |
| v3 domain adapter | original `.ckpt` (LoRA of the spatial attention) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from imageconductor.checkpoints.few_step import FEW_STEP_FOLDER
from imageconductor.checkpoints.model_folder import (
    SCENE_LORA_FOLDER,
    UNET_LORA_FOLDERS,
    SamplingDefaults,
    locate,
    locate_model,
    read_sampling_defaults,
)
from imageconductor.models.adapters import DIFFUSERS_WEIGHTS_NAME, WEIGHTS_NAME
from imageconductor.models.lora_files import CONFIG_NAME
from imageconductor.models.networks import GATES, Networks
from imageconductor.models.weights import check_weight_file, find_weights, has_weights

_NEEDED = {
    "published": ("stable_diffusion", "unet", "image_controlnet", "motion_controlnet"),
    "animatediff": ("stable_diffusion", "motion_module", "image_controlnet"),
    "trained": ("model",),
}
_DOWNLOADED = ("domain_adapter", "style_lora", FEW_STEP_FOLDER)
_READ = {
    "published": (*_NEEDED["published"], *_DOWNLOADED),
    "animatediff": (*_NEEDED["animatediff"], *_DOWNLOADED),
    "trained": ("model", "motion_controlnet", "camera_lora", "object_lora", *GATES, *UNET_LORA_FOLDERS),
}
_WEIGHTS = (  # in the order in which `find_weights` takes them
    ("*model.safetensors", "*model-?????-of-?????.safetensors"),
    ("*model.bin", "*model-?????-of-?????.bin"),
    ("*model.*.safetensors",),
    ("*model.*.bin",),
)


@dataclass
class AssemblyConfig:
    """The parts of a model folder: local paths, or "organisation/name[/file]" on the hub."""

    # The authors' three files; a base to train from; or a model folder with what was trained from it.
    recipe: Literal["published", "animatediff", "trained"]
    stable_diffusion: str | None = None  # diffusers folder of SD-1.5 or of a model made from it
    unet: str | None = None  # published: unet.ckpt
    image_controlnet: str | None = None  # published: image_controlnet.ckpt; animatediff: SparseCtrl RGB
    motion_controlnet: str | None = None  # published: flow_controlnet.ckpt; trained: stage 1's folder
    model: str | None = None  # trained: the folder that training began from
    camera_lora: str | None = None  # trained: stage 2's folder
    object_lora: str | None = None  # trained: stage 3's folder
    object_gates: str | None = None  # trained: folder of the gates for boxes, SMCD's stage 1
    scene_gates: str | None = None  # trained: folder of the gates for the first frame, SMCD's stage 2
    scene_lora: str | None = None  # folder of the LoRA that acts with them; null = scene_lora/ beside them, if any
    style_lora: str | None = None  # folder of a style LoRA that the model folder carries along
    few_step_lora: str | None = None  # folder of the LoRA that stage few_step wrote, or another of its kind
    motion_module: str | None = None  # animatediff: v3_sd15_mm.ckpt, or diffusers' folder
    # v3_sd15_adapter.ckpt, kept beside the UNet so that its scale can still be chosen; null = without
    domain_adapter: str | None = None
    domain_adapter_scale: float = 1.0  # with which it is merged; 0 where the UNet holds it already
    motion_num_attention_heads: int = 8  # of the motion modules, which the file does not tell
    dtype: Literal["float16", "float32"] = "float16"  # of the folder
    sampling: dict[str, Any] = field(default_factory=dict)  # defaults of sampling that differ from the paper's
    licences: dict[str, str] = field(default_factory=dict)  # of each part, for the model card

    def __post_init__(self) -> None:
        if missing := [name for name in _NEEDED[self.recipe] if not getattr(self, name)]:
            raise ValueError(f"recipe {self.recipe} needs {', '.join(missing)}")
        parts = dict.fromkeys(name for names in _READ.values() for name in names)
        given = [name for name in parts if getattr(self, name) is not None]
        if unread := [name for name in given if name not in _READ[self.recipe]]:
            told = ", ".join(f"{name}={getattr(self, name)}" for name in unread)
            raise ValueError(f"recipe {self.recipe} does not read {told}; leave that out, or set it to null")
        names = [field.name for field in fields(SamplingDefaults)]
        if unknown := [str(name) for name in self.sampling if name not in names]:
            raise ValueError(f"sampling has no {', '.join(unknown)}, only {', '.join(names)}")
        try:
            SamplingDefaults(**self.sampling)
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from None


def locate_parts(config: AssemblyConfig) -> dict[str, Path]:
    """Local places of all parts of a recipe by the names of its settings, and of the LoRA beside the scene gates.

    Of a repository on the hub only what is read is downloaded. The parts are complete; no weight has been read.

    Raises:
        FileNotFoundError: A part is not there, or lacks a file.
        ValueError: A file is damaged.
    """
    paths = {
        name: _locate_part(name, str(getattr(config, name)), config.recipe)
        for name in _READ[config.recipe]
        if getattr(config, name) is not None
    }
    if "scene_gates" in paths and SCENE_LORA_FOLDER not in paths:
        beside = paths["scene_gates"].parent / SCENE_LORA_FOLDER
        if beside.is_dir():
            paths[SCENE_LORA_FOLDER] = _locate_part(SCENE_LORA_FOLDER, str(beside), config.recipe)
    return paths


def _locate_part(name: str, given: str, recipe: str) -> Path:
    if name == "model":
        folder = Networks.check_folder(locate_model(given))
        read_sampling_defaults(folder)
        return folder
    if name == "stable_diffusion":
        return _locate_stable_diffusion(given, with_unet=recipe == "animatediff")
    if name.endswith("_lora"):
        weights = DIFFUSERS_WEIGHTS_NAME if name in UNET_LORA_FOLDERS else WEIGHTS_NAME
        folder = locate(given, files=[weights, CONFIG_NAME])
        if not (folder / weights).is_file():
            raise FileNotFoundError(f"{name}={folder}: no folder with {weights}")
        check_weight_file(folder / weights)
        return folder
    path = _locate_networks(given, [""])
    if path.is_file() and recipe != "trained":
        check_weight_file(path)
    elif recipe == "published" or name == "domain_adapter":
        raise ValueError(f"{name}={path}: a file of weights is needed, and this is a folder")
    else:
        find_weights(path)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name}={path} is incomplete: there is no config.json")
    return path


def _locate_stable_diffusion(given: str, with_unet: bool) -> Path:
    networks = ["text_encoder", "vae", *(["unet"] if with_unet else [])]
    root = _locate_networks(given, networks, ["tokenizer/*", "unet/config.json"])
    if missing := [name for name in ("tokenizer", "text_encoder", "vae", "unet") if not (root / name).is_dir()]:
        raise FileNotFoundError(f"{root} is no folder of Stable Diffusion 1.5: it lacks {', '.join(missing)}")
    for network in networks:
        find_weights(root / network)
    return root


def _locate_networks(given: str, networks: Sequence[str], others: Sequence[str] = ()) -> Path:
    """A file, or a folder with networks in these folders; of a repository the weights of one format are downloaded.

    Args:
        given: Path or hub name.
        networks: Their folders, "" = the folder itself; one may turn out to have no weights.
        others: Patterns of further files.
    """
    path, lacking = Path(given), list(networks)
    for weights in _WEIGHTS:
        files = [(Path(network) / name).as_posix() for network in lacking for name in ("config.json", *weights)]
        path = locate(given, files=[*others, *files])
        lacking = [network for network in lacking if path.is_dir() and not has_weights(path / network)]
        if not lacking:
            break
    return path
