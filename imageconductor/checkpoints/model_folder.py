"""A model folder, read without loading its networks: defaults, LoRAs, sizes.

model_index.json             parts and `sampling_defaults`, as diffusers writes it
pipeline.py                  what diffusers' own loader runs, with `trust_remote_code=True`
unet/, vae/, ...             parts, as diffusers and transformers write them
NAME_lora/                   a LoRA of the motion ControlNet in peft's format, named NAME in the network
domain_adapter/, style_lora/ LoRAs of the UNet
few_step_lora/               a LoRA of the UNet for few steps without guidance (`few_step`)
object_gates/, scene_gates/  gated attention for boxes and for the first frame, which a model may have or not
scene_lora/                  a LoRA of the motion modules that was trained with the scene gates and acts with them
sources.json, training/      where the weights come from (`model_card`)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.few_step import FEW_STEP_FOLDER
from imageconductor.checkpoints.model_card import read_provenance
from imageconductor.config import check_finite
from imageconductor.files import find_shipped, write_text
from imageconductor.models.adapters import (
    DIFFUSERS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    adapter_parameters,
    describe_adapters,
    load_adapter,
)
from imageconductor.models.controlnets import Control, MotionControlNet
from imageconductor.models.networks import GATES, NETWORKS, Networks, is_text_to_video, load_network
from imageconductor.models.weights import find_weights, has_weights, read_checkpoint

_SUFFIX = "_lora"
SCENE_LORA_FOLDER = "scene_lora"
_NEVER_READ = ["*.ckpt", "*.pt", "*.pth", "*.onnx", "*.onnx_data", "*.pb", "*.msgpack", "*.h5", "*.gguf"]
UNET_LORA_FOLDERS = (SCENE_LORA_FOLDER, FEW_STEP_FOLDER, "style_lora")
"""LoRAs of the UNet, which a pipeline does not attach by itself."""

# `import ... as`: diffusers answers a plain import of a missing package with "Run `pip install imageconductor`".
PIPELINE_CODE = '''"""The pipeline for diffusers: DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)."""

try:
    import imageconductor.sampling.diffusers_loader as loader
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "imageconductor":
        raise
    raise ImportError(
        "this model needs the Python package imageconductor, which is not installed or too old: run `pip install .` in "
        "an up-to-date copy of the Image Conductor repository (the folder with pyproject.toml and sample.py)"
    ) from None

ImageConductorPipeline = loader.LoadedByDiffusers
'''
"""Text of a model folder's `pipeline.py`."""


@dataclass(frozen=True)
class SamplingDefaults:
    """A model's defaults, kept in its `model_index.json`. The values here are those of the published weights.

    Raises:
        ValueError: A value is of another type, a count is not positive, or there is no such control.
    """

    width: int = 384
    height: int = 256
    num_frames: int = 16
    fps: int = 8
    num_inference_steps: int = 25
    guidance_scale: float = 8.5  # paper C.1; the release's YAML says 7.5
    trajectory_guidance_scale: float = 1.0  # off, as in the paper and the release
    negative_prompt: str = "worst quality, low quality, letterboxed"
    control: str = "object"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")
            if kind is int and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.control not in (names := [control.value for control in Control]):
            raise ValueError(f"control must be one of {', '.join(names)}, got {self.control!r}")


def locate(name: str | Path, what: str = "file or folder", files: Sequence[str] | None = None, **hub: Any) -> Path:
    """A local path, or the local copy of "organisation/name[/file]" on the hub, downloaded once.

    Args:
        name: Path or hub name.
        what: What is wanted, for messages.
        files: Patterns of the files that are wanted of "organisation/name"; None = all.
        hub: Arguments of `huggingface_hub`'s downloads, e.g. `revision`.

    Raises:
        FileNotFoundError: Neither exists, or the hub cannot be reached.
    """
    path = find_shipped(name)
    if path.exists():
        return path
    if path.is_absolute() or len(path.parts) < 2 or Path(*path.parts[:2]).is_dir():
        raise FileNotFoundError(f"no {what} at {name}")
    from huggingface_hub import hf_hub_download, snapshot_download

    repository = "/".join(path.parts[:2])
    try:
        if len(path.parts) == 2:
            return Path(snapshot_download(repository, allow_patterns=None if files is None else list(files), **hub))
        return Path(hf_hub_download(repository, "/".join(path.parts[2:]), **hub))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no {what} at {name}, and the hub did not give one: {reason}") from error


def locate_model(name: str | Path, **hub: Any) -> Path:
    """Local folder of a model given by path or by "organisation/name"; `hub` as in `locate`.

    Of a repository the small files come first, so that a foreign one is refused before its weights are downloaded,
    and pickled weights only where there are no others.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The repository on the hub is none of a model.
    """
    path = find_shipped(name)
    if path.is_file() or (len(path.parts) != 2 and not path.is_dir()):
        raise FileNotFoundError(f"no model folder at {name}")
    if path.is_dir():
        return path
    read_sampling_defaults(locate(name, "model folder", ["*.json"], **hub))
    folder = locate(name, "model folder", ignore_patterns=[*_NEVER_READ, "*.bin"], **hub)
    if all(has_weights(folder / part) for part in NETWORKS if (folder / part).is_dir()):
        return folder
    return locate(name, "model folder", ["*.bin"], **hub)


def read_sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """Fields of `SamplingDefaults` as a model folder states them.

    Raises:
        FileNotFoundError: There is no model folder.
        ValueError: Its `model_index.json` is not one of this pipeline.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} is no model folder (model_index.json is missing)")
    usual = _text_to_video_defaults(Path(folder)) if is_text_to_video(Path(folder)) else None
    try:
        config = json.loads(index.read_text(encoding="utf-8"))
        defaults = SamplingDefaults(**((asdict(usual) if usual else {}) | config.get("sampling_defaults", {})))
        check_finite(defaults, "sampling_defaults")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not the index of an Image Conductor model: {error}") from error
    if usual is None and "motion_controlnet" not in config:
        raise ValueError(
            f"{folder} is a {config.get('_class_name')} without a motion ControlNet; `imageconductor assemble` makes a "
            "model of its parts (docs/weights.md)"
        )
    return asdict(defaults)


def _text_to_video_defaults(folder: Path) -> SamplingDefaults:
    """Those of diffusers' TextToVideoSDPipeline."""
    side = _read_part_config(folder, "unet").get("sample_size") or 32
    pixels = side * read_vae_scale_factor(folder)
    return SamplingDefaults(
        pixels, pixels, num_inference_steps=50, guidance_scale=9.0, negative_prompt="", control="base"
    )


def find_scene_lora(folder: str | Path) -> Path | None:
    """The file of a model folder's LoRA for its scene gates; None = it has none."""
    path = Path(folder) / SCENE_LORA_FOLDER / DIFFUSERS_WEIGHTS_NAME
    return path if path.is_file() else None


def adapter_folder(folder: str | Path, name: str) -> Path:
    """Where a model folder keeps the motion ControlNet's LoRA of that name."""
    return Path(folder) / f"{name}{_SUFFIX}"


def adapter_names(folder: str | Path) -> tuple[str, ...]:
    """Names of the motion ControlNet's LoRAs in a model folder, sorted."""
    found = Path(folder).glob(f"*{_SUFFIX}/{WEIGHTS_NAME}")
    return tuple(sorted(path.parent.name.removesuffix(_SUFFIX) for path in found))


def check_controlnets(folder: str | Path, purpose: str) -> None:
    """Makes sure that a model folder has ControlNets.

    Raises:
        ValueError: It is one of text-to-video; `purpose` says what needs them.
    """
    if is_text_to_video(Path(folder)):
        raise ValueError(f"{purpose} needs ControlNets, and {folder} is a text-to-video model, which has none")


def check_adapters(folder: str | Path, names: Collection[str], purpose: str) -> None:
    """Makes sure that a model folder has these LoRAs.

    Raises:
        FileNotFoundError: One is missing; `purpose` says what needs it.
    """
    if missing := set(names) - set(adapter_names(folder)):
        places = " and ".join(str(adapter_folder(folder, name)) for name in sorted(missing))
        raise FileNotFoundError(f"{purpose} needs the {describe_adapters(missing)}, and there is none in {places}")


def read_gate_config(folder: str | Path, name: str) -> dict[str, Any] | None:
    """Settings of a model folder's "object_gates" or "scene_gates"; None = it has none."""
    return _read_part_config(folder, name) if (Path(folder) / name).is_dir() else None


def load_adapters(network: MotionControlNet, folder: str | Path) -> None:
    """Attaches every LoRA of a model folder, in the network's dtype; none is active then."""
    dtype = network.dtype  # looks at every parameter
    for name in adapter_names(folder):
        load_adapter(network, name, adapter_folder(folder, name))
        for parameter in adapter_parameters(network, name).values():
            parameter.data = parameter.data.to(dtype)


def load_gates(
    folder: str | Path, dtype: torch.dtype = torch.float32, names: Collection[str] = tuple(GATES)
) -> dict[str, Any]:
    """Object and scene gates of a model folder by the names of their parts, frozen and in eval mode; None = none.

    Raises:
        ValueError: A file is damaged.
    """
    gates: dict[str, Any] = dict.fromkeys(names)
    for name in names:
        if (Path(folder) / name).is_dir():
            gates[name] = load_network(name, Path(folder) / name, dtype).requires_grad_(False).eval()
    return gates


def save_gates(folder: str | Path, gates: Mapping[str, Any]) -> None:
    """Writes gates, by the names of their parts, into a model folder; None = none."""
    for name, network in gates.items():
        if network is not None:
            network.save_pretrained(Path(folder) / name)


def load_companions(pipe: Any, folder: Path) -> None:
    """Gives a pipeline what diffusers does not read of its folder: LoRAs, gates, the domain adapter, provenance.

    The motion ControlNet is frozen and in eval mode then, and gates lie on the UNet's device. Gates that the pipeline
    has stay.

    Raises:
        ValueError: UNet and ControlNets differ in dtype, or a file is damaged.
    """
    networks = {name: getattr(pipe, name) for name in ("unet", "image_controlnet", "motion_controlnet")}
    dtypes = {name: network.dtype for name, network in networks.items() if network is not None}
    if len(set(dtypes.values())) > 1:
        stated = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
        raise ValueError(f"UNet and ControlNets work in one dtype, got {stated}; load them in the same")
    if pipe.motion_controlnet is not None:
        load_adapters(pipe.motion_controlnet, folder)
        pipe.motion_controlnet.requires_grad_(False).eval()
    missing = [name for name in GATES if getattr(pipe, name) is None]
    for name, network in load_gates(folder, pipe.unet.dtype, missing).items():
        setattr(pipe, name, None if network is None else network.to(pipe.unet.device))
    pipe.domain_adapter = DomainAdapter.load(folder) if DomainAdapter.is_in(folder) else None
    pipe.provenance = read_provenance(folder)
    pipe.lora_folders = {name: folder / name for name in UNET_LORA_FOLDERS if (folder / name).is_dir()}


def write_pipeline_code(folder: Path) -> None:
    """Lets diffusers' own loader read a model folder: writes `pipeline.py` and names it in `model_index.json`."""
    index = folder / "model_index.json"
    config = json.loads(index.read_text(encoding="utf-8"))
    config["_class_name"] = ["pipeline", "ImageConductorPipeline"]
    write_text(folder / "pipeline.py", PIPELINE_CODE)
    write_text(index, json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_shape(folder: str | Path, size: tuple[int, int], num_frames: int | None = None) -> None:
    """Makes sure that a model takes clips of (W, H) pixels and T frames; None = videos, made in windows of any number.

    Raises:
        FileNotFoundError: A part of the folder is missing.
        ValueError: It cannot, or a part of the folder is damaged.
    """
    folder = Networks.check_folder(folder)
    check_video_shape(size, num_frames or 1, read_vae_scale_factor(folder), read_max_frames(folder))


def read_max_frames(folder: str | Path) -> int | None:
    """Frames of a clip that the motion modules take, of a folder that was checked; None = any number."""
    return _read_part_config(folder, "unet").get("motion_max_seq_length")


def read_vae_scale_factor(folder: str | Path) -> int:
    """Pixels along one side of a latent pixel, of a folder that was checked."""
    return 2 ** (len(_read_part_config(folder, "vae")["block_out_channels"]) - 1)


def reads_first_frame(folder: str | Path) -> bool:
    """Whether the UNet of a folder that was checked reads the first frame along displacements; only small ones do."""
    config = _read_part_config(folder, "unet")
    reads_output = config.get("first_frame_warp") and config.get("first_frame_output", True)
    return bool(reads_output or config.get("first_frame_skips"))


def read_latent_channels(folder: str | Path) -> int:
    """Channels of the latents, of a folder that was checked."""
    return _read_part_config(folder, "unet")["in_channels"]


def _read_part_config(folder: str | Path, part: str) -> dict[str, Any]:
    return json.loads((Path(folder) / part / "config.json").read_text(encoding="utf-8"))


def check_video_shape(
    size: tuple[int, int], num_frames: int, vae_scale_factor: int, max_num_frames: int | None
) -> None:
    """Raises ValueError if (W, H) are not multiples of the VAE scale factor, or T is more than motion modules take."""
    width, height = size
    if width % vae_scale_factor or height % vae_scale_factor or min(size) < vae_scale_factor:
        raise ValueError(f"width and height must be multiples of {vae_scale_factor}, got {width} x {height}")
    if num_frames < 1 or (max_num_frames is not None and num_frames > max_num_frames):
        raise ValueError(f"num_frames must be 1..{max_num_frames} for these motion modules, got {num_frames}")


def read_dtype(folder: str | Path) -> torch.dtype:
    """Precision of a model folder's files, by its UNet's."""
    path = find_weights(Path(folder) / "unet")[0][0]
    if path.suffix != ".safetensors":
        return next(iter(read_checkpoint(path).values())).dtype
    with safe_open(path, "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype
