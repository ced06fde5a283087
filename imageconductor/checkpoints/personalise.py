"""Community weights on a pipeline: DreamBooth single files, style LoRAs, motion LoRAs.

Style and motion LoRAs become diffusers' peft adapters: `set_adapters` and `unload_lora_weights` do what they do there,
and removing one leaves no trace. A DreamBooth file replaces weights for good.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.motion_director import read_published_list
from imageconductor.checkpoints.published import rename_motion_modules
from imageconductor.models.adapters import plain_layers
from imageconductor.models.lora_files import LoraPair, fit_pair, pair_up, peft_settings, read_lora
from imageconductor.models.motion_unet import MotionUNet, TextToVideoUNet
from imageconductor.models.networks import is_text_to_video
from imageconductor.models.weights import check_weights, copy_weights, read_checkpoint, read_names

_LOG = logging.getLogger(__name__)
_LDM_PARTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.")
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
_MOTION = re.compile(r"motion_modules|temp_attentions|transformer_in")
_Fitted = dict[str, dict[str, LoraPair]]  # pairs by network and layer


def load_base(pipe: Any, path: str | Path) -> None:
    """Puts a DreamBooth model, original Stable Diffusion layout, in place of spatial layers, VAE and text encoder.

    The UNet does not hold the domain adapter then, and the provenance names the file.

    Args:
        pipe: An `ImageConductorPipeline`.
        path: `.safetensors`, or `.ckpt`, which is read without running code. What it lacks, a VAE perhaps, stays.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is another architecture, or does not fit; nothing has been changed then.
    """
    check_base(path)
    state = read_checkpoint(path, _LDM_PARTS)
    copies: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor], str]] = []
    try:
        unet = convert_ldm_unet_checkpoint(dict(state), dict(pipe.unet.config))
        target = {key: value for key, value in pipe.unet.state_dict().items() if ".motion_modules." not in key}
        copies.append((target, unet, f"{path}, spatial layers of the UNet"))
        if any(key.startswith(_LDM_PARTS[1]) for key in state):
            vae = convert_ldm_vae_checkpoint(dict(state), dict(pipe.vae.config))
            copies.append((pipe.vae.state_dict(), vae, f"{path}, VAE"))
    except (KeyError, RuntimeError, IndexError) as error:  # a key that diffusers' conversion counts on
        raise ValueError(f"{path} does not fit Stable Diffusion 1.5: {error} is missing") from error
    if any(key.startswith(_LDM_PARTS[2]) for key in state):
        copies.append(_text_encoder(pipe, state, path))
    for weights in copies:  # All must fit before any is changed.
        check_weights(*weights)
    for weights in copies:
        copy_weights(*weights)
    if pipe.domain_adapter is not None:
        pipe.domain_adapter = replace(pipe.domain_adapter, merged_scale=0.0)
    parts = ", ".join(source.removeprefix(f"{path}, ") for *_, source in copies)
    record = json.loads(pipe.provenance.get("sources.json", '{"recipe": {}, "sources": {}}'))
    num_keys = sum(len(values) for _, values, _ in copies)
    record["sources"]["base"] = {"path": f"{path}, in place of: {parts}", "sha256": {}, "keys": num_keys}
    pipe.provenance["sources.json"] = json.dumps(record, indent=1)


def check_base(path: str | Path) -> None:
    """Makes sure that a file is of the kind that `load_base` takes; no weight is read.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is another architecture, a LoRA, or no checkpoint.
    """
    names = read_names(path)
    if any(name.startswith("conditioner.") for name in names):
        raise ValueError(f"{path} is a Stable Diffusion XL model; this pipeline stands on Stable Diffusion 1.5")
    if any(name.startswith(_LDM_PARTS[0]) for name in names):
        return
    if any("lora" in name for name in names):
        raise ValueError(f"{path} is a LoRA and no base model; give it as lora (--lora), with its scale")
    raise ValueError(f"{path} is no Stable Diffusion single file: no key begins with {_LDM_PARTS[0]}")


def _text_encoder(pipe: Any, state: Mapping[str, Tensor], path: str | Path) -> tuple[Any, Any, str]:
    """Text weights under the names of the transformers version at hand, with and without `text_model.`.

    What some tools write along of the rest of CLIP, its projection, say, is left out.
    """
    target = pipe.text_encoder.state_dict()
    converted = {k: v for k, v in convert_ldm_clip_checkpoint(dict(state)).items() if not k.endswith("position_ids")}
    others = sorted(key for key in converted if not key.startswith("text_model.") and key not in target)
    if others:
        _LOG.info("%s: %s of the text encoder is left out, which the model does not have", path, ", ".join(others))
        converted = {key: value for key, value in converted.items() if key not in others}
    if not any(key.startswith("text_model.") for key in target):
        converted = {key.removeprefix("text_model."): value for key, value in converted.items()}
    return target, converted, f"{path}, text encoder"


def load_style_lora(pipe: Any, path: str | Path, name: str) -> None:
    """Attaches a LoRA of the UNet, the text encoder or both, in kohya's, diffusers' or peft's format, as `name`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is of another kind, names layers that the model does not have, or of another width, or the name
            is taken; nothing has been changed then.
    """
    _attach(pipe, read_style_lora(pipe, path), name)


def load_motion_lora(pipe: Any, path: str | Path, name: str) -> None:
    """Attaches a LoRA of AnimateDiff's motion modules, in the original or any of those formats, as adapter `name`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: As `load_style_lora`, or it names no motion module.
    """
    _attach(pipe, read_motion_lora(pipe, path), name)


def read_style_lora(pipe: Any, path: str | Path) -> _Fitted:
    """The pairs of `load_style_lora`, checked against the model and not attached."""
    if _is_published_list(pipe, path):
        return {"unet": read_published_list(path, pipe.unet, "appearance")}
    return _fit(pipe, read_lora(path), str(path))


def read_motion_lora(pipe: Any, path: str | Path) -> _Fitted:
    """The pairs of `load_motion_lora`, checked against the model and not attached."""
    if _is_published_list(pipe, path):
        return {"unet": read_published_list(path, pipe.unet, "motion")}
    pairs = read_lora(path)
    if not any(_MOTION.search(name) for name in pairs):
        raise ValueError(f"{path} is no motion LoRA: none of its {len(pairs)} layers is of a motion module")
    return _fit(pipe, pairs, str(path))


def _is_published_list(pipe: Any, path: str | Path) -> bool:
    """Whether a LoRA is one of MotionDirector's own files, a list for a text-to-video UNet."""
    return Path(path).suffix == ".pt" and isinstance(pipe.unet, TextToVideoUNet)


def networks_without_weights(folder: Path) -> Any:
    """UNet and text encoder of a model folder on the meta device, which are all that `read_style_lora` looks at."""
    unet: Any = TextToVideoUNet if is_text_to_video(folder) else MotionUNet
    with torch.device("meta"):
        return SimpleNamespace(
            unet=unet.from_config(unet.load_config(folder / "unet")),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
        )


def check_loras(folder: Path, loras: Sequence[str], motion_loras: Sequence[str]) -> None:
    """Makes sure that style and motion LoRAs fit the model of a folder; none of its weights is read.

    Raises:
        FileNotFoundError, ValueError: As `load_style_lora` and `load_motion_lora`.
    """
    if not loras and not motion_loras:
        return
    networks = networks_without_weights(folder)
    for read, paths in ((read_style_lora, loras), (read_motion_lora, motion_loras)):
        for path in paths:
            read(networks, path)


def _fit(pipe: Any, pairs: Mapping[str, LoraPair], source: str) -> _Fitted:
    """The pairs by network and layer of the model, in its shapes.

    Raises:
        ValueError: The model lacks a layer, or has it in another size.
    """
    layers = {"unet": plain_layers(pipe.unet), "text_encoder": plain_layers(pipe.text_encoder)}
    flat = {network: {name.replace(".", "_"): name for name in names} for network, names in layers.items()}
    fitted: _Fitted = {}
    for name, pair in pairs.items():
        network, layer = _find_layer(name, layers, flat, source)
        fitted.setdefault(network, {})[layer] = fit_pair(pair, layers[network][layer], layer, source)
    return fitted


def _find_layer(
    name: str, layers: Mapping[str, Mapping[str, nn.Module]], flat: Mapping[str, Mapping[str, str]], source: str
) -> tuple[str, str]:
    """Network and layer of a name in kohya's, diffusers', peft's or AnimateDiff's way of writing."""
    if prefix := next((prefix for prefix in _KOHYA if name.startswith(prefix)), None):
        network, short = _KOHYA[prefix], name.removeprefix(prefix)
        for spelling in (short, short.removeprefix("text_model_"), f"text_model_{short}"):
            if spelling in flat[network]:
                return network, flat[network][spelling]
    else:
        stated, _, rest = name.partition(".")
        for network in [stated] if stated in layers else layers:
            layer = rest if stated in layers else name
            layer = layer.replace(".processor.", ".")
            layer = layer + ".0" if layer.endswith(".to_out") else layer
            if network == "unet":
                spellings = (rename_motion_modules(layer + ".").removesuffix("."),)
            else:
                for ours, theirs in _TEXT_NAMES.items():
                    layer = layer.replace(f".self_attn.{ours}", f".self_attn.{theirs}")
                spellings = (layer, layer.removeprefix("text_model."), f"text_model.{layer}")
            if found := next((spelling for spelling in spellings if spelling in layers[network]), None):
                return network, found
    if "mid_block" in name and "motion_modules" in name:
        raise ValueError(
            f"{source} is a LoRA for motion modules with a mid block, as AnimateDiff v2's; v3 has none, nor has this "
            f"model ({name})"
        )
    raise ValueError(f"{source} is for another base: this model has no layer {name}")


def _attach(pipe: Any, fitted: _Fitted, name: str) -> None:
    """Attaches pairs that fit, through diffusers' and transformers' loaders.

    Raises:
        ValueError: The name is taken.
    """
    if any(name in names for names in pipe.get_list_adapters().values()):
        raise ValueError(f"a LoRA called {name} is attached already")
    loaders = {"unet": pipe.load_lora_into_unet, "text_encoder": pipe.load_lora_into_text_encoder}
    for network, pairs in fitted.items():
        state = {f"{network}.{layer}.lora_A.weight": pair.down for layer, pair in pairs.items()}
        state |= {f"{network}.{layer}.lora_B.weight": pair.up for layer, pair in pairs.items()}
        settings = {f"{network}.{key}": value for key, value in peft_settings(pairs).items()}
        parts = {network: getattr(pipe, network), "adapter_name": name, "metadata": settings, "_pipeline": pipe}
        loaders[network](state, network_alphas=None, **parts)


def personalise(
    pipe: Any,
    base: str | None,
    loras: Sequence[tuple[str, float]],
    motion_loras: Sequence[tuple[str, float]],
    domain_adapter_scale: float | None = None,
) -> None:
    """What `sample.py --base --lora --motion-lora --domain-adapter-scale` ask for; a LoRA is a file and its scale.

    Raises:
        FileNotFoundError, ValueError: As the loaders above; nothing has been changed then.
    """
    fitted: dict[str, tuple[_Fitted, float]] = {}  # all are checked before any changes the model
    for kind, read, files in (("style", read_style_lora, loras), ("motion", read_motion_lora, motion_loras)):
        for number, (path, scale) in enumerate(files):
            fitted[f"{kind}{number}"] = read(pipe, path), scale
    if domain_adapter_scale is not None:
        adapter: DomainAdapter = pipe.domain_adapter
        # A DreamBooth file replaces the weights that hold it.
        merged = adapter.merged_scale if base is None else 0.0
        pairs = _fit(pipe, pair_up(adapter.state, adapter.source), adapter.source)
        fitted["domain"] = pairs, domain_adapter_scale - merged
    if base is not None:
        load_base(pipe, base)
    for name, (pairs, _) in fitted.items():
        _attach(pipe, pairs, name)
    if fitted:
        pipe.set_adapters(list(fitted), [scale for _, scale in fitted.values()])


def fold_loras(pipe: Any) -> None:
    """Makes attached LoRAs part of the weights, so that no evaluation has to compute their products.

    A model with them is not saved: what loads it would add its few-step LoRA, say, a second time.
    """
    pipe.folded = sorted({name for names in pipe.get_list_adapters().values() for name in names})
    if networks := list(pipe.get_list_adapters()):
        pipe.fuse_lora(components=networks)
        pipe.unload_lora_weights()
