"""The camera and the object LoRA of the motion ControlNet, through peft.

Eq. 2 calls them Delta theta_cam and Delta theta_obj; which of them is active is state of the network, which of them
learns is `requires_grad`, and the two are kept apart: activating an adapter never makes it trainable.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imageconductor.models.weights import copy_weights

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's own files carry it, so `PeftModel.from_pretrained` reads ours.


class Adapter(str, Enum):
    """The two LoRAs, by the names they have in files and in peft."""

    CAMERA = "camera"
    OBJECT = "object"


def lora_targets(model: nn.Module, kinds: Literal["all", "linear"] = "all") -> list[str]:
    """Names of the layers that carry a LoRA: every Linear, and for "all" every Conv2d but `conv_in`.

    The paper says linear layers, the published weights hold both. `conv_in` reads a zero sample, so a LoRA on it could
    neither act nor learn.
    """
    types = (nn.Linear, nn.Conv2d) if kinds == "all" else (nn.Linear,)
    return [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, types) and ".lora_" not in name and name.removesuffix(".base_layer") != "conv_in"
    ]


def add_adapter(
    model: nn.Module, adapter: Adapter | str, *, rank: int = 64, alpha: int | None = None, targets: Sequence[str] = ()
) -> None:
    """Attaches a fresh adapter, which leaves the output unchanged: A is gaussian, B is zero.

    Args:
        model: The motion ControlNet.
        adapter: Its name.
        rank: r. Paper and release: 64.
        alpha: LoRA scale is alpha / rank; None = rank.
        targets: Names of layers; empty = `lora_targets(model)`.

    Raises:
        ValueError: The adapter exists, or a target names no Linear or Conv2d of the model.
    """
    adapter = Adapter(adapter)
    if adapter in attached_adapters(model):
        raise ValueError(f"the {adapter.value} LoRA is attached already")
    known = {*lora_targets(model), "conv_in"}
    names = list(targets) or lora_targets(model)
    if unknown := sorted(set(names) - known):
        raise ValueError(f"LoRA targets that match no layer: {', '.join(unknown[:5])} ({len(unknown)} in all)")
    flags = {id(p): p.requires_grad for p in model.parameters()}
    config = LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, init_lora_weights="gaussian", target_modules=names
    )  # type: ignore[call-arg]
    with warnings.catch_warnings():  # peft wonders at a second adapter; two are what we want.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name=adapter.value)
    for parameter in model.parameters():
        parameter.requires_grad_(flags.get(id(parameter), False))
    model.lora_configs = {**getattr(model, "lora_configs", {}), adapter.value: config}  # type: ignore[assignment]
    activate(model)


def attached_adapters(model: nn.Module) -> set[Adapter]:
    """Adapters that the model carries."""
    return {Adapter(name) for layer in _lora_layers(model) for name in layer.lora_A}  # type: ignore[union-attr]


def activate(model: nn.Module, *adapters: Adapter | str) -> None:
    """Makes exactly these adapters act; none = the motion ControlNet as stage 1 left it.

    Raises:
        ValueError: An adapter is not attached.
    """
    names = [Adapter(adapter).value for adapter in adapters]
    if missing := {Adapter(name) for name in names} - attached_adapters(model):
        raise ValueError(f"the model has no {' and no '.join(sorted(a.value for a in missing))} LoRA")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for layer in _lora_layers(model):
        layer.enable_adapters(bool(names))
        if names:
            layer.set_adapter(names)
    for parameter, flag in flags:  # peft ties "active" to "trainable".
        parameter.requires_grad_(flag)


@contextmanager
def active(model: nn.Module, *adapters: Adapter | str) -> Iterator[None]:
    """Inside the block exactly these adapters act; afterwards those that did before."""
    before = active_adapters(model)
    activate(model, *adapters)
    try:
        yield
    finally:
        activate(model, *before)


def active_adapters(model: nn.Module) -> tuple[Adapter, ...]:
    """Adapters that act at present."""
    for layer in _lora_layers(model):
        return () if layer.disable_adapters else tuple(Adapter(name) for name in layer.active_adapters)
    return ()


def adapter_parameters(model: nn.Module, adapter: Adapter | str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter by name; the name of the adapter is taken out, as in peft's files."""
    marks = tuple(f".lora_{side}.{Adapter(adapter).value}." for side in "AB")
    return {
        name.replace(mark, mark[: mark.index(".", 1) + 1]): parameter
        for name, parameter in model.named_parameters()
        for mark in marks
        if mark in name
    }


def save_adapter(
    model: nn.Module, adapter: Adapter | str, folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, each under a temporary name first."""
    adapter, folder = Adapter(adapter), Path(folder)
    parameters = adapter_parameters(model, adapter)
    if not parameters:
        raise ValueError(f"the model has no {adapter.value} LoRA to save")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + key: p.detach().to("cpu", dtype).contiguous() for key, p in parameters.items()}
    save_file(tensors, folder / f".{WEIGHTS_NAME}", metadata={"format": "pt"})
    (folder / f".{WEIGHTS_NAME}").replace(folder / WEIGHTS_NAME)
    model.lora_configs[adapter.value].save_pretrained(str(folder))  # type: ignore[index, union-attr]


def load_adapter(model: nn.Module, adapter: Adapter | str, folder: str | Path) -> None:
    """Attaches an adapter from a folder that `save_adapter` or peft wrote.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: Its tensors do not fit the model; every misfit is named.
    """
    adapter, folder = Adapter(adapter), Path(folder)
    if not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"no {adapter.value} LoRA in {folder} ({WEIGHTS_NAME} is missing)")
    config = LoraConfig.from_pretrained(str(folder))
    state = {key.removeprefix(_PREFIX): value for key, value in load_file(folder / WEIGHTS_NAME).items()}
    attach_adapter(model, adapter, state, alpha=config.lora_alpha, source=str(folder))  # type: ignore[attr-defined]


def attach_adapter(
    model: nn.Module, adapter: Adapter | str, state: dict[str, Tensor], *, alpha: int | None = None, source: str = ""
) -> None:
    """Attaches an adapter with given weights; rank and targets are read from them.

    Args:
        model: The motion ControlNet.
        adapter: Its name.
        state: `LAYER.lora_A.weight` and `LAYER.lora_B.weight` -> tensor.
        alpha: None = rank.
        source: Named in errors.

    Raises:
        ValueError: Ranks differ, or tensors are missing, left over or mis-shaped.
    """
    layers = sorted({key.partition(".lora_")[0] for key in state})
    ranks = {value.shape[0] for key, value in state.items() if ".lora_A." in key}
    if len(ranks) != 1:
        raise ValueError(f"{source or adapter}: expected one LoRA rank, found {sorted(ranks)}")
    add_adapter(model, adapter, rank=ranks.pop(), alpha=alpha, targets=layers)
    copy_weights(adapter_parameters(model, adapter), state, source or f"{Adapter(adapter).value} LoRA")


def merge(model: nn.Module, *adapters: Adapter | str) -> None:
    """Folds adapters into the base weights, so that a single mode runs without their cost; `unmerge` takes it back."""
    activate(model, *adapters)
    for layer in _lora_layers(model):
        layer.merge(adapter_names=[Adapter(adapter).value for adapter in adapters])


def unmerge(model: nn.Module) -> None:
    """Takes merged adapters out of the base weights (up to rounding)."""
    for layer in _lora_layers(model):
        if layer.merged:
            layer.unmerge()


def train_only(model: nn.Module, adapter: Adapter | str | None) -> list[nn.Parameter]:
    """Freezes everything but one adapter, or for None everything but the base without `conv_in`; gives the rest."""
    model.requires_grad_(False)
    if adapter is not None:
        trained = list(adapter_parameters(model, adapter).values())
    else:
        trained = [p for name, p in model.named_parameters() if ".lora_" not in name and name != "conv_in.weight"]
    if not trained:
        raise ValueError(f"the model has no {adapter} LoRA to train")
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def _lora_layers(model: nn.Module) -> Iterator[BaseTunerLayer]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
