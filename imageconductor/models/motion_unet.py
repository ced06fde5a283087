"""The video UNet in two halves, so that branches of the guidance can share the first."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  diffusers finds out how to load a class from its module's names
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from diffusers.models.unets.unet_motion_model import UNetMotionModel, UNetMotionOutput
from einops import rearrange
from torch import Tensor, nn

from imageconductor.models.controlnets import Residuals
from imageconductor.models.first_frame_warp import WarpedOutput, WarpedSkips, add_first_frame_warp_
from imageconductor.models.gating import Gating, open_gate_places_
from imageconductor.models.motion_module import (
    adopt_motion_modules_,
    adopt_temporal_layers_,
    attention_arguments,
    run_block,
    run_down_path,
    run_layer,
    signature_with,
)
from imageconductor.models.text_attention import adopt_text_attention_

SD15_ANIMATEDIFF_V3: dict[str, Any] = {"cross_attention_dim": 768, "use_motion_mid_block": False}
"""What differs from diffusers' defaults in the UNet of SD-1.5 with AnimateDiff v3 (and in the published weights)."""


@dataclass(frozen=True)
class UNetFeatures:
    """What the first half of the UNet computed from (x_t, t, text, gating), and no ControlNet can change.

    Attributes:
        skips: The 12 outputs of the down path (at SD-1.5's depth), each (B*T, C_i, h_i, w_i).
        mid: (B*T, C, h, w), after the mid block.
        emb: (B*T, 4*C_0), time embedding.
        text: (B, L, D).
        num_frames: T.
        gating: What gates do, in the second half too; None = nothing.
    """

    skips: tuple[Tensor, ...]
    mid: Tensor
    emb: Tensor
    text: Tensor
    num_frames: int
    gating: Gating | None = None

    def videos(self, start: int, stop: int) -> UNetFeatures:
        """Features of the videos start..stop-1 of the batch, as views."""
        rows = slice(start * self.num_frames, stop * self.num_frames)
        gating = None if self.gating is None else self.gating.rows(rows)
        skips, text = tuple(skip[rows] for skip in self.skips), self.text[start:stop]
        return UNetFeatures(skips, self.mid[rows], self.emb[rows], text, self.num_frames, gating)

    @staticmethod
    def stack(parts: Sequence[UNetFeatures]) -> UNetFeatures:
        """The videos of several parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        skips = tuple(torch.cat(skip) for skip in zip(*(part.skips for part in parts), strict=True))
        mid, emb, text = (torch.cat([getattr(part, name) for part in parts]) for name in ("mid", "emb", "text"))
        gatings = [part.gating for part in parts if part.gating is not None]
        return UNetFeatures(skips, mid, emb, text, parts[0].num_frames, Gating.stack(gatings) if gatings else None)


class TwoHalves:
    """A video UNet of diffusers as `decode(encode(x_t, t, text), residuals)`.

    ControlNet residuals join after the down path and after the mid block, so `encode` depends on (x_t, t, text) and
    gates only.
    """

    checkpoint_blocks = False  # True: no activation inside a layer is kept, and the layer is computed again.
    dtype: Any
    time_proj: Any
    time_embedding: Any
    conv_in: Any
    transformer_in: Any
    mid_block: Any
    up_blocks: Any
    conv_norm_out: Any
    conv_out: Any
    linear_out: Any  # these two where there is a `first_frame_warp` with `first_frame_output`
    warped_out: Any
    warped_skips: Any  # where there are any
    named_children: Any

    @property
    def _group_offload_block_modules(self) -> list[str]:
        """What diffusers offloads in groups beside the blocks, each when it is called itself.

        It would else come with the UNet's `forward`, which sampling does not call.
        """
        return [name for name, child in self.named_children() if not isinstance(child, nn.ModuleList)]

    def encode(
        self, sample: Tensor, timestep: Tensor | int, encoder_hidden_states: Tensor, gating: Gating | None = None
    ) -> UNetFeatures:
        """Features of the down path and the mid block.

        Args:
            sample: (B, C, T, h, w), x_t.
            timestep: () or (B,) int64.
            encoder_hidden_states: (B, L, D), text.
            gating: What gates do; None = nothing.
        """
        if hook := getattr(self, "_hf_hook", None):
            hook.pre_forward(self)  # accelerate's offloading waits for `forward`, which sampling does not call.
        batch, num_frames = sample.shape[0], sample.shape[2]
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(batch)
        emb = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        emb = emb.repeat_interleave(num_frames, dim=0)

        hidden = self.conv_in(rearrange(sample, "b c t h w -> (b t) c h w"))
        if gating is not None:
            gating = replace(gating, size=(sample.shape[3], sample.shape[4]))
            if gating.input_features is not None:
                hidden = hidden + gating.input_features
        if hasattr(self, "transformer_in"):
            enter = self.transformer_in
            hidden = run_layer(self, enter, enter.forward, hidden, num_frames=num_frames, return_dict=False)[0]
        arguments = attention_arguments(encoder_hidden_states, gating)
        hidden, skips = run_down_path(self, hidden, emb, arguments, num_frames)
        if any(hasattr(self.mid_block, name) for name in ("motion_modules", "temp_attentions")):
            arguments["num_frames"] = num_frames
        hidden = run_block(self, self.mid_block, hidden, emb, **arguments)
        return UNetFeatures(skips, hidden, emb, encoder_hidden_states, num_frames, gating)

    def decode(self, features: UNetFeatures, residuals: Residuals | None = None) -> Tensor:
        """Model output (B, C, T, h, w) of the up path, the residuals added to the features it reads."""
        skips, hidden = features.skips, features.mid
        if features.gating is not None:
            residuals = features.gating.tell(residuals)
        if residuals is not None:
            if len(residuals.down) != len(skips):
                raise ValueError(f"the UNet has {len(skips)} skip connections, got {len(residuals.down)} residuals")
            skips = tuple(skip + residual for skip, residual in zip(skips, residuals.down, strict=True))
            hidden = hidden + residuals.mid
        if hasattr(self, "warped_skips"):
            skips = self.warped_skips(skips, residuals, features.num_frames)

        attends = attention_arguments(features.text, features.gating)
        for block in self.up_blocks:
            count = len(block.resnets)
            inputs, skips = skips[-count:], skips[:-count]
            # Named sizes keep odd latents (8x12 at four levels) in step with the skip connections.
            size = skips[-1].shape[2:] if skips else None
            arguments = attends if getattr(block, "has_cross_attention", False) else {}
            hidden = run_block(
                self,
                block,
                hidden_states=hidden,
                res_hidden_states_tuple=inputs,
                temb=features.emb,
                upsample_size=size,
                num_frames=features.num_frames,
                **arguments,
            )
        normed = F.silu(self.conv_norm_out(hidden))
        output = self.conv_out(normed)
        if hasattr(self, "warped_out"):
            output = self.warped_out(normed, output + self.linear_out(hidden), residuals, features.num_frames)
        return rearrange(output, "(b t) c h w -> b c t h w", t=features.num_frames)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetMotionOutput | tuple[Tensor]:
        """The whole UNet, under diffusers' argument names.

        Args:
            sample: (B, C, T, h, w).
            timestep: () or (B,) int64.
            encoder_hidden_states: (B, L, D).
            down_block_additional_residuals: Summed residuals of the ControlNets, each (B*T, C_i, h_i, w_i).
            mid_block_additional_residual: (B*T, C, h, w).
            return_dict: False returns a tuple.

        Returns:
            `.sample` (B, C, T, h, w).
        """
        residuals = None
        if down_block_additional_residuals is not None and mid_block_additional_residual is not None:
            residuals = Residuals(tuple(down_block_additional_residuals), mid_block_additional_residual)
        output = self.decode(self.encode(sample, timestep, encoder_hidden_states), residuals)
        return UNetMotionOutput(sample=output) if return_dict else (output,)


class MotionUNet(TwoHalves, UNetMotionModel):  # pyright: ignore[reportIncompatibleMethodOverride]
    """AnimateDiff's UNet.

    Args:
        args: As diffusers' `UNetMotionModel`.
        motion_norm_num_groups: Groups of the motion modules' norm; None = `norm_num_groups`.
        first_frame_warp: Whether the up path also reads the first frame's features at places that it chooses.
            AnimateDiff's does nothing of the kind; it is for small networks.
        first_frame_output: With `first_frame_warp`: whether the output, which is then x_0, reads the first frame's
            latents in the same way, and depends on the features linearly too.
        first_frame_skips: Whether skip connections are joined by the first frame's latents, moved as flow map or
            boxes tell; for small networks too.
        kwargs: As diffusers' `UNetMotionModel`.
    """

    def __init__(
        self,
        *args: Any,
        motion_norm_num_groups: int | None = None,
        first_frame_warp: bool = False,
        first_frame_output: bool = True,
        first_frame_skips: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        own = {"first_frame_warp": first_frame_warp, "first_frame_output": first_frame_output}
        own["first_frame_skips"] = first_frame_skips
        self.register_to_config(motion_norm_num_groups=motion_norm_num_groups, **own)
        adopt_motion_modules_(self, motion_norm_num_groups)
        if first_frame_warp and first_frame_output:
            self.linear_out = nn.Conv2d(self.conv_norm_out.num_channels, self.config["out_channels"], 1)
            nn.init.zeros_(self.linear_out.weight)
            nn.init.zeros_(self.linear_out.bias)  # type: ignore[arg-type]
            self.warped_out = WarpedOutput(self.conv_norm_out.num_channels)
        if first_frame_warp:
            add_first_frame_warp_(self, self.config["motion_num_attention_heads"], self.config["norm_num_groups"])
        if first_frame_skips:
            layers = self.config["layers_per_block"]
            count = 1 + (layers if isinstance(layers, int) else layers[0])  # of the latents' resolution
            self.warped_skips = WarpedSkips(self.config["in_channels"], self.config["block_out_channels"][0], count)
        open_gate_places_(self)
        adopt_text_attention_(self)

    __init__.__signature__ = signature_with(  # type: ignore
        UNetMotionModel.__init__,
        motion_norm_num_groups=None,
        first_frame_warp=False,
        first_frame_output=True,
        first_frame_skips=False,
    )


class TextToVideoUNet(TwoHalves, PeftAdapterMixin, UNet3DConditionModel):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The UNet of ModelScope's and ZeroScope's text-to-video models, MotionDirector's own base.

    Args:
        args: As diffusers' `UNet3DConditionModel`.
        kwargs: As diffusers' `UNet3DConditionModel`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        adopt_temporal_layers_(self)
        open_gate_places_(self)
        adopt_text_attention_(self)

    __init__.__signature__ = inspect.signature(UNet3DConditionModel.__init__)  # type: ignore
