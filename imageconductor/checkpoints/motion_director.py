"""MotionDirector's LoRAs as files: its published lists read, and LoRAs of ours written for other tools.

| written as | layers | read by |
|---|---|---|
| animatediff | motion modules | AnimateDiff (`.ckpt`), its ComfyUI and web UI extensions; `--motion-lora` |
| diffusers | any of the UNet | `load_lora_weights`; `--lora`, `--motion-lora` |
| kohya | spatial transformers | AnimateDiff, ComfyUI, web UIs, diffusers; `--lora` |

`personalise.read_motion_lora` and `read_style_lora` read all of these, and those of MotionDirector's AnimateDiff port.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imageconductor.checkpoints.published import published_name
from imageconductor.files import atomic_path
from imageconductor.models.adapters import lora_targets, plain_layers
from imageconductor.models.lora_files import LoraPair, fit_pair, pair_up, peft_settings
from imageconductor.models.weights import read_tensor_list

Kind = Literal["motion", "appearance"]

_LOG = logging.getLogger(__name__)
_SPATIAL_LAYER = re.compile(r".+\.attentions\..+")
_MOTION_LAYER = {
    "animatediff": re.compile(r".+\.motion_modules\..+"),
    "diffusers": re.compile(r"(?:.+\.motion_modules|.+\.temp_attentions|transformer_in)\..+"),
}


def read_published_list(
    path: str | Path, network: nn.Module, kind: Kind, *, clip: int = 0, num_clips: int = 1
) -> dict[str, LoraPair]:
    """A LoRA that MotionDirector published, by the names of the network's layers; its scale is 1.

    The file is a list [up, down, up, down, ...] without names. With K LoRAs, one for each clip, those of a layer follow
    each other: the up of layer m and clip k is tensor 2 (m K + k). The layers come as the network registers them:
    `transformer_in`, the down blocks, the up blocks and then the mid block; in a block the projections of attention
    (query, key, value, output) and then the feed-forward layers.

    Args:
        path: `N_unet.pt` of `temporal/lora/` ("motion") or `spatial/lora/` ("appearance").
        network: The UNet3DConditionModel of a TextToVideoSDPipeline; its weights are not read.
        kind: The set of layers, see `lora_targets`.
        clip: k.
        num_clips: K; 1 unless each clip was given a spatial LoRA of its own.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The network or the clip is another one, or the file holds another number of tensors, or has tensors
            of other sizes; says what would fit.

    Source: MotionDirector (arXiv 2310.08465), published code.
    """
    if not 0 <= clip < num_clips:
        raise ValueError(f"clip {clip} does not exist: {num_clips} clips count from 0 to {num_clips - 1}")
    layers = _published_order(network, kind)
    tensors = read_tensor_list(path)
    _check_count(len(tensors), network, kind, num_clips, str(path))
    state: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        first = 2 * (number * num_clips + clip)
        state |= {f"{layer}.lora_B.weight": tensors[first], f"{layer}.lora_A.weight": tensors[first + 1]}
    plain = plain_layers(network)
    return {name: fit_pair(pair, plain[name], name, str(path)) for name, pair in pair_up(state, str(path)).items()}


def _published_order(network: nn.Module, kind: Kind) -> list[str]:
    if not hasattr(network, "transformer_in"):
        raise ValueError(
            f"MotionDirector's lists fit a UNet3DConditionModel only, and this network is a {type(network).__name__}"
        )
    return lora_targets(network, kind)


def _check_count(found: int, network: nn.Module, kind: Kind, num_clips: int, source: str) -> None:
    """Makes sure that the list has two tensors for each layer and clip.

    Raises:
        ValueError: It has not; says what the number would fit.
    """
    other: Kind = "appearance" if kind == "motion" else "motion"
    sizes = {each: 2 * len(_published_order(network, each)) for each in (kind, other)}
    if found == sizes[kind] * num_clips:
        return
    if found and found % sizes[kind] == 0:
        advice = f"those of a LoRA for each clip fit with num_clips={found // sizes[kind]}, in Python (docs/weights.md)"
    elif found and found % sizes[other] == 0:
        advice = f"as many as a LoRA for {other} has"
    else:
        advice = "which no number of clips explains: the base is another one, or the file is cut"
    expected = f"{sizes[kind] * num_clips} for the {kind} LoRA of {num_clips} clip{'s' if num_clips > 1 else ''}"
    raise ValueError(f"{source} holds {found} tensors, not {expected}; {advice}")


def export_motion_lora(
    path: str | Path,
    pairs: Mapping[str, LoraPair],
    format: Literal["animatediff", "diffusers"] = "animatediff",
    *,
    attention_only: bool = False,
) -> None:
    """Writes a LoRA of motion modules for other tools.

    AnimateDiff's published MotionLoRAs are on attention layers only, but its loader derives the layer from any key, so
    feed-forward layers act there as well. It knows no alpha: the up matrices are multiplied by alpha / rank.

    Args:
        path: `.safetensors`, or for "animatediff" `.ckpt`, which alone AnimateDiff itself reads.
        pairs: By our names of layers, as `adapter_pairs` and `read_motion_lora(pipe, path)["unet"]` give them.
        format: See the top of this file. "animatediff" has no names for a UNet3DConditionModel.
        attention_only: Leaves the feed-forward layers out, as AnimateDiff's own files do.

    Raises:
        ValueError: A layer is not of a motion module, nothing is left to write, or the format or the suffix is unknown.
    """
    _check_format(format, _MOTION_LAYER)
    if attention_only:
        attention = {layer: pair for layer, pair in pairs.items() if ".ff." not in layer}
        _LOG.info("%s: left out %d feed-forward layers of %d layers", path, len(pairs) - len(attention), len(pairs))
        pairs = attention
    _refuse_other_layers(pairs, _MOTION_LAYER[format], "motion module")
    if format == "diffusers":
        _save_for_diffusers(Path(path), pairs)
        return
    state: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        key = _animatediff_key(layer)
        scale = pair.alpha / pair.rank
        state[f"{key}.down.weight"] = pair.down
        state[f"{key}.up.weight"] = pair.up if scale == 1 else pair.up * scale
    _save(Path(path), state, suffixes=(".safetensors", ".ckpt"))


def export_appearance_lora(
    path: str | Path, pairs: Mapping[str, LoraPair], format: Literal["diffusers", "kohya"] = "diffusers"
) -> None:
    """Writes a LoRA of the spatial transformers for other tools, which then read alpha as well.

    Args:
        path: `.safetensors`.
        pairs: By our names of layers, as `adapter_pairs` and `read_style_lora(pipe, path)["unet"]` give them.
        format: See the top of this file.

    Raises:
        ValueError: A layer is not of a spatial transformer, there is none, or the format or the suffix is unknown.
    """
    _check_format(format, ("diffusers", "kohya"))
    _refuse_other_layers(pairs, _SPATIAL_LAYER, "spatial transformer")
    if format == "diffusers":
        _save_for_diffusers(Path(path), pairs)
        return
    state: dict[str, Tensor] = {}
    alpha: float = peft_settings(pairs)["lora_alpha"]  # one for all: diffusers misses those that differ in this format
    for layer, pair in pairs.items():
        key = f"lora_unet_{layer.replace('.', '_')}"
        up = pair.up if pair.alpha == alpha else pair.up * (pair.alpha / alpha)
        state |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(float(alpha))
    _save(Path(path), state)


def _check_format(format: str, formats: Collection[str]) -> None:
    if format not in formats:
        raise ValueError(f"there is no format {format!r} for these LoRAs, only {' and '.join(formats)}")


def _refuse_other_layers(pairs: Mapping[str, LoraPair], pattern: re.Pattern[str], place: str) -> None:
    if not pairs:
        raise ValueError(f"there is no layer of a {place} to write")
    if others := [layer for layer in pairs if not pattern.fullmatch(layer)]:
        raise ValueError(f"{others[0]} is no layer of a {place}; {len(others)} of {len(pairs)} layers are none")


def _animatediff_key(layer: str) -> str:
    """The key of a layer's pair in AnimateDiff's files: `...attention_blocks.0.processor.to_q_lora`."""
    block, _, name = published_name(layer).removesuffix(".to_out.0").rpartition(".attention_blocks.")
    if not block:
        return f"{published_name(layer)}_lora"
    number, _, projection = name.partition(".")
    return f"{block}.attention_blocks.{number}.processor.{projection or 'to_out'}_lora"


def _save_for_diffusers(path: Path, pairs: Mapping[str, LoraPair]) -> None:
    state: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        state |= {f"unet.{layer}.lora_A.weight": pair.down, f"unet.{layer}.lora_B.weight": pair.up}
    settings = {f"unet.{key}": value for key, value in peft_settings(pairs).items()}
    _save(path, state, {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)})


def _save(
    path: Path,
    state: Mapping[str, Tensor],
    header: Mapping[str, str] | None = None,
    suffixes: tuple[str, ...] = (".safetensors",),
) -> None:
    if path.suffix not in suffixes:
        raise ValueError(f"{path} must end with {' or '.join(suffixes)}, not with {path.suffix or 'no suffix'}")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, {"format": "pt", **(header or {})})
        else:
            # A view would bring the whole of what it is a part of.
            torch.save({key: value.clone() for key, value in tensors.items()}, temporary)
