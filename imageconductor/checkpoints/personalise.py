"""Community weights on a pipeline: DreamBooth single files, style LoRAs, motion LoRAs.

Style and motion LoRAs become diffusers' peft adapters: `set_adapters` and `unload_lora_weights` do what they do there,
and removing one leaves no trace. A DreamBooth file replaces weights for good.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.published import rename_motion_modules
from imageconductor.models.weights import copy_weights, read_checkpoint

_LDM_PARTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.")
_PROCESSOR_KEY = re.compile(
    r"^(?:unet\.)?(?P<layer>.+?)(?:\.processor)?\.(?P<name>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight$"
)
_LORA_KEY = re.compile(
    r"^(?P<model>unet|text_encoder)\.(?P<layer>.+?)\.(lora(_linear_layer)?\.)?(?P<side>down|up|lora_A|lora_B)\.weight$"
)


_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}


def load_base(pipe: Any, path: str | Path) -> None:
    """Puts a DreamBooth model, original Stable Diffusion layout, in place of spatial layers, VAE and text encoder.

    Args:
        pipe: An `ImageConductorPipeline`.
        path: `.safetensors`, or `.ckpt`, which is read without running code. What it lacks, a VAE perhaps, stays.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is another architecture, or does not fit; nothing has been changed then.
    """
    state = read_checkpoint(path)
    if any(key.startswith("conditioner.") for key in state):
        raise ValueError(f"{path} is a Stable Diffusion XL model; this pipeline stands on Stable Diffusion 1.5")
    if not any(key.startswith(_LDM_PARTS[0]) for key in state):
        raise ValueError(f"{path} is no Stable Diffusion single file: no key begins with {_LDM_PARTS[0]}")
    copies: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor], str]] = []
    try:
        unet = convert_ldm_unet_checkpoint(dict(state), dict(pipe.unet.config))
        target = {key: value for key, value in pipe.unet.state_dict().items() if ".motion_modules." not in key}
        copies.append((target, unet, f"{path}, UNet"))
        if any(key.startswith(_LDM_PARTS[1]) for key in state):
            vae = convert_ldm_vae_checkpoint(dict(state), dict(pipe.vae.config))
            copies.append((pipe.vae.state_dict(), vae, f"{path}, VAE"))
    except (KeyError, RuntimeError, IndexError) as error:  # a key that diffusers' conversion counts on
        raise ValueError(f"{path} does not fit Stable Diffusion 1.5: {error} is missing") from error
    if any(key.startswith(_LDM_PARTS[2]) for key in state):
        copies.append(_text_encoder(pipe, state, path))
    for target, values, _ in copies:  # All must fit before any is changed.
        copy_weights({key: torch.empty_like(value, device="meta") for key, value in target.items()}, values, str(path))
    for target, values, source in copies:
        copy_weights(target, values, source)


def _text_encoder(pipe: Any, state: Mapping[str, Tensor], path: str | Path) -> tuple[Any, Any, str]:
    """Text weights under the names of the transformers version at hand, with and without `text_model.`."""
    target = pipe.text_encoder.state_dict()
    converted = {k: v for k, v in convert_ldm_clip_checkpoint(dict(state)).items() if not k.endswith("position_ids")}
    if not any(key.startswith("text_model.") for key in target):
        converted = {key.removeprefix("text_model."): value for key, value in converted.items()}
    return target, converted, f"{path}, text encoder"


def load_style_lora(pipe: Any, path: str | Path, name: str) -> None:
    """Attaches a LoRA of the UNet and perhaps the text encoder, in kohya's or diffusers' format, as adapter `name`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It names layers that the model does not have, or of another width; nothing has been changed then.
    """
    attach_lora(pipe, read_checkpoint(path), name, str(path))


def load_motion_lora(pipe: Any, path: str | Path, name: str) -> None:
    """Attaches a LoRA of AnimateDiff's motion modules, in the original or diffusers' format, as adapter `name`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It does not fit the motion modules.
    """
    state = read_checkpoint(path)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := _PROCESSOR_KEY.match(key):
            layer = rename_motion_modules(match["layer"] + ".").removesuffix(".")
            projection = "to_out.0" if match["name"] == "to_out" else match["name"]
            key = f"unet.{layer}.{projection}.lora_{'A' if match['side'] == 'down' else 'B'}.weight"
        renamed[key] = value
    if not any(".motion_modules." in key for key in renamed):
        raise ValueError(f"{path} is no motion LoRA: none of its {len(state)} keys names a motion module")
    attach_lora(pipe, renamed, name, str(path))


def attach_lora(pipe: Any, state: dict[str, Tensor], name: str, source: str) -> None:
    """Checks a LoRA against the model and loads it through diffusers.

    Raises:
        ValueError: It does not fit; names the file, what was expected and what was found.
    """
    try:
        converted = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(state))[0]
    except Exception as error:  # diffusers' converters raise many types for a file they do not know.
        raise ValueError(f"{source} is no LoRA for Stable Diffusion 1.5: {error}") from error
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    fitting = 0
    for key, value in converted.items():
        if key.endswith(".alpha"):
            continue
        match = _LORA_KEY.match(key)
        if not match:
            raise ValueError(f"{source}: {key} is no LoRA weight of the UNet or the text encoder")
        layer = match["layer"].replace(".processor.", ".").removesuffix("_lora")
        layer = layer + ".0" if layer.endswith(".to_out") else layer
        if match["model"] == "text_encoder":
            for ours, theirs in _TEXT_NAMES.items():
                layer = layer.replace(f".self_attn.{ours}", f".self_attn.{theirs}")
        _check_layer(networks[match["model"]], layer, match["side"], value, source)
        fitting += 1
    if not fitting:
        raise ValueError(f"{source} holds no LoRA weight; found {', '.join(list(state)[:3])}")
    pipe.load_lora_weights(dict(state), adapter_name=name)


def _check_layer(network: Any, layer: str, side: str, value: Tensor, source: str) -> None:
    for name in (layer, layer.removeprefix("text_model."), f"text_model.{layer}"):
        try:
            module = network.get_submodule(name)
        except AttributeError:
            continue
        weight = getattr(module, "base_layer", module).weight
        axis = 1 if side in ("down", "lora_A") else 0
        if value.shape[axis] != weight.shape[axis]:
            raise ValueError(
                f"{source} is for another base: {layer} is {tuple(weight.shape[:2])} here, and its LoRA's {side} is "
                f"{tuple(value.shape)}"
            )
        return
    raise ValueError(f"{source} is for another base: this model has no layer {layer}")


def personalise(
    pipe: Any,
    base: str | None,
    loras: Sequence[tuple[str, float]],
    motion_loras: Sequence[tuple[str, float]],
    domain_adapter_scale: float | None = None,
) -> None:
    """What `sample.py --base --lora --motion-lora --domain-adapter-scale` ask for; a LoRA is a file and its scale.

    Raises:
        FileNotFoundError, ValueError: As the loaders above.
    """
    if base is not None:
        load_base(pipe, base)
    scales: dict[str, float] = {}
    for kind, load, files in (("style", load_style_lora, loras), ("motion", load_motion_lora, motion_loras)):
        for number, (path, scale) in enumerate(files):
            load(pipe, path, f"{kind}{number}")
            scales[f"{kind}{number}"] = scale
    if domain_adapter_scale is not None:
        adapter: DomainAdapter = pipe.domain_adapter
        # A DreamBooth file has replaced the weights that held it.
        merged = adapter.merged_scale if base is None else 0.0
        attach_lora(pipe, adapter.state, "domain", adapter.source)
        scales["domain"] = domain_adapter_scale - merged
    if scales:
        pipe.set_adapters(list(scales), list(scales.values()))
