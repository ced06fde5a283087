"""The folder of a `motion_director` run, or of a checkpoint in it, as sampling reads it.

motion_lora/           LoRA of the motion modules, pytorch_lora_weights.safetensors as diffusers writes it
appearance_lora/       LoRA of the spatial layers, or a folder KEY/ with one for each reference clip
noise_prior.safetensors   inverted noise of the clips by their keys, where the run was to store it
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imageconductor import config as config_file
from imageconductor.checkpoints.motion_director import Kind
from imageconductor.files import atomic_path
from imageconductor.models.adapters import DIFFUSERS_WEIGHTS_NAME
from imageconductor.models.lora_files import FOLDER_NAMES
from imageconductor.models.weights import check_weight_file, find_non_finite, read_checkpoint, read_header

NOISE_PRIOR_NAME = "noise_prior.safetensors"


def find_reference_lora(path: Path, kind: Kind) -> Path:
    """A LoRA file or folder as it is; of a run folder, or a checkpoint in it, its motion or appearance LoRA.

    Raises:
        FileNotFoundError: There is nothing, or a run without such a LoRA.
        ValueError: The run has an appearance LoRA for each clip; names them.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}")
    part = path / f"{kind}_lora"
    if (part / DIFFUSERS_WEIGHTS_NAME).is_file():
        return part
    is_run = (path / "config.yaml").is_file() or (path / "state.json").is_file()
    if path.is_file() or (any((path / name).is_file() for name in FOLDER_NAMES) and not is_run):
        return path
    if own := sorted(folder.parent.name for folder in part.glob(f"*/{DIFFUSERS_WEIGHTS_NAME}")):
        raise ValueError(f"{path} has an appearance LoRA for each clip; choose one, e.g. {part / own[0]}")
    checkpoints = sorted(path.glob(f"checkpoint-*/{kind}_lora"))
    advice = f"; of a run that has not ended, name a checkpoint, {checkpoints[-1].parent}" if checkpoints else ""
    raise FileNotFoundError(f"{path} holds no {kind} LoRA: {part / DIFFUSERS_WEIGHTS_NAME} is missing{advice}")


def read_num_frames(path: Path) -> int | None:
    """Frames of the windows that a run learned from; None of what is no run's.

    Args:
        path: Of the run's folder, or of a checkpoint or a LoRA in it.
    """
    for folder in (path, *path.absolute().parents[:2]):
        settings = config_file.read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
        if settings.get("stage") == "motion_director":
            return settings.get("num_frames")
    return None


def has_noise_prior(run: Path, source: str) -> bool:
    """Whether a run has stored the inverted noise that `source` describes, in a file that can be read."""
    path = run / NOISE_PRIOR_NAME
    if not path.is_file():
        return False
    try:
        check_weight_file(path)
    except ValueError:
        return False
    return read_header(path).get("source") == source


def save_noise_prior(run: Path, inverted: Mapping[str, Tensor], source: str) -> None:
    """Writes inverted noise, (C, T, h, w) for each clip by its key, and what it was made from.

    Raises:
        ValueError: Noise is not finite; names the clip.
    """
    if (key := find_non_finite(inverted)) is not None:
        raise ValueError(
            f"the inversion of clip {key} gave nan or infinite values; try mixed_precision=bf16 or no, or other "
            "inversion_steps"
        )
    tensors = {key: value.cpu().contiguous() for key, value in inverted.items()}
    with atomic_path(run / NOISE_PRIOR_NAME) as path:
        save_file(tensors, path, metadata={"format": "pt", "source": source})


def load_noise_prior(run: Path) -> dict[str, Tensor]:
    """Inverted noise (C, T, h, w) of a run's clips by their keys.

    Raises:
        FileNotFoundError: The run has stored none.
        ValueError: The file is damaged.
    """
    _check_noise_prior(run)
    return read_checkpoint(run / NOISE_PRIOR_NAME)


def check_noise_prior(run: Path, channels: int, num_frames: int) -> None:
    """Makes sure, by the file's header, that a run's noise fits videos of C latent channels and T frames.

    Raises:
        FileNotFoundError: The run has stored none.
        ValueError: It is damaged, or of another number of channels or frames.
    """
    _check_noise_prior(run)
    with safe_open(run / NOISE_PRIOR_NAME, "pt") as file:
        for key in file.keys():  # noqa: SIM118  not a mapping
            shape = file.get_slice(key).get_shape()
            if len(shape) != 4:
                raise ValueError(f"{run / NOISE_PRIOR_NAME} holds no noise of clips: {key} has the shape {shape}")
            if tuple(shape[:2]) != (channels, num_frames):
                raise ValueError(
                    f"the noise prior of {run} has {shape[0]} channels and {shape[1]} frames, the video's latents have "
                    f"{channels} and {num_frames}; set num_frames, or leave the prior out"
                )


def _check_noise_prior(run: Path) -> None:
    if not run.is_dir():
        raise FileNotFoundError(f"no run folder at {run}")
    if not (run / NOISE_PRIOR_NAME).is_file():
        raise FileNotFoundError(f"{run} holds no noise prior; a run with noise_prior=0.3, say, stores one")
    check_weight_file(run / NOISE_PRIOR_NAME)
