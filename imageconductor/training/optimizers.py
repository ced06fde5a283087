"""Optimisers: AdamW, AdamW with 8-bit moments, or Muon for weights beside AdamW for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from imageconductor.devices import has_instructions
from imageconductor.training.stages.base import ParameterGroup
from imageconductor.training.train_config import LoopConfig


def build_optimizer(
    groups: Iterable[ParameterGroup], config: LoopConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The run's optimiser.

    Args:
        groups: What learns; a group's own settings win over the run's.
        config: Of the run.
        device: Where it runs.

    Raises:
        ValueError: The optimiser is not to be had here; says what would be.
    """
    named = [
        {
            "params": group.parameters,
            "lr": config.learning_rate if group.learning_rate is None else group.learning_rate,
            "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
    ]
    if config.optimizer == "muon":
        return MuonAndAdamW(named)
    plain = [{**group, "params": list(group["params"].values())} for group in named]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(plain, fused=True)
    if device.type != "cuda":
        raise ValueError(f"optimizer=adamw_8bit needs a CUDA device, this is {device.type}; use optimizer=adamw")
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("optimizer=adamw_8bit needs bitsandbytes: pip install 'imageconductor[lowmem]'") from error
    return AdamW8bit(plain)


_ENDS = re.compile(r"(^|\.)conv_(in|out)\.")  # first and last convolution of a network


class MuonOfFilters(torch.optim.Optimizer):
    """PyTorch's Muon, which takes matrices only, for filters (out, in, h, w) of convolutions as matrices (out, h*w*in).

    Args:
        filters: What learns.
        settings: `lr` and `weight_decay`.
    """

    def __init__(self, filters: list[nn.Parameter], **settings: Any):
        super().__init__(filters, dict(settings))
        matrices = [nn.Parameter(_as_matrix(p.detach()).clone()) for p in filters]
        self.inner = torch.optim.Muon(matrices, **settings, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Changes the weights; a closure is not supported."""
        del closure
        (shown,), (group,) = self.param_groups, self.inner.param_groups
        group |= {name: value for name, value in shown.items() if name != "params"}
        pairs = list(zip(shown["params"], group["params"], strict=True))
        for filters, matrix in pairs:
            matrix.copy_(_as_matrix(filters))
            matrix.grad = None if filters.grad is None else _as_matrix(filters.grad)
            if filters in self.state:
                self.inner.state[matrix] = self.state[filters]
        self.inner.step()
        for filters, matrix in pairs:
            out, into, height, width = filters.shape
            filters.copy_(matrix.view(out, height, width, into).permute(0, 3, 1, 2))
            if matrix in self.inner.state:
                self.state[filters] = self.inner.state[matrix]


def _as_matrix(filters: torch.Tensor) -> torch.Tensor:
    return filters.permute(0, 2, 3, 1).flatten(1)


class _InFloat32(TorchFunctionMode):
    """Inside the block a cast to bfloat16 gives a copy."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.bfloat16:
            return args[0].clone()
        return function(*args, **(kwargs or {}))


class MuonAndAdamW(torch.optim.Optimizer):
    """PyTorch's Muon for weights of linear layers and 2D convolutions, its AdamW for the rest, as one.

    The rest are norms, biases, embeddings (time's too), convolutions of other dimensions, and a network's first and
    last convolution, as is usual with Muon. Muon's steps are scaled to the size of AdamW's, so one learning rate serves
    both. PyTorch makes them in bfloat16 whatever the precision of the run; here in float32 on devices that imitate it.

    Args:
        groups: Each with `params`, parameters by name, `lr` and `weight_decay` (decoupled).

    Raises:
        ValueError: PyTorch is older than 2.9, or no parameter is for Muon.

    Source: Jordan et al., 2024, filters as matrices too; the scale is that of Liu et al., 2025 ("Muon is scalable for
    LLM training").
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer=muon needs PyTorch 2.9 or newer, this is {torch.__version__}; use adamw")
        self.parts: list[torch.optim.Optimizer] = []
        for group in groups:
            named: Mapping[str, nn.Parameter] = group["params"]
            settings: dict[str, Any] = {key: value for key, value in group.items() if key != "params"}
            weights = {name: p for name, p in named.items() if "embedding" not in name}
            matrices = [p for p in weights.values() if p.ndim == 2]
            filters = [p for name, p in weights.items() if p.ndim == 4 and not _ENDS.search(name)]
            chosen = {id(p) for p in (*matrices, *filters)}
            others = [p for p in named.values() if id(p) not in chosen]
            if matrices:
                self.parts.append(torch.optim.Muon(matrices, **settings, adjust_lr_fn="match_rms_adamw"))
            if filters:
                self.parts.append(MuonOfFilters(filters, **settings))
            if others:
                self.parts.append(torch.optim.AdamW(others, **settings, fused=True))
        if not any(isinstance(part, (torch.optim.Muon, MuonOfFilters)) for part in self.parts):
            raise ValueError("optimizer=muon finds no weight for it among what learns; use optimizer=adamw")
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Changes the weights; a closure is not supported."""
        del closure
        device = self.param_groups[0]["params"][0].device
        with nullcontext() if has_instructions(torch.bfloat16, device) else _InFloat32():
            for part in self.parts:
                part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Makes the parts read and write the groups and the state that this optimiser shows."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
