"""A training step as a plain loop takes it: what the loop of this package is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from imageconductor.conditioning.first_frame import keyframe_condition
from imageconductor.data.batches import Samples, collate, scale_pixels
from imageconductor.devices import HALF
from imageconductor.models import text_attention
from imageconductor.models.denoiser import Condition
from imageconductor.training.loop import draw_noise
from imageconductor.training.stages.base import Stage
from imageconductor.training.train_config import LoopConfig


class PlainLoop:
    """Encodes each clip and its caption in every step, takes pixels as float32, and the text once for each frame.

    Args:
        stage: One of Image Conductor's; belongs to the loop from then on.
        samples: Clips in pixels.
        config: Of the run.
        device: Where it runs.
        freezes: Whether what does not learn is left out of autograd; else gradients are computed for every weight.

    Attributes:
        loading_s: Seconds in which steps have waited for their clips.
    """

    def __init__(self, stage: Stage, samples: Samples, config: LoopConfig, device: torch.device, freezes: bool):
        self.stage, self.samples, self.config, self.device, self.freezes = stage, samples, config, device, freezes
        cast(Any, stage).to(device)
        self.learning = [p for group in stage.trainable().values() for p in group.parameters.values()]
        if not freezes:
            stage.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.learning, config.learning_rate, weight_decay=config.weight_decay)
        precision = HALF.get(config.mixed_precision)
        self.autocast = nullcontext() if precision is None else torch.autocast(device.type, precision)
        self.loading_s = 0.0

    def step(self, number: int) -> Tensor:
        """Takes the step of batch `number`; the loss."""
        start = time.perf_counter()
        size, seed = self.config.batch_size, self.config.seed
        batch = collate([self.samples[position] for position in range(number * size, (number + 1) * size)])
        batch["pixel_values"] = scale_pixels(batch["pixel_values"])
        self.loading_s += time.perf_counter() - start
        loss = self.loss(batch, [torch.Generator().manual_seed(seed + number * size + i) for i in range(size)])
        loss.backward()
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.learning, self.config.max_grad_norm)
        self.optimizer.step()
        self.stage.zero_grad()
        return loss.detach()

    def loss(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> Tensor:
        """The stage's loss (), of a batch whose pixels are float32 in [-1, 1], with the stage's random choices."""
        stage, num_timesteps = self.stage, self.stage.scheduler.config["num_train_timesteps"]
        with self.autocast, mock.patch.object(text_attention, "FOLDING", ()):
            with torch.no_grad() if self.freezes else nullcontext():
                x_0, condition = self._encode(batch, generators)
            t, eps = draw_noise(x_0, num_timesteps, self.config.timestep_shift, generators)
            return torch.stack(list(stage.loss_terms(x_0, t, eps, condition).values())).sum()

    def _encode(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> tuple[Tensor, Condition]:
        stage, pixels = self.stage, batch["pixel_values"].to(self.device)
        num_frames, height, width = pixels.shape[2:]
        posterior = stage.vae.encode(pixels.transpose(1, 2).flatten(0, 1)).latent_dist
        scale = stage.vae.config["scaling_factor"]
        mean, std = (
            (value.float() * scale).unflatten(0, (-1, num_frames)).transpose(1, 2)
            for value in (posterior.mean, posterior.std)
        )
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        dropped = [bool(torch.rand((), generator=g) < stage.text_dropout) for g in generators]
        given = [bool(torch.rand((), generator=g) >= stage.image_dropout) for g in generators]
        keyframes, mask = keyframe_condition(mean[:, :, :1], (0,), num_frames)
        is_given = torch.tensor(given, device=self.device).to(mean.dtype).view(-1, 1, 1, 1, 1)
        with torch.autocast(self.device.type, enabled=False):
            flow, has_flow = stage.draw_flow(batch, (width, height), generators)
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
        text = stage.text_encoder(stage.networks.tokenize(captions).to(self.device)).last_hidden_state
        condition = Condition(text, keyframes * is_given, mask * is_given, flow, has_flow)
        return mean + std * noise.to(self.device), condition
