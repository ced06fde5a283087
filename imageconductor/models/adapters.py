"""LoRAs of any network, by name, through peft.

Which adapters are active is state of the network, which of them learns is `requires_grad`, and the two are kept apart:
activating an adapter never makes it trainable. Files are peft's (one folder an adapter) or diffusers' (one file for the
UNet, which `load_lora_weights` takes).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from imageconductor.files import atomic_path
from imageconductor.models.lora_files import PEFT_PREFIX, LoraPair, fit_pair, peft_settings, read_lora
from imageconductor.models.weights import copy_weights

WEIGHTS_NAME = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


class Adapter(str, Enum):
    """Image Conductor's two LoRAs of the motion ControlNet: Delta theta_cam and Delta theta_obj of Eq. 2."""

    CAMERA = "camera"
    OBJECT = "object"


_Net = TypeVar("_Net", bound=nn.Module)
TargetSet = Literal["all", "linear", "spatial", "appearance", "motion"]
_PROJECTIONS = r"(?:to_q|to_k|to_v|to_out\.0)"
_FEED_FORWARD = r"ff\.net\.(?:0\.proj|2)"
_BLOCK = r"transformer_blocks\.\d+\."
_NAMES: dict[TargetSet, re.Pattern[str]] = {
    "all": re.compile(".+"),
    "linear": re.compile(".+"),
    "spatial": re.compile(rf".+\.attentions\..*\.{_PROJECTIONS}"),
    "appearance": re.compile(rf".+\.attentions\.\d+\.{_BLOCK}(?:attn1\.{_PROJECTIONS}|{_FEED_FORWARD})"),
    # AnimateDiff's motion modules; the temporal transformers of diffusers' UNet3DConditionModel.
    "motion": re.compile(
        r"(?:.+\.motion_modules\.\d+|.+\.temp_attentions\.\d+|transformer_in)\."
        rf"{_BLOCK}(?:attn[12]\.{_PROJECTIONS}|{_FEED_FORWARD})"
    ),
}


def lora_targets(network: nn.Module, target_set: TargetSet = "all") -> list[str]:
    """Names of the layers that carry a LoRA, in the network's order.

    | set | layers |
    |---|---|
    | all | every Linear and Conv2d, as in the published weights |
    | linear | every Linear, as the paper says |
    | spatial | query, key, value and output projections of the spatial transformers, as community style LoRAs |
    | appearance | MotionDirector's spatial path: the same of self-attention only, and the feed-forward layers |
    | motion | MotionDirector's temporal path: the same of every temporal attention, and the feed-forward layers |

    The last two fit AnimateDiff's UNet and diffusers' `UNet3DConditionModel`, and have no layer in common. No set holds
    the `proj_in` and `proj_out` around transformer blocks, except the first two.

    `conv_in` is left out: a ControlNet's reads a zero sample, so a LoRA on it could neither act nor learn.

    Raises:
        ValueError: There is no such set.
    """
    if target_set not in _NAMES:
        raise ValueError(f"no set of LoRA targets is called {target_set!r}; there are {', '.join(_NAMES)}")
    kinds = (nn.Linear, nn.Conv2d) if target_set == "all" else nn.Linear
    return [
        name
        for name, layer in plain_layers(network).items()
        if name != "conv_in" and isinstance(layer, kinds) and _NAMES[target_set].fullmatch(name)
    ]


def add_adapter(
    network: nn.Module,
    name: str,
    *,
    rank: int = 64,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = (),
    seed: int | None = None,
    clips_rank: bool = False,
) -> None:
    """Attaches a fresh adapter, which leaves the output unchanged: A is Gaussian, B is zero. No adapter is active then.

    Args:
        network: Any network.
        name: Of the adapter.
        rank: r. Paper and release: 64.
        alpha: LoRA scale is alpha / rank; None = rank.
        dropout: Probability with which an input of A is dropped while the network is in training mode.
        targets: Names of layers; empty = `lora_targets(network)`.
        seed: Of A; None draws it from PyTorch's global generator.
        clips_rank: Gives a layer with fewer inputs or outputs than `rank` their number as its rank, as MotionDirector.

    Raises:
        ValueError: The adapter exists, or a target names no Linear or Conv2d of the network.
    """
    targets, layers = list(targets) or lora_targets(network), plain_layers(network)
    if unknown := sorted(set(targets) - layers.keys()):
        raise ValueError(f"LoRA targets that match no layer: {', '.join(unknown[:5])} ({len(unknown)} in all)")
    scale = {"r": rank, "lora_alpha": rank if alpha is None else alpha}
    settings: dict[str, Any] = {**scale, "lora_dropout": dropout, "target_modules": targets}
    if clips_rank:
        widths = {name: min(cast(Tensor, layers[name].weight).shape[:2]) for name in targets}
        ranks = {f"^{re.escape(name)}": width for name, width in widths.items() if width < rank}
        settings["rank_pattern"] = ranks
        settings["alpha_pattern"] = {name: scale["lora_alpha"] * width / rank for name, width in ranks.items()}
    _attach(network, _plain_name(name), settings, seed)


def _attach(network: nn.Module, name: str, settings: Mapping[str, Any], seed: int | None = None) -> None:
    """Attaches a fresh adapter with these fields of peft's config."""
    if name in attached_adapters(network):
        raise ValueError(f"the {name} LoRA is attached already")
    config = LoraConfig(**settings, init_lora_weights="gaussian")
    flags = {id(p): p.requires_grad for p in network.parameters()}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[], enabled=seed is not None):
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        if seed is not None:
            torch.manual_seed(seed)
        inject_adapter_in_model(config, network, adapter_name=name)
    for parameter in network.parameters():
        parameter.requires_grad_(flags.get(id(parameter), False))
    network.lora_configs = {**getattr(network, "lora_configs", {}), name: config}  # type: ignore[assignment]
    activate(network)


def attached_adapters(network: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that the network carries, in the order in which they were attached."""
    return tuple(dict.fromkeys(name for layer in _lora_layers(network) for name in layer.lora_A))  # type: ignore[union-attr]


def activate(network: nn.Module, *names: str) -> None:
    """Makes exactly these adapters act.

    Raises:
        ValueError: An adapter is not attached.
    """
    chosen = [_plain_name(name) for name in names]
    layers: list[Any] = list(_lora_layers(network))
    if missing := sorted(set(chosen).difference(*(layer.lora_A for layer in layers))):
        raise ValueError(f"the model has no {' and no '.join(missing)} LoRA")
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(bool(chosen))
        if chosen:
            layer.set_adapter(chosen)
    for parameter, flag in flags:  # peft ties "active" to "trainable".
        parameter.requires_grad_(flag)


@contextmanager
def active(network: nn.Module, *names: str) -> Iterator[None]:
    """Inside the block exactly these adapters act; afterwards those that did before."""
    before = active_adapters(network)
    activate(network, *names)
    try:
        yield
    finally:
        activate(network, *before)


@contextmanager
def frozen(network: nn.Module, *names: str) -> Iterator[None]:
    """Inside the block these adapters do not learn, whether or not they act; afterwards as before."""
    plain = [_plain_name(name) for name in names]
    layers: Any = _lora_layers(network)
    sides = (side for layer in layers for side in (layer.lora_A, layer.lora_B))
    parameters = [p for side in sides for name in plain if name in side for p in side[name].parameters()]
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


@contextmanager
def lora_dropout(network: nn.Module, seed: int) -> Iterator[None]:
    """Inside the block the dropout of LoRAs is on, and PyTorch's random numbers follow from `seed`.

    Blocks that are computed again in the backward pass drop the same; the dropout of a network that was trained in the
    block must be switched off by `eval` before it is used.
    """
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    for layer in _lora_layers(network):
        cast(Any, layer).lora_dropout.train()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def active_adapters(network: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act at present."""
    for layer in _lora_layers(network):
        if layer.disable_adapters:
            return ()
        attached = attached_adapters(network)  # peft's layers also name adapters that act elsewhere in the network.
        return tuple(name for name in layer.active_adapters if name in attached)
    return ()


def merge_copy(network: _Net, *names: str) -> _Net:
    """A copy of the network without LoRAs, in whose weights these adapters are merged; all else is shared.

    The products of the LoRA are then paid for once, not at each evaluation. The network itself stays as it is; the copy
    takes as much memory as the adapted layers.

    Raises:
        ValueError: An adapter is not attached, or adapters are merged into the network already.
    """
    names = tuple(_plain_name(name) for name in names)
    if missing := set(names) - set(attached_adapters(network)):
        raise ValueError(f"the model has no {describe_adapters(missing)}")
    if any(layer.merged for layer in _lora_layers(network)):
        raise ValueError("adapters are merged into the network; peft's unmerge() of its layers takes them out")
    layers = {path: module for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    containers = {path[:end] for path in layers for end, letter in enumerate(path) if letter == "."} | {""}
    copies: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copies |= {id(module): module for path, module in network.named_modules() if path not in containers}
    copies |= {id(layer): _merge_layer(layer, names) for layer in layers.values()}
    return copy.deepcopy(network, copies)


def _merge_layer(layer: Any, names: Sequence[str]) -> nn.Module:
    """The layer below LoRAs, with a weight of its own in which these are merged."""
    plain = copy.copy(layer.get_base_layer())
    deltas: list[Tensor] = [layer.get_delta_weight(name) for name in names if name in layer.lora_A]
    weight: Tensor = plain.weight.data
    plain._parameters = {**plain._parameters}
    plain.weight = nn.Parameter(sum(deltas, start=weight), requires_grad=False)
    return plain


def adapter_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter by name; the name of the adapter is taken out, as in peft's files."""
    marks = tuple(f".lora_{side}.{_plain_name(name)}." for side in "AB")
    return {
        key.replace(mark, mark[: mark.index(".", 1) + 1]): parameter
        for key, parameter in network.named_parameters()
        for mark in marks
        if mark in key
    }


def adapter_pairs(network: nn.Module, name: str) -> dict[str, LoraPair]:
    """One adapter's matrices, on the CPU, by the names of the layers, as `attach_adapter` takes them.

    Raises:
        ValueError: It is not attached.
    """
    name = _plain_name(name)
    if name not in attached_adapters(network):
        raise ValueError(f"the model has no {name} LoRA")
    pairs = {}
    for layer, module in network.named_modules():
        if isinstance(module, BaseTunerLayer) and name in cast(Any, module).lora_A:
            of_layer = cast(Any, module)
            down, up = (side[name].weight.detach().cpu() for side in (of_layer.lora_A, of_layer.lora_B))
            pairs[layer] = LoraPair(down, up, of_layer.lora_alpha[name])
    return pairs


def freeze_all_but_adapter(network: nn.Module, *names: str) -> None:
    """Lets these adapters learn and nothing else.

    Raises:
        ValueError: One is not attached.
    """
    parameters = {name: adapter_parameters(network, name) for name in names}
    if missing := [name for name, of_adapter in parameters.items() if not of_adapter]:
        raise ValueError(f"the model has no {describe_adapters(missing)} to train")
    network.requires_grad_(False)
    for of_adapter in parameters.values():
        for parameter in of_adapter.values():
            parameter.requires_grad_(True)


def save_adapter(network: nn.Module, name: str, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, as peft reads them."""
    name, folder = _plain_name(name), Path(folder)
    tensors = _tensors_to_save(network, name, PEFT_PREFIX, dtype)  # `PeftModel.from_pretrained` reads it
    with atomic_path(folder / WEIGHTS_NAME) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    network.lora_configs[name].save_pretrained(str(folder))  # type: ignore[index, union-attr]


def save_for_diffusers(network: nn.Module, name: str, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a UNet's LoRA as the file that `load_lora_weights` and `sample.py --lora` take.

    Raises:
        ValueError: There is no such LoRA, or its alpha is not its rank.
    """
    config: LoraConfig = network.lora_configs[_plain_name(name)]  # type: ignore[index, assignment]
    if config.lora_alpha != config.r:
        raise ValueError(f"the file has no place for alpha {config.lora_alpha}, which must equal the rank {config.r}")
    with atomic_path(Path(folder) / DIFFUSERS_WEIGHTS_NAME) as path:
        save_file(_tensors_to_save(network, name, "unet.", dtype), path, metadata={"format": "pt"})


def load_adapter(network: nn.Module, name: str, folder: str | Path) -> None:
    """Attaches an adapter from a folder that `save_adapter` or peft wrote.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: A file is damaged, or its tensors do not fit the network; every misfit is named.
    """
    name, folder = _plain_name(name), Path(folder)
    if not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"no {name} LoRA in {folder} ({WEIGHTS_NAME} is missing)")
    attach_adapter(network, name, read_lora(folder / WEIGHTS_NAME), source=str(folder))


def attach_adapter(network: nn.Module, name: str, pairs: Mapping[str, LoraPair], *, source: str = "") -> None:
    """Attaches an adapter with given weights.

    Args:
        network: Any network.
        name: Of the adapter.
        pairs: By the names of the network's layers; ranks and alphas may differ.
        source: Named in errors.

    Raises:
        ValueError: A pair fits no layer, or the adapter exists; nothing has been changed then.
    """
    name, layers = _plain_name(name), plain_layers(network)
    source = source or f"{name} LoRA"
    if unknown := sorted(pairs.keys() - layers.keys()):
        raise ValueError(f"{source} does not fit the model, which lacks {', '.join(unknown)}")
    fitting = {layer: fit_pair(pair, layers[layer], layer, source) for layer, pair in pairs.items()}
    _attach(network, name, peft_settings(fitting))
    state = {f"{layer}.lora_A.weight": pair.down for layer, pair in fitting.items()}
    state |= {f"{layer}.lora_B.weight": pair.up for layer, pair in fitting.items()}
    copy_weights(adapter_parameters(network, name), state, source)


def plain_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers under the names that they have without LoRAs."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
    }


def describe_adapters(names: Collection[str]) -> str:
    """Names for a message: "camera and object LoRA"."""
    return f"{' and '.join(sorted(_plain_name(name) for name in names))} LoRA"


def _tensors_to_save(network: nn.Module, name: str, prefix: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    parameters = adapter_parameters(network, name)
    if not parameters:
        raise ValueError(f"the model has no {_plain_name(name)} LoRA to save")
    return {prefix + key: value.detach().to("cpu", dtype).contiguous() for key, value in parameters.items()}


def _plain_name(name: str) -> str:
    """The name as text, also of an enum's member, which prints otherwise."""
    return name.value if isinstance(name, Enum) else name


def _lora_layers(network: nn.Module) -> Iterator[BaseTunerLayer]:
    """In the order of `modules()`, which spends most of its time on the paths of thousands of modules."""
    waiting: list[nn.Module | None] = [network]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, BaseTunerLayer):
            yield module
        else:
            waiting.extend(reversed(module._modules.values()))
