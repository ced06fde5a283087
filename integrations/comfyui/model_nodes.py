"""The node that loads a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, cast, get_args

from imageconductor.checkpoints.model_folder import locate_model
from imageconductor.files import find_shipped
from imageconductor.sampling.job import SampleJob, load_pipeline
from imageconductor.sampling.loras import parse_lora
from imageconductor.sampling.pipeline import ImageConductorPipeline

from . import host

_BY_NAME = "as named above"
_AUTO = "auto"
_OFFLOADS = Literal["none", "model", "sequential"]
_NUM_BYTES = 8e9  # of weights and a video of 384x256 in half precision (docs/memory.md)


class LoadModel:
    """A pipeline with its base and LoRAs, on ComfyUI's device."""

    CATEGORY = host.CATEGORY
    DESCRIPTION = "Loads a model folder of Image Conductor, with a DreamBooth base and style LoRAs."
    RETURN_TYPES = (host.MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs in ComfyUI's form."""
        text = {"default": ""}
        return {
            "required": {
                "model": (
                    "STRING",
                    {"default": "models/sprites", "tooltip": "Model folder, or organisation/name on the hub."},
                ),
                "installed": (
                    [_BY_NAME, *host.list_model_folders()],
                    {"tooltip": f"A folder under ComfyUI's models/{host.MODELS_FOLDER}, in place of the name above."},
                ),
                "base": (
                    "STRING",
                    {**text, "tooltip": "DreamBooth checkpoint: a path, or a name in models/checkpoints. Empty: none."},
                ),
                "loras": (
                    "STRING",
                    {
                        **text,
                        "multiline": True,
                        "tooltip": "Style LoRAs, a line each: FILE or FILE:SCALE, a path or a name in models/loras.",
                    },
                ),
                "dtype": (
                    [_AUTO, "float32", "float16", "bfloat16"],
                    {"tooltip": "auto: float16 on CUDA, else float32."},
                ),
            },
            "optional": {  # with defaults in `load`, so that workflows without them still run
                "offload": (
                    list(get_args(_OFFLOADS)),
                    {
                        "tooltip": "What waits in main memory. none: nothing. model: networks, a little slower. "
                        "sequential: layers, many times slower. A GPU is needed."
                    },
                ),
                "vae_tiling": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Decode in tiles of 512 pixels; large frames take less memory."},
                ),
                "motion_loras": (
                    "STRING",
                    {
                        **text,
                        "multiline": True,
                        "tooltip": "LoRAs of the motion modules, or motion_director runs, a line each: FILE or "
                        "FILE:SCALE, a path or a name in models/loras.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, base: str | None = None, loras: str | None = None, motion_loras: str | None = None
    ) -> bool | str:
        """True, or what is wrong with the files; inputs that come from other nodes are None."""
        try:
            _find_files(base or "", loras or "", motion_loras or "")
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(
        cls,
        model: str | None = None,
        installed: str = _BY_NAME,
        base: str | None = None,
        loras: str | None = None,
        motion_loras: str | None = None,
        **_: Any,
    ) -> str:
        """A text that changes when a file of the model, the base or a LoRA does, so that ComfyUI loads them anew."""
        try:
            found, styles, motions = _find_files(base or "", loras or "", motion_loras or "")
        except (ValueError, FileNotFoundError):
            return ""  # Loading says what is wrong.
        folder = find_shipped(host.list_model_folders().get(installed, model or ""))
        inside = folder.rglob("*") if (folder / "model_index.json").is_file() else ()
        given = [Path(path) for path in (found, *(parse_lora(text)[0] for text in styles + motions)) if path]
        paths = [path for one in given for path in ([one] if one.is_file() else one.rglob("*"))]
        files = sorted(path for path in {*paths, *inside} if path.is_file())
        stated = [(str(path), stat.st_mtime_ns, stat.st_size) for path in files for stat in [path.stat()]]
        return hashlib.sha256(repr(stated).encode()).hexdigest()

    def load(
        self,
        model: str,
        installed: str,
        base: str,
        loras: str,
        dtype: str,
        offload: _OFFLOADS = "none",
        vae_tiling: bool = False,
        motion_loras: str = "",
    ) -> tuple[ImageConductorPipeline]:
        """The pipeline.

        Args:
            model: Model folder, or "organisation/name" on the hub.
            installed: Name among `host.list_model_folders`, which wins, or `_BY_NAME`.
            base: Checkpoint file; "" = none.
            loras: A line each, FILE or FILE:SCALE.
            dtype: "auto" or a name of torch's.
            offload: As of `SampleJob`.
            vae_tiling: As of `SampleJob`.
            motion_loras: As `loras`, of the motion modules.

        Raises:
            ValueError, FileNotFoundError: A file or folder is missing or does not fit, or there is no GPU to offload
                from.
        """
        found, styles, motions = _find_files(base, loras, motion_loras)
        folders = host.list_model_folders()
        if installed != _BY_NAME and installed not in folders:
            raise FileNotFoundError(f"no model folder {installed} under ComfyUI's models/{host.MODELS_FOLDER}")
        device = host.choose_device()
        if offload == "none":
            host.make_room(_NUM_BYTES)
        elif device == "cpu":
            raise ValueError(f"offload {offload!r} keeps networks off the GPU, and the device is cpu; choose none")
        job = SampleJob(
            model=str(folders[installed] if installed != _BY_NAME else locate_model(model)),
            base=found,
            lora=styles,
            motion_lora=motions,
            device=device,
            dtype=cast(Any, dtype if dtype != _AUTO else "float16" if device.startswith("cuda") else "float32"),
            offload=offload,
            vae_tiling=vae_tiling,
        )
        return (load_pipeline(job),)


def _find_files(base: str, loras: str, motion_loras: str) -> tuple[str | None, list[str], list[str]]:
    """The base and, as FILE:SCALE, the LoRAs that three inputs name.

    Raises:
        ValueError: A scale is no finite number.
        FileNotFoundError: There is no such file.
    """
    found = host.find_weights_file(base.strip(), "checkpoints") if base.strip() else None
    return found, _find_loras(loras), _find_loras(motion_loras)


def _find_loras(text: str) -> list[str]:
    named = [parse_lora(line.strip()) for line in text.splitlines() if line.strip()]
    return [f"{host.find_weights_file(name, 'loras')}:{scale}" for name, scale in named]
