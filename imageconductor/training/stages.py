"""What each stage learns. The loop is the same for all; a stage says what is trained, what is active and what it costs.

| stage | learns | active | loss |
|---|---|---|---|
| foundation | UNet, image ControlNet, text encoder | no motion ControlNet, or one that learns along | denoising |
| 1 motion ControlNet | motion ControlNet | no LoRA | denoising |
| 2 camera LoRA | camera LoRA | camera | Eq. 1 |
| 3 object LoRA | object LoRA | camera (frozen) + object, Eq. 2 | Eq. 3 + lambda * Eq. 4 |
| style LoRA | LoRA of the UNet's spatial attention | no motion ControlNet | denoising |

Foundation stands in for the pretrained SD-1.5 + AnimateDiff v3 + SparseCtrl when a small model is built from nothing.
A style LoRA is what people make of them: personalised weights (Fig. 5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from imageconductor.conditioning.first_frame import first_frame_condition
from imageconductor.conditioning.flow_map import flow_map
from imageconductor.data.sparse_tracks import sample_sparse
from imageconductor.diffusion.losses import denoising_loss, orthogonal_loss
from imageconductor.models.adapters import (
    Adapter,
    activate,
    adapter_parameters,
    add_adapter,
    load_adapter,
    lora_targets,
    save_adapter,
    train_only,
)
from imageconductor.models.controlnets import Residuals
from imageconductor.models.networks import Networks
from imageconductor.training.train_config import StageName, TrainConfig

_STYLE = "style"
_SPATIAL_ATTENTION = re.compile(r"\.attentions\..*\.(to_q|to_k|to_v|to_out\.0)$")


@dataclass(frozen=True)
class Condition:
    """Everything but x_t and t that the model reads."""

    text: Tensor  # (B, L, D) embedding; (B, L) int64 token ids where the text encoder learns
    first_frame: Tensor  # (B, C, T, h, w), scaled latents, zero but for frame 0
    mask: Tensor  # (B, 1, T, h, w)
    flow: Tensor  # (B, 2, T, H, W) px


class Stage(nn.Module):
    """One stage of the training; calling it denoises.

    As one module it is what accelerate wraps, whichever of its networks is trained.
    """

    def __init__(self, networks: Networks, config: TrainConfig):
        super().__init__()
        self.networks = networks
        self.config = config
        self.vae = networks.vae
        self.text_encoder = networks.text_encoder
        self.unet = networks.unet
        self.image_controlnet = networks.image_controlnet
        self.motion_controlnet = networks.motion_controlnet

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], generators: Sequence[torch.Generator]) -> tuple[Tensor, Condition]:
        """Clean latents x_0 (B, C, T, h, w) and the condition, from a batch of clips.

        Args:
            batch: points (B, N, T, 2) px, visible (B, N, T), caption; and pixel_values (B, 3, T, H, W) in [-1, 1], or
                from a cache latent_mean and latent_std (B, C, T, h, w), size (B, 2) and text (B, L, D).
            generators: One a clip, on the CPU; they draw the posterior's noise, what is dropped and the sparse tracks.
        """
        mean, std, size = self._posterior(batch)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        x_0 = mean + std * noise.to(mean.device)

        dropped = [bool(torch.rand((), generator=g) < self.config.text_dropout) for g in generators]
        given = [bool(torch.rand((), generator=g) >= self.config.image_dropout) for g in generators]
        first_frame, mask = first_frame_condition(mean[:, :, 0], mean.shape[2])
        is_given = torch.tensor(given, device=mean.device).to(mean.dtype).view(-1, 1, 1, 1, 1)
        with torch.autocast(mean.device.type, enabled=False):  # Flow maps are pixels; half precision would round them.
            flow = self._flow(batch, size, generators)
        return x_0, Condition(self._text(batch, dropped), first_frame * is_given, mask * is_given, flow)

    def _posterior(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Mean and standard deviation of the scaled latents, each (B, C, T, h, w), and (W, H) in pixels."""
        device, scale = self.unet.device, self.vae.config["scaling_factor"]
        if "latent_mean" in batch:
            width, height = batch["size"][0].tolist()
            return batch["latent_mean"].to(device) * scale, batch["latent_std"].to(device) * scale, (width, height)
        pixels = batch["pixel_values"].to(device, self.vae.dtype)
        num_frames, height, width = pixels.shape[2:]
        posterior = self.vae.encode(pixels.transpose(1, 2).flatten(0, 1)).latent_dist
        mean, std = (
            (value.float() * scale).unflatten(0, (-1, num_frames)).transpose(1, 2)
            for value in (posterior.mean, posterior.std)
        )
        return mean, std, (width, height)

    def _text(self, batch: dict[str, Any], dropped: Sequence[bool]) -> Tensor:
        """(B, L, D), the empty text in place of dropped ones."""
        device = self.unet.device
        if "text" not in batch:
            captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
            return self.text_encoder(self.networks.tokenize(captions).to(device)).last_hidden_state
        text = batch["text"].to(device)
        if any(dropped):
            empty = self.text_encoder(self.networks.tokenize([""]).to(device)).last_hidden_state
            text = torch.where(torch.tensor(dropped, device=device).view(-1, 1, 1), empty, text)
        return text

    def _flow(self, batch: dict[str, Any], size: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
        points, visible = batch["points"].to(self.unet.device), batch["visible"].to(self.unet.device)
        if self.config.trajectories == "sparse":
            visible = visible & sample_sparse(points, visible, self.config.max_tracks, generators)[..., None]
        return flow_map(points, visible, size, self.motion_controlnet.flow_convention)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps_theta(x_t, t, c), or v where the scheduler predicts v: (B, C, T, h, w)."""
        with torch.no_grad():
            features = self.unet.encode(x_t, t, condition.text)
            image = self.image_controlnet(t, condition.text, condition.first_frame, condition.mask)
        # Gradients reach the motion ControlNet through the up path alone.
        motion = self.motion_controlnet(t, condition.text, condition.flow)
        return self.unet.decode(features, image + motion)

    def loss_terms(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Weighted terms by name; their sum is minimised."""
        return {"denoising": denoising_loss(prediction, target)}

    def trainable(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save(self, folder: Path) -> None:
        """Writes what was learned, as the next stage and the pipeline read it."""
        raise NotImplementedError


class FoundationStage(Stage):
    """UNet with motion modules, image ControlNet and text encoder, from random weights."""

    def __init__(self, networks: Networks, config: TrainConfig):
        super().__init__(networks, config)
        networks.freeze()
        for network in (self.text_encoder, self.unet, self.image_controlnet):
            network.requires_grad_(True)
        self.image_controlnet.conv_in.weight.requires_grad_(False)
        if config.train_motion_controlnet:
            train_only(self.motion_controlnet, None)

    def _text(self, batch: dict[str, Any], dropped: Sequence[bool]) -> Tensor:
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
        return self.networks.tokenize(captions).to(self.unet.device)

    def _flow(self, batch: dict[str, Any], size: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
        if not self.config.train_motion_controlnet:
            return torch.zeros(())
        flow = super()._flow(batch, size, generators)
        kept = [float(torch.rand((), generator=g) >= self.config.motion_dropout) for g in generators]
        return flow * torch.tensor(kept, device=flow.device).view(-1, 1, 1, 1, 1)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Stage.forward`; the motion ControlNet is there for clips with trajectories, if it learns along."""
        text = self.text_encoder(condition.text).last_hidden_state
        residuals = self.image_controlnet(t, text, condition.first_frame, condition.mask)
        if self.config.train_motion_controlnet:
            motion = self.motion_controlnet(t, text, condition.flow)
            given = condition.flow.flatten(1).any(1).repeat_interleave(x_t.shape[2]).to(x_t.dtype).view(-1, 1, 1, 1)
            residuals = residuals + Residuals(tuple(given * x for x in motion.down), given * motion.mid)
        return self.unet.decode(self.unet.encode(x_t, t, text), residuals)

    def save(self, folder: Path) -> None:
        """Writes unet, image_controlnet and text_encoder, and motion_controlnet if it learned along."""
        if self.config.train_motion_controlnet:
            self.motion_controlnet.save_pretrained(folder / "motion_controlnet")
        self.unet.save_pretrained(folder / "unet")
        self.image_controlnet.save_pretrained(folder / "image_controlnet")
        self.text_encoder.save_pretrained(folder / "text_encoder")


class MotionControlNetStage(Stage):
    """Stage 1: the motion ControlNet on mixed data, with dense, then with sparse trajectories."""

    def __init__(self, networks: Networks, config: TrainConfig):
        super().__init__(networks, config)
        networks.freeze()
        train_only(self.motion_controlnet, None)

    def save(self, folder: Path) -> None:
        """Writes motion_controlnet."""
        self.motion_controlnet.save_pretrained(folder / "motion_controlnet")


class CameraStage(Stage):
    """Stage 2: the camera LoRA on camera-only data, Eq. 1."""

    def __init__(self, networks: Networks, config: TrainConfig):
        super().__init__(networks, config)
        networks.freeze()
        _add_adapter(self.motion_controlnet, Adapter.CAMERA, config)
        activate(self.motion_controlnet, Adapter.CAMERA)
        train_only(self.motion_controlnet, Adapter.CAMERA)

    def save(self, folder: Path) -> None:
        """Writes camera_lora."""
        save_adapter(self.motion_controlnet, Adapter.CAMERA, folder / "camera_lora")


class ObjectStage(Stage):
    """Stage 3: the object LoRA on mixed data under the frozen camera LoRA, Eqs. 2-4."""

    def __init__(self, networks: Networks, config: TrainConfig):
        super().__init__(networks, config)
        networks.freeze()
        load_adapter(self.motion_controlnet, Adapter.CAMERA, config.camera_lora or Path(config.model) / "camera_lora")
        _add_adapter(self.motion_controlnet, Adapter.OBJECT, config)
        # theta_mixed = theta_0 + sg[camera] + object: the camera LoRA acts and does not learn.
        activate(self.motion_controlnet, Adapter.CAMERA, Adapter.OBJECT)
        train_only(self.motion_controlnet, Adapter.OBJECT)

    def loss_terms(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """L_mixed and lambda * L_ortho."""
        terms = super().loss_terms(prediction, target)
        if self.config.orthogonal_weight:
            loss = orthogonal_loss(self._pairs(), self.config.orthogonal_target)
            terms["orthogonal"] = self.config.orthogonal_weight * loss
        return terms

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The down projections of both LoRAs, layer by layer; as they are now, since FSDP exchanges parameters."""
        camera, obj = (adapter_parameters(self.motion_controlnet, adapter) for adapter in Adapter)
        pairs = [(camera[key], obj[key]) for key in sorted(camera.keys() & obj.keys()) if ".lora_A." in key]
        return [(c, o) for c, o in pairs if c.dim() == 2 or not self.config.orthogonal_linear_only]

    def save(self, folder: Path) -> None:
        """Writes object_lora."""
        save_adapter(self.motion_controlnet, Adapter.OBJECT, folder / "object_lora")


class StyleLoraStage(Stage):
    """A LoRA of the UNet's spatial attention, as diffusers stores and loads them."""

    def __init__(self, networks: Networks, config: TrainConfig):
        super().__init__(networks, config)
        networks.freeze()
        spatial = [name for name in lora_targets(self.unet, "linear") if _SPATIAL_ATTENTION.search(name)]
        rank = config.lora_rank
        settings: Any = {"r": rank, "lora_alpha": rank, "init_lora_weights": "gaussian", "target_modules": spatial}
        with _seeded(config):
            inject_adapter_in_model(LoraConfig(**settings), self.unet, adapter_name=_STYLE)
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `Stage.forward`, without trajectories."""
        with torch.no_grad():
            residuals = self.image_controlnet(t, condition.text, condition.first_frame, condition.mask)
        return self.unet.decode(self.unet.encode(x_t, t, condition.text), residuals)

    def save(self, folder: Path) -> None:
        """Writes style_lora/pytorch_lora_weights.safetensors, which `sample.py --lora` takes."""
        tensors = {
            f"unet.{name.replace(f'.{_STYLE}.', '.')}": parameter.detach().half().cpu().contiguous()
            for name, parameter in self.unet.named_parameters()
            if ".lora_" in name
        }
        target = folder / "style_lora" / "pytorch_lora_weights.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target, metadata={"format": "pt"})


STAGES: dict[StageName, type[Stage]] = {
    StageName.FOUNDATION: FoundationStage,
    StageName.MOTION_CONTROLNET: MotionControlNetStage,
    StageName.CAMERA_LORA: CameraStage,
    StageName.OBJECT_LORA: ObjectStage,
    StageName.STYLE_LORA: StyleLoraStage,
}


def _add_adapter(network: nn.Module, adapter: Adapter, config: TrainConfig) -> None:
    with _seeded(config):
        add_adapter(network, adapter, rank=config.lora_rank, targets=lora_targets(network, config.lora_targets))


@contextmanager
def _seeded(config: TrainConfig) -> Iterator[None]:
    """Peft draws A from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        yield
