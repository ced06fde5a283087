"""What changes the weights: AdamW, AdamW with 8-bit moments, or Muon for matrices beside AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from imageconductor.training.train_config import LoopConfig


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: LoopConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The run's optimiser.

    Args:
        parameters: What learns, by name.
        config: Of the run.
        device: Where it runs.

    Raises:
        ValueError: The optimiser is not to be had here; says what would be.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters.values(), **settings, fused=True)
    if config.optimizer == "muon":
        return MuonAndAdamW(parameters, **settings)
    if device.type != "cuda":
        raise ValueError(f"optimizer=adamw_8bit needs a CUDA device, this is {device.type}; use optimizer=adamw")
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("optimizer=adamw_8bit needs bitsandbytes: pip install 'imageconductor[lowmem]'") from error
    return AdamW8bit(parameters.values(), **settings)


class MuonAndAdamW(torch.optim.Optimizer):
    """PyTorch's Muon for the matrices, its AdamW for convolutions, norms, biases and embeddings (time's too), as one.

    Muon's steps are scaled to the size of AdamW's, so one learning rate serves both.

    Args:
        parameters: What learns, by name.
        lr: Learning rate.
        weight_decay: Decoupled, of both.

    Raises:
        ValueError: PyTorch is older than 2.9, or no parameter is a matrix.

    Source: Jordan et al., 2024; the scale is that of Liu et al., 2025 ("Muon is scalable for LLM training").
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], lr: float, weight_decay: float = 0.0):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer=muon needs PyTorch 2.9 or newer, this is {torch.__version__}; use adamw")
        matrices = {name: p for name, p in parameters.items() if p.ndim == 2 and "embedding" not in name}
        others = [p for name, p in parameters.items() if name not in matrices]
        if not matrices:
            raise ValueError("optimizer=muon finds no matrix among what learns; use optimizer=adamw")
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices.values(), **settings, adjust_lr_fn="match_rms_adamw")
        ]
        if others:
            self.parts.append(torch.optim.AdamW(others, **settings, fused=True))
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
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
        """Parts read and write the groups and the state that this one shows."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
