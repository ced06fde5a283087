"""LoRA files of many tools: pairs of matrices by layer, each with the alpha at which it was trained.

A pair adds alpha / r * up @ down to its layer's weight. Every format keeps alpha elsewhere: kohya's in a tensor beside
the pair or in the file's header, diffusers' in the header, peft's in `adapter_config.json` beside the file. Where none
is kept, alpha is r. What is more than pairs cannot be applied exactly and is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from imageconductor.files import read_text
from imageconductor.models.weights import read_checkpoint, read_header

PEFT_PREFIX = "base_model.model."  # of peft's own files
CONFIG_NAME = "adapter_config.json"
FOLDER_NAMES = tuple(  # of the weights in a folder of peft's or diffusers'
    f"{stem}.{suffix}" for stem in ("adapter_model", "pytorch_lora_weights") for suffix in ("safetensors", "bin")
)
_LORA = r"(?:[._]lora(?:_linear_layer|_layer)?)?"
_WEIGHT = re.compile(rf"^(?P<layer>.+?){_LORA}\.(?P<side>down|up|lora_down|lora_up|lora_A|lora_B)(\.[^.]+)?\.weight$")
_ALPHA = re.compile(rf"^(?P<layer>.+?){_LORA}\.alpha$")
_KINDS = {  # by what only their keys contain
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "OFT": r"\.b?oft_",
    "(IA)3": r"\.on_input$|\.ia3_l$",
    "GLoRA": r"\.[ab][12]\.weight$",
    "VeRA": r"vera_lambda",
    "LoCon with a Tucker core": r"\.lora_mid\.",
    "LoRA with biases": r"\.(lora_B|lora_up)(\.[^.]+)?\.bias$",
    "full difference of weights": r"\.diff(_b)?$|\.[wb]_norm$",
    "LoRA with embeddings": r"^bundle_emb\.|\.lora_embedding_",
}
_SETTINGS = {  # of peft, under which a pair is not all
    "use_dora": "DoRA",
    "lora_bias": "LoRA with biases",
    "modules_to_save": "LoRA with whole layers",
    "layer_replication": "LoRA with repeated layers",
    "trainable_token_indices": "LoRA with embeddings",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations that take something out of the base weights


@dataclass(frozen=True)
class LoraPair:
    """What a LoRA adds to one layer.

    Attributes:
        down: A, (r, in) or (r, in, height, width).
        up: B, (out, r) or (out, r, 1, 1).
        alpha: The layer's weight grows by alpha / r * B A.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The rank, r."""
        return self.down.shape[0]


@dataclass(frozen=True)
class _Strength:
    """The alpha that a header or a config states for a network, as peft's settings do; None = r."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha of a layer, such that its scale is alpha / rank also where peft divides by the root of the rank."""
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer), self.alpha)
        if alpha is None:
            return rank
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def read_lora(path: str | Path) -> dict[str, LoraPair]:
    """The pairs of a LoRA file, or of a folder of peft's or diffusers', under the names that the file gives to layers.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no LoRA, one of another kind, or has no counterpart to a tensor; names the file.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_NAMES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds no LoRA; looked for {', '.join(FOLDER_NAMES)}")
        path = found[0]
    state = read_checkpoint(path)
    return pair_up(state, str(path), _read_strengths(path, state))


def pair_up(
    state: Mapping[str, Tensor], source: str, strengths: Mapping[str, _Strength] | None = None
) -> dict[str, LoraPair]:
    """The pairs of a state dict by the layers' names; without alphas and `strengths` alpha is r.

    Raises:
        ValueError: As `read_lora`.
    """
    for kind, pattern in _KINDS.items():
        if key := next((key for key in state if re.search(pattern, key)), None):
            raise ValueError(f"{source} is a {kind}, which is not supported, only LoRA is; it has {key}")
    sides: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}, "alpha": {}}
    for key, value in state.items():
        match = _WEIGHT.match(key) or _ALPHA.match(key)
        if not match:
            raise ValueError(f"{source}: {key} is no LoRA weight")
        side = {"lora_A": "down", "lora_B": "up"}.get(match["side"], match["side"]) if match.re is _WEIGHT else "alpha"
        sides[side.removeprefix("lora_")][match["layer"].removeprefix(PEFT_PREFIX)] = value
    for side, other in (("down", "up"), ("up", "down"), ("alpha", "down")):
        if alone := sorted(sides[side].keys() - sides[other].keys()):
            raise ValueError(f"{source} is damaged: {alone[0]} has a LoRA {side} and no {other}")
    if not sides["down"]:
        raise ValueError(f"{source} holds no LoRA weight; found {', '.join(list(state)[:3]) or 'nothing'}")
    pairs = {}
    for layer, down in sides["down"].items():
        network, _, name = layer.partition(".")
        strength = (strengths or {}).get(network)
        if strength is None:
            strength, name = (strengths or {}).get("", _Strength()), layer
        if down.ndim < 2 or sides["up"][layer].shape[1:2] != down.shape[:1]:
            shapes = f"{tuple(down.shape)} and {tuple(sides['up'][layer].shape)}"
            raise ValueError(f"{source} is damaged: expected one LoRA rank, found those of {shapes} in {layer}")
        alpha = sides["alpha"].get(layer)
        value = strength.alpha_of(name, down.shape[0]) if alpha is None else float(alpha)
        pairs[layer] = LoraPair(down, sides["up"][layer], value)
    return pairs


def fit_pair(pair: LoraPair, layer: nn.Module, name: str, source: str) -> LoraPair:
    """The pair in the shape that the layer wants; 1x1 convolutions and matrices stand for each other.

    Raises:
        ValueError: It is for a layer of another size.
    """
    weight: Tensor = getattr(layer, "base_layer", layer).weight  # pyright: ignore[reportAssignmentType]
    one = (1,) * (weight.ndim - 2)
    for side, wanted in (
        ("down", (pair.rank, *weight.shape[1:])),
        ("up", (weight.shape[0], pair.rank, *one)),
    ):
        found: Tensor = getattr(pair, side)
        is_same = found.shape[:2] == wanted[:2] and found.numel() == math.prod(wanted)
        if not is_same or (found.ndim == weight.ndim and tuple(found.shape) != wanted):
            key = f"{name}.lora_{'A' if side == 'down' else 'B'}.weight"
            raise ValueError(f"{source} is for another base: {key} is {tuple(found.shape)}, here it must be {wanted}")
        pair = replace(pair, **{side: found.reshape(wanted)})
    return pair


def peft_settings(pairs: Mapping[str, LoraPair]) -> dict[str, Any]:
    """The fields of peft's `LoraConfig` for the pairs of one network, whose ranks and alphas may differ."""
    values = {"rank": {name: pair.rank for name, pair in pairs.items()}}
    values["alpha"] = {name: _whole(pair.alpha) for name, pair in pairs.items()}  # type: ignore[assignment]
    common = {what: Counter(by_layer.values()).most_common(1)[0][0] for what, by_layer in values.items()}
    patterns = {
        f"{what}_pattern": {f"^{re.escape(name)}": value for name, value in by_layer.items() if value != common[what]}
        for what, by_layer in values.items()
    }
    return {"r": common["rank"], "lora_alpha": common["alpha"], "target_modules": list(pairs), **patterns}


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _read_strengths(path: Path, state: Mapping[str, Tensor]) -> dict[str, _Strength]:
    """What is stated outside of the tensors: by network, "" for all of them."""
    header = read_header(path)
    try:
        if text := header.get("lora_adapter_metadata"):
            return _diffusers_strengths(json.loads(text), str(path))
        if any(key.startswith(PEFT_PREFIX) for key in state):
            config = path.parent / CONFIG_NAME
            if not config.is_file():
                raise ValueError(f"{path} keeps its strength in {CONFIG_NAME}, which is not beside it")
            return {"": _strength(json.loads(read_text(config)), str(path))}
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: its settings cannot be read: {error}") from error
    try:
        return {"": _Strength(float(header["ss_network_alpha"]))}
    except (KeyError, ValueError):  # kohya writes "None" where no alpha was given.
        return {}


def _diffusers_strengths(settings: Mapping[str, Any], source: str) -> dict[str, _Strength]:
    """Settings under `unet.` and `text_encoder.`, or of one network without a prefix."""
    by_network: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        network, dot, name = key.partition(".")
        by_network.setdefault(network if dot else "", {})[name if dot else key] = value
    return {network: _strength(config, source) for network, config in by_network.items()}


def _strength(config: Mapping[str, Any], source: str) -> _Strength:
    """The strength in peft's settings of one network; refuses those under which pairs are not all."""
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ValueError(f"{source} is a {kind} adapter, which is not supported, only LoRA is")
    found = [name for key, name in _SETTINGS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append("LoRA with biases")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        found.append(f"{start} LoRA, whose base has other weights,")
    if found:
        raise ValueError(f"{source} is a {found[0]}, which is not supported, only plain LoRA is")
    alpha = config.get("lora_alpha")
    try:
        pattern = {key: float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
        return _Strength(None if alpha is None else float(alpha), pattern, bool(config.get("use_rslora")))
    except ValueError as error:
        raise ValueError(f"{source}: its settings cannot be read: {error}") from error
