"""The two ControlNets: RGB SparseCtrl for the first frame, and the motion ControlNet for drawn trajectories.

Neither sees the noisy latents, so both depend on (timestep, text, condition, adapter) alone and one evaluation serves
every seed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  diffusers finds out how to load a class from its module's names
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from einops import rearrange
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from imageconductor.conditioning.flow_map import FlowMapConvention
from imageconductor.models.adapters import Adapter
from imageconductor.models.motion_module import (
    adopt_motion_modules_,
    attention_arguments,
    run_down_path,
    signature_with,
)
from imageconductor.models.text_attention import adopt_text_attention_

_Net = TypeVar("_Net", bound="SparseControlNet")


class Control(str, Enum):
    """What the trajectories move."""

    CAMERA = "camera"
    OBJECT = "object"
    MIXED = "mixed"  # theta_mixed of Eq. 2: both adapters; beyond the release
    BASE = "base"  # theta_0: no adapter, camera and objects as stage 1 learned them


ADAPTERS: dict[Control, tuple[str, ...]] = {
    Control.CAMERA: (Adapter.CAMERA.value,),
    Control.OBJECT: (Adapter.OBJECT.value,),
    Control.MIXED: (Adapter.CAMERA.value, Adapter.OBJECT.value),
    Control.BASE: (),
}
"""LoRAs of the motion ControlNet that act under each control."""


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds to the UNet's skip connections and to its mid block.

    Attributes:
        down: One tensor a skip connection, each (B*T, C_i, h_i, w_i).
        mid: (B*T, C, h, w).
        pictures: (B*T, C, h, w), latents of the given frames as the image ControlNet read them, for a UNet that reads
            them itself (`first_frame_warp`); None = no pictures.
        displacements: (B*T, 2, h, w), how far what is at a place has come since frame 0, as flow map or boxes tell it,
            in widths and heights of the frame, x first, for such a UNet; 0 = nothing is told, None = none at all.
    """

    down: tuple[Tensor, ...]
    mid: Tensor
    pictures: Tensor | None = None
    displacements: Tensor | None = None

    def __add__(self, other: Residuals) -> Residuals:
        return Residuals(
            tuple(a + b for a, b in zip(self.down, other.down, strict=True)),
            self.mid + other.mid,
            other.pictures if self.pictures is None else self.pictures,
            other.displacements if self.displacements is None else self.displacements,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that there are."""
        return (*self.down, self.mid, *(x for x in (self.pictures, self.displacements) if x is not None))

    def apply(self, change: Callable[[Tensor], Tensor]) -> Residuals:
        """Residuals of which every tensor is changed alike."""
        pictures, displacements = (None if x is None else change(x) for x in (self.pictures, self.displacements))
        return Residuals(tuple(change(x) for x in self.down), change(self.mid), pictures, displacements)

    def repeat_videos(self, count: int, num_frames: int) -> Residuals:
        """Residuals for `count` videos of each condition: B*T rows become B*count*T, copies next to each other."""
        if count == 1:
            return self

        def repeat(x: Tensor) -> Tensor:
            videos = rearrange(x, "(b t) c h w -> b t c h w", t=num_frames)
            return videos.repeat_interleave(count, dim=0).flatten(0, 1)

        return self.apply(repeat)

    @staticmethod
    def stack(parts: Sequence[Residuals]) -> Residuals:
        """The rows of several parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        down = tuple(torch.cat(x) for x in zip(*(part.down for part in parts), strict=True))
        pictures = [part.pictures for part in parts if part.pictures is not None]
        if pictures and len(pictures) < len(parts):
            raise ValueError("pictures are given in some of the residuals and not in others")
        displacements = None
        told = next((part.displacements for part in parts if part.displacements is not None), None)
        if told is not None:
            nothing = told.new_zeros(1, *told.shape[1:])
            displacements = torch.cat(
                [nothing.expand(len(x.mid), -1, -1, -1) if x.displacements is None else x.displacements for x in parts]
            )
        mid = torch.cat([part.mid for part in parts])
        return Residuals(down, mid, torch.cat(pictures) if pictures else None, displacements)

    def videos(self, start: int, stop: int, num_frames: int) -> Residuals:
        """Residuals of the videos start..stop-1 of the batch, as views."""
        return self.apply(lambda x: x[start * num_frames : stop * num_frames])


class SparseControlNet(SparseControlNetModel):
    """SparseCtrl without the noisy input, which the original sets to zero; weights and config are diffusers'.

    Args:
        args: As diffusers' `SparseControlNetModel`.
        motion_norm_num_groups: Groups of the motion modules' norm; None = `norm_num_groups`.
        kwargs: As diffusers' `SparseControlNetModel`.
    """

    checkpoint_blocks = False  # True: no activation inside a layer is kept; it is computed again.

    def __init__(self, *args: Any, motion_norm_num_groups: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_to_config(motion_norm_num_groups=motion_norm_num_groups)
        adopt_motion_modules_(self, motion_norm_num_groups)
        adopt_text_attention_(self)

    __init__.__signature__ = signature_with(SparseControlNetModel.__init__, motion_norm_num_groups=None)  # type: ignore

    @classmethod
    def from_unet(cls: type[_Net], unet: Any, **overrides: Any) -> _Net:  # type: ignore[override]
        """A ControlNet that starts from the UNet's down path and adds nothing until it is trained.

        Args:
            unet: A `MotionUNet`.
            overrides: Config of the ControlNet where it differs from the UNet's, `conditioning_channels` above all.

        Source: ControlNet's initialisation; the condition embedding and the output convolutions are zero. A
        ControlNet's motion modules hold one attention where the UNet's hold two; the first is copied.
        """
        shared_keys = inspect.signature(cls.__init__).parameters.keys() & unet.config.keys()
        config = {key: unet.config[key] for key in shared_keys if not key.startswith("_")}
        config["attention_head_dim"] = unet.config["num_attention_heads"]  # diffusers means the number of heads.
        net = cls(**{**config, **overrides})
        source, target = unet.state_dict(), net.state_dict()
        shared = {
            key: source[key]
            for key, value in target.items()
            if key in source and source[key].shape == value.shape and not key.startswith("controlnet_")
        }
        # A single-attention block calls its feed-forward norm norm3 as the double one does; norm2 has no counterpart.
        net.load_state_dict(shared, strict=False)
        return net

    def unfreeze_(self) -> None:
        """Lets every weight learn that can: `conv_in` reads a zero sample, so its weight has no gradient."""
        self.requires_grad_(True)
        self.conv_in.weight.requires_grad_(False)

    def residuals(self, timestep: Tensor | int, encoder_hidden_states: Tensor, condition: Tensor) -> Residuals:
        """Residuals for the UNet.

        Args:
            timestep: () or (B,) int64.
            encoder_hidden_states: (B, L, D), text.
            condition: (B, C, T, h, w) at latent size, mask channel included; a batch of 1 serves every text.
        """
        batch, num_frames = encoder_hidden_states.shape[0], condition.shape[2]
        timesteps = torch.as_tensor(timestep, device=condition.device).expand(batch)
        emb = self.time_embedding(self.time_proj(timesteps).to(self.dtype)).repeat_interleave(num_frames, dim=0)

        embedded = self.controlnet_cond_embedding(
            rearrange(condition.to(self.dtype), "b c t h w -> (b t) c h w").contiguous()
        )
        if condition.shape[0] != batch:
            embedded = embedded.repeat(batch, 1, 1, 1)
        # conv_in of an all-zero sample is its bias, at any size.
        bias = cast(Tensor, self.conv_in.bias).view(1, -1, 1, 1)
        # Weights that accelerate or diffusers moves or casts layer by layer are ready when their layer is called.
        if any(hasattr(self.conv_in, hook) for hook in ("_hf_hook", "_diffusers_hook")):
            bias = self.conv_in(embedded.new_zeros(1, cast(Tensor, self.conv_in.weight).shape[1], 1, 1))
        hidden = bias + embedded
        hidden, skips = run_down_path(self, hidden, emb, attention_arguments(encoder_hidden_states), num_frames)
        hidden = self.mid_block(hidden, emb, encoder_hidden_states=encoder_hidden_states)
        down = tuple(block(skip) for block, skip in zip(self.controlnet_down_blocks, skips, strict=True))
        return Residuals(down, self.controlnet_mid_block(hidden))


class ImageControlNet(SparseControlNet):
    """RGB SparseCtrl: the first frame's latents and a mask that says which frame is given."""

    def forward(  # type: ignore[override]
        self, timestep: Tensor | int, encoder_hidden_states: Tensor, condition: Tensor, mask: Tensor
    ) -> Residuals:
        """Residuals that carry the appearance of the given frames.

        Args:
            timestep: () or (B,) int64.
            encoder_hidden_states: (B, L, D).
            condition: (B or 1, C, T, h, w), scaled latents, zero on frames that are not given.
            mask: (B or 1, 1, T, h, w), 1 on frames that are given.
        """
        residuals = self.residuals(timestep, encoder_hidden_states, torch.cat([condition, mask.to(condition)], dim=1))
        pictures = condition.expand(len(encoder_hidden_states), -1, -1, -1, -1)
        return replace(residuals, pictures=rearrange(pictures, "b c t h w -> (b t) c h w"))


class MotionControlNet(SparseControlNet):
    """ControlNet for flow maps of trajectories; carries LoRAs (`models/adapters.py`), the camera's and the object's.

    Args:
        args: As diffusers' `SparseControlNetModel`, whose `conditioning_channels` are 2 * (VAE scale factor)^2.
        flow_map: Fields of `FlowMapConvention`, saved with the weights so that they are never fed another convention.
        kwargs: As diffusers' `SparseControlNetModel`.
    """

    def __init__(self, *args: Any, flow_map: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_to_config(flow_map=asdict(FlowMapConvention(**(flow_map or {}))))
        self.unshuffle_factor = math.isqrt(self.config["conditioning_channels"] // 2)
        if 2 * self.unshuffle_factor**2 != self.config["conditioning_channels"]:
            raise ValueError(
                f"conditioning_channels must be 2 * factor^2 (128 at SD-1.5's factor 8), "
                f"got {self.config['conditioning_channels']}"
            )

    __init__.__signature__ = signature_with(SparseControlNet.__init__, flow_map=None)  # type: ignore

    @classmethod
    def from_unet(cls, unet: Any, vae_scale_factor: int = 8, **overrides: Any) -> MotionControlNet:
        """A motion ControlNet that starts from the UNet; a latent pixel is `vae_scale_factor` pixels wide."""
        settings = {"conditioning_channels": 2 * vae_scale_factor**2, "concat_conditioning_mask": False}
        net = super().from_unet(unet, **{**settings, **overrides})
        # Zero output convolutions make it neutral. A zero embedding besides, as ControlNet has it, would only keep the
        # flow map from everything behind it until those have grown (docs/decisions.md).
        weight = cast(Tensor, net.controlnet_cond_embedding.weight)
        if not weight.is_meta:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
        return net

    @property
    def flow_convention(self) -> FlowMapConvention:
        """How trajectories must be rasterised for these weights."""
        return FlowMapConvention(**self.config["flow_map"])

    def forward(self, timestep: Tensor | int, encoder_hidden_states: Tensor, flow: Tensor) -> Residuals:  # type: ignore[override]
        """Residuals that carry the motion.

        Args:
            timestep: () or (B,) int64.
            encoder_hidden_states: (B, L, D).
            flow: (B or 1, 2, T, H, W), flow map in pixels, channel 0 = x.

        Source: pixel-unshuffled per frame, channel = c*f*f + dy*f + dx, as the published modules.
        """
        pictures = rearrange(flow, "b c t h w -> (b t) c h w")
        frames = F.pixel_unshuffle(pictures, self.unshuffle_factor)
        residuals = self.residuals(
            timestep, encoder_hidden_states, rearrange(frames, "(b t) c h w -> b c t h w", t=flow.shape[2])
        )
        convention = self.flow_convention
        if not convention.accumulate or convention.normalisation == "sum":
            return residuals  # These values are no displacements since frame 0.
        side = pictures.new_tensor(pictures.shape[:-3:-1]).view(2, 1, 1) * convention.scale
        displacements = F.avg_pool2d(pictures / side, self.unshuffle_factor)
        copies = len(encoder_hidden_states) // len(flow)
        return replace(residuals, displacements=displacements.repeat(copies, 1, 1, 1))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes the network without its LoRAs, which have files of their own (`adapters.save_adapter`).

        Raises:
            ValueError: A LoRA is merged into the weights.
        """
        layers = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            raise ValueError(
                "a LoRA is merged into the motion ControlNet; peft's unmerge() of its layers takes it out before saving"
            )
        if not layers:
            super().save_pretrained(save_directory, **kwargs)
            return
        base = {k.replace(".base_layer.", "."): v for k, v in self.state_dict().items() if ".lora_" not in k}
        with torch.device("meta"):  # The copy borrows the tensors, so it costs no memory.
            plain = cast(MotionControlNet, type(self).from_config(self.config))
        plain.load_state_dict(base, assign=True)
        plain.save_pretrained(save_directory, **kwargs)
