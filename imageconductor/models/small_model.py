"""A family of small models of the same classes as the full one, and the bundled model's architecture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.models.networks import Networks

_NO_LIMIT = 1 << 20  # tokens: merges are learned until every word is one


@dataclass(frozen=True)
class SmallModelConfig:
    """Sizes of a small model; everything but the sizes is as at full scale, the prediction type apart."""

    autoencoder_channels: tuple[int, ...] = (32, 64, 96)  # one more level doubles the VAE scale factor
    latent_channels: int = 8  # of the autoencoder
    block_out_channels: tuple[int, ...] = (64, 96, 160)  # of the UNet's levels
    layers_per_block: int = 1  # residual blocks of each level
    num_attention_heads: int = 4  # of every attention
    norm_num_groups: int = 8  # must divide every channel count
    motion_max_seq_length: int = 32  # frames that the motion modules have positions for
    text_width: int = 96  # channels of the text encoder
    text_layers: int = 2  # of the text encoder
    text_length: int = 48  # tokens
    # Spatial attention in the UNet's first level, as SD-1.5 has it: it carries texture to where it goes.
    attention_at_full_resolution: bool = False
    # The UNet reads the first frame at places that it chooses; a small one learns in minutes to carry content so.
    first_frame_warp: bool = False
    # Its skip connections see what the flow map says would arrive.
    first_frame_skips: bool = False
    # "v_prediction" and "sample" learn faster from scratch than "epsilon", with zero terminal SNR.
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    # Accumulated, as the paper's text has it: each frame tells how far things have come (docs/decisions.md, 21).
    flow_map: dict[str, float | int | str | bool] = field(
        default_factory=lambda: {
            "kernel_size": 17,
            "sigma_px": 2.5,
            "normalisation": "peak",
            "accumulate": True,
            "still_drift_px": 0.0,
            "scale": 0.25,
        }
    )

    def __post_init__(self) -> None:
        for width in (*self.autoencoder_channels, *self.block_out_channels):
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide {width} channels")
        if self.first_frame_warp and self.prediction_type != "sample":
            raise ValueError(f'first_frame_warp needs prediction_type "sample", got {self.prediction_type!r}')


def build_small_model(config: SmallModelConfig, captions: Iterable[str], seed: int = 0) -> Networks:
    """A small untrained model of the same classes as the full one.

    Args:
        config: Its sizes.
        captions: Texts that the tokenizer's vocabulary is learned from.
        seed: Of the random weights.
    """
    tokenizer = build_tokenizer(captions, config.text_length)
    levels = len(config.block_out_channels)
    first = "CrossAttn" if config.attention_at_full_resolution else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder_levels: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * len(config.autoencoder_channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(config.autoencoder_channels),
            "block_out_channels": config.autoencoder_channels,
        }
        vae = AutoencoderKL(
            **autoencoder_levels,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=False,
        )
        for module in vae.modules():  # Residual blocks that begin as the identity: docs/log.md.
            if isinstance(module, ResnetBlock2D):
                nn.init.zeros_(module.conv2.weight)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=config.text_length,
                **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
            )
        )
        unet = MotionUNet(
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            down_block_types=(f"{first}DownBlockMotion", *("CrossAttnDownBlockMotion",) * (levels - 1)),
            up_block_types=(*("CrossAttnUpBlockMotion",) * (levels - 1), f"{first}UpBlockMotion"),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            cross_attention_dim=config.text_width,
            num_attention_heads=config.num_attention_heads,
            motion_num_attention_heads=config.num_attention_heads,
            motion_max_seq_length=config.motion_max_seq_length,
            norm_num_groups=config.norm_num_groups,
            use_motion_mid_block=False,
            first_frame_warp=config.first_frame_warp,
            first_frame_skips=config.first_frame_skips,
        )
        vae_scale_factor = 2 ** (len(config.autoencoder_channels) - 1)
        image_controlnet = ImageControlNet.from_unet(unet, conditioning_channels=config.latent_channels)
        motion_controlnet = MotionControlNet.from_unet(unet, vae_scale_factor, flow_map=dict(config.flow_map))
    zero_snr = config.prediction_type != "epsilon"
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
        steps_offset=0 if zero_snr else 1,
    )
    networks = Networks(vae, text_encoder, tokenizer, unet, scheduler, image_controlnet, motion_controlnet)
    networks.freeze()
    return networks


def add_full_resolution_attention(networks: Networks, seed: int = 0) -> None:
    """Gives a small model spatial attention in its first level that changes nothing yet: its output projection is zero.

    Args:
        networks: UNet and ControlNets are replaced.
        seed: Of the new weights.

    Raises:
        ValueError: It has such attention.
    """
    old = networks.unet.config
    if old["down_block_types"][0] != "DownBlockMotion":
        raise ValueError("the model has spatial attention in its first level")
    levels = len(old["block_out_channels"])
    kinds = {
        "down_block_types": ("CrossAttnDownBlockMotion",) * levels,
        "up_block_types": ("CrossAttnUpBlockMotion",) * levels,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in ("unet", "image_controlnet", "motion_controlnet"):
            before: Any = getattr(networks, name)
            types = {key: kinds[key] for key in kinds if key in before.config}
            after = type(before).from_config({**before.config, **types})
            missing = set(after.load_state_dict(before.state_dict(), strict=False).missing_keys)
            for path, module in after.named_modules():
                if path.endswith("proj_out") and f"{path}.weight" in missing:
                    nn.init.zeros_(module.weight)
                    nn.init.zeros_(module.bias)
            setattr(networks, name, after)
    networks.freeze()


@torch.no_grad()
def predict_v(networks: Networks) -> None:
    """Makes a small model that predicts x_0 with the help of a given picture predict v without one.

    What reads the picture is left out; the up path still reads the features of the first frame. Where there is no
    signal (zero terminal SNR), v is -x_0, so there the rest says what it said. At the other timesteps it has to be
    trained on.

    Args:
        networks: UNet and scheduler are replaced.

    Raises:
        ValueError: It does not predict x_0 ("sample").
    """
    old, scheduler = networks.unet, networks.scheduler
    if scheduler.config["prediction_type"] != "sample":
        raise ValueError(f'a model that predicts "sample" is needed, got {scheduler.config["prediction_type"]!r}')
    after: Any = MotionUNet.from_config({**old.config, "first_frame_output": False, "first_frame_skips": False})
    kept = old.state_dict()
    after.load_state_dict({name: kept[name] for name in after.state_dict()})
    for weights in after.conv_out.parameters():
        weights.neg_()
    networks.unet = after
    networks.scheduler = DDIMScheduler.from_config({**scheduler.config, "prediction_type": "v_prediction"})
    networks.freeze()


def build_tokenizer(captions: Iterable[str], length: int) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the captions is one token; other words fall apart into bytes."""
    blank, end = CLIPTokenizer(), "</w>"
    words = sorted({word for caption in captions for word, _ in _pre_tokens(blank, caption)})
    learned = Tokenizer(BPE(end_of_word_suffix=end))
    learned.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    # Ties are broken by the tokens' numbers. The trainer would number endings in the order of a hash table, another one
    # in each call.
    endings = [letter + end for letter in sorted({letter for word in words for letter in word})]
    trainer = BpeTrainer(
        vocab_size=_NO_LIMIT, min_frequency=1, end_of_word_suffix=end, show_progress=False, special_tokens=endings
    )
    learned.train_from_iterator([" ".join(words)], trainer)
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    alphabet = sorted(ByteLevel.alphabet())
    known = [*alphabet, *(letter + end for letter in alphabet), *map("".join, merges)]
    vocabulary = dict.fromkeys([*known, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,  # type: ignore[arg-type]
        model_max_length=length,
    )


def _pre_tokens(tokenizer: CLIPTokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    backend = tokenizer.backend_tokenizer
    return backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
