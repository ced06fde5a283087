"""Networks and whole models with random weights, in three sizes, so that any size runs anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from sampling_memory import SD15_VAE
from transformers import CLIPTextConfig, CLIPTextModel

from imageconductor.data.sprites import caption_words
from imageconductor.models.adapters import Adapter, adapter_parameters, add_adapter
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.denoiser import Denoiser
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.models.networks import Networks
from imageconductor.models.small_model import build_tokenizer


@dataclass(frozen=True)
class Size:
    """Networks and videos of a size.

    In "mid", each kind of layer has about the share of the work that it has at full size: the ratios of tokens, text
    and rank to channels are nearly the same.
    """

    channels: tuple[int, ...]
    heads: int
    text: tuple[int, int]  # L, D
    rank: int
    frames: int
    latent: tuple[int, int]  # h, w
    autoencoder: tuple[int, int, int, int]  # channels
    vocabulary: int = 0  # of the text encoder, at least

    @property
    def pixels(self) -> tuple[int, int]:
        """(W, H) of a video."""
        return 8 * self.latent[1], 8 * self.latent[0]


SIZES = {
    "tiny": Size((32, 64, 64), 2, (8, 32), 8, 4, (8, 8), (8, 16, 16, 16)),
    "mid": Size((64, 128, 256, 256), 4, (20, 160), 12, 8, (16, 24), (24, 48, 96, 96)),
    "full": Size((320, 640, 1280, 1280), 8, (77, 768), 64, 16, (32, 48), (128, 256, 512, 512), 49_408),
}


def build_networks(size: Size, device: torch.device, dtype: torch.dtype, has_loras: bool = True) -> Denoiser:
    """Networks with random weights, none of them zero, and as a rule both LoRAs."""
    torch.manual_seed(0)
    depth = len(size.channels) - 1
    with device:
        unet = MotionUNet(
            block_out_channels=size.channels,
            down_block_types=("CrossAttnDownBlockMotion",) * depth + ("DownBlockMotion",),
            up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * depth,
            cross_attention_dim=size.text[1],
            num_attention_heads=size.heads,
            motion_num_attention_heads=size.heads,
            use_motion_mid_block=False,
        )
        image = ImageControlNet.from_unet(unet, conditioning_channels=4)
        motion = MotionControlNet.from_unet(unet)
        for adapter in Adapter if has_loras else ():
            add_adapter(motion, adapter, rank=size.rank)
            for parameter in adapter_parameters(motion, adapter).values():
                parameter.data.normal_(0, 0.02)
    for network in (unet, image, motion):
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.data.normal_(0, 0.02)
        torch.nn.Module.to(network, dtype)
    return Denoiser(unet, image, motion)


def build_model(size: Size, device: torch.device, dtype: torch.dtype, has_loras: bool = True) -> Networks:
    """All parts of a model, as `build_networks` has them; the tokenizer knows the captions of sprite clips."""
    denoiser = build_networks(size, device, dtype, has_loras)
    length, width = size.text
    tokenizer = build_tokenizer([" ".join(caption_words())], length)
    with device:
        vae = AutoencoderKL(
            **{**SD15_VAE, "block_out_channels": size.autoencoder}, norm_num_groups=math.gcd(32, *size.autoencoder)
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=max(len(tokenizer), size.vocabulary),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=12,
                num_attention_heads=max(1, width // 64),
                max_position_embeddings=length,
                **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", steps_offset=1, clip_sample=False
    )
    parts = denoiser.image_controlnet, denoiser.motion_controlnet
    model = Networks(vae, text_encoder, tokenizer, denoiser.unet, scheduler, *parts)
    model.freeze()
    model.to(dtype)
    return model
