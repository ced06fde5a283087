"""A style LoRA of the UNet's spatial attention, as people make them: personalised weights (Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imageconductor.data.sparse_tracks import sample_sparse
from imageconductor.models.adapters import (
    activate,
    add_adapter,
    freeze_all_but_adapter,
    lora_targets,
    save_for_diffusers,
)
from imageconductor.models.networks import Networks
from imageconductor.training.stage_configs import StyleLoraConfig
from imageconductor.training.stages.base import Stage

STYLE = "style"
_MAX_TRACKS = 8


class StyleLoraStage(Stage):
    """A LoRA of the UNet's spatial attention, on clips of a style, without trajectories."""

    name = "style_lora"
    Config = StyleLoraConfig
    learns_loras = True

    def __init__(self, networks: Networks, config: StyleLoraConfig):
        super().__init__(networks, config)
        networks.freeze()
        targets = lora_targets(self.unet, "spatial")
        add_adapter(self.unet, STYLE, rank=config.lora_rank, targets=targets, seed=config.seed)
        activate(self.unet, STYLE)
        freeze_all_but_adapter(self.unet, STYLE)

    def draw_flow(
        self, batch: dict[str, Any], size: tuple[int, int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor | None, Tensor | None]:
        """None. Tracks are drawn all the same, so that a run begun before they were left out goes on with its noise."""
        sample_sparse(batch["points"], batch["visible"], _MAX_TRACKS, generators)
        return super().draw_flow(batch, size, generators)

    def save(self, folder: Path) -> None:
        """Writes style_lora/pytorch_lora_weights.safetensors, which `sample.py --lora` takes."""
        save_for_diffusers(self.unet, STYLE, folder / "style_lora", torch.float16)
