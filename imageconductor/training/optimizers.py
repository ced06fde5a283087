"""Optimisers: AdamW, AdamW with 8-bit moments, or Muon for matrices beside AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

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


class MuonAndAdamW(torch.optim.Optimizer):
    """PyTorch's Muon for the matrices, its AdamW for convolutions, norms, biases and embeddings (time's too), as one.

    Muon's steps are scaled to the size of AdamW's, so one learning rate serves both.

    Args:
        groups: Each with `params`, parameters by name, `lr` and `weight_decay` (decoupled).

    Raises:
        ValueError: PyTorch is older than 2.9, or no parameter is a matrix.

    Source: Jordan et al., 2024; the scale is that of Liu et al., 2025 ("Muon is scalable for LLM training").
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer=muon needs PyTorch 2.9 or newer, this is {torch.__version__}; use adamw")
        self.parts: list[torch.optim.Optimizer] = []
        for group in groups:
            named: Mapping[str, nn.Parameter] = group["params"]
            settings: dict[str, Any] = {key: value for key, value in group.items() if key != "params"}
            matrices = [p for name, p in named.items() if p.ndim == 2 and "embedding" not in name]
            chosen = {id(p) for p in matrices}
            others = [p for p in named.values() if id(p) not in chosen]
            if matrices:
                self.parts.append(torch.optim.Muon(matrices, **settings, adjust_lr_fn="match_rms_adamw"))
            if others:
                self.parts.append(torch.optim.AdamW(others, **settings, fused=True))
        if not any(isinstance(part, torch.optim.Muon) for part in self.parts):
            raise ValueError("optimizer=muon finds no matrix among what learns; use optimizer=adamw")
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Changes the weights; a closure is not supported."""
        del closure
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
