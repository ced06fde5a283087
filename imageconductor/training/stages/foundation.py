"""The foundation of a small model that is built from nothing: UNet, image ControlNet and text encoder together.

It stands in for the pretraining of SD-1.5, AnimateDiff v3 and SparseCtrl (scripts/train_sprites.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imageconductor.models.denoiser import Condition
from imageconductor.models.networks import Networks
from imageconductor.training.stage_configs import FoundationConfig
from imageconductor.training.stages.base import TrajectoryStage


class FoundationStage(TrajectoryStage):
    """UNet with motion modules, image ControlNet and text encoder, from random weights."""

    name = "foundation"
    Config = FoundationConfig
    dropouts = (*TrajectoryStage.dropouts, "motion_dropout")

    def __init__(self, networks: Networks, config: FoundationConfig):
        super().__init__(networks, config)
        self.trains_motion, self.motion_dropout = config.train_motion_controlnet, config.motion_dropout
        networks.freeze()
        self.text_encoder.requires_grad_(True)
        self.unet.requires_grad_(True)
        self.image_controlnet.unfreeze_()
        if self.trains_motion:
            self.motion_controlnet.unfreeze_()

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Stage.denoise`, the text encoder learning along."""
        text = self.text_encoder(condition.text).last_hidden_state
        return self.denoiser(x_t, t, replace(condition, text=text))

    def encode_text(self, batch: dict[str, Any], dropped: Sequence[bool]) -> Tensor:
        """(B, L) int64 token ids, those of the empty text in place of dropped ones."""
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
        return self.networks.tokenize(captions).to(self.unet.device)

    def draw_flow(
        self, batch: dict[str, Any], size: tuple[int, int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Flow maps, and which clips have one: those that move, and whose trajectories are not dropped."""
        if not self.trains_motion:
            return None, None
        flow, _ = super().draw_flow(batch, size, generators)
        kept = torch.tensor([bool(torch.rand((), generator=g) >= self.motion_dropout) for g in generators])
        assert flow is not None
        return flow, kept.to(flow.device) & flow.flatten(1).any(1)

    def save(self, folder: Path) -> None:
        """Writes unet, image_controlnet and text_encoder, and motion_controlnet if it learned along."""
        if self.trains_motion:
            self.motion_controlnet.save_pretrained(folder / "motion_controlnet")
        self.unet.save_pretrained(folder / "unet")
        self.image_controlnet.save_pretrained(folder / "image_controlnet")
        self.text_encoder.save_pretrained(folder / "text_encoder")
