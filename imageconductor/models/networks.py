"""The parts of a model folder, as training and assembly use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.denoiser import Denoiser
from imageconductor.models.motion_unet import MotionUNet


@dataclass
class Networks:
    """All parts of a model."""

    vae: Any  # AutoencoderKL, whose outputs diffusers does not type
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: MotionUNet
    image_controlnet: ImageControlNet
    motion_controlnet: MotionControlNet
    scheduler: Any  # DDIMScheduler

    @classmethod
    def load(cls, folder: str | Path) -> Networks:
        """The parts of a model folder in float32, in eval mode and frozen, without LoRAs.

        Raises:
            FileNotFoundError: The folder, or a part of it, is missing.
        """
        folder = cls.check_folder(folder)
        with single_progress_bar():
            networks = cls(
                vae=AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32),
                text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
                tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
                unet=MotionUNet.from_pretrained(folder / "unet", dtype=torch.float32),
                image_controlnet=ImageControlNet.from_pretrained(folder / "image_controlnet", dtype=torch.float32),
                motion_controlnet=MotionControlNet.from_pretrained(folder / "motion_controlnet", dtype=torch.float32),
                scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
            )
        networks.freeze()
        return networks

    @classmethod
    def check_folder(cls, folder: str | Path) -> Path:
        """The folder of a model, once it is sure that no part is missing.

        Raises:
            FileNotFoundError: The folder, or a part of it, is missing.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no model folder at {folder}")
        if missing := [name for name in cls.__annotations__ if not (folder / name).is_dir()]:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
        return folder

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks among the parts, by name."""
        names = ("vae", "text_encoder", "unet", "image_controlnet", "motion_controlnet")
        return {name: getattr(self, name) for name in names}

    @property
    def denoiser(self) -> Denoiser:
        """The networks that predict the noise."""
        return Denoiser(self.unet, self.image_controlnet, self.motion_controlnet)

    def freeze(self) -> None:
        """Puts every network into eval mode without gradients."""
        for network in self.modules.values():
            network.eval().requires_grad_(False)

    def to(self, dtype: torch.dtype) -> None:
        """Casts every network, in place."""
        for network in self.modules.values():
            cast_network(network, dtype)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(B, L) int64 token ids, padded and cut to the text encoder's length."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.text_encoder.config.max_position_embeddings,
            return_tensors="pt",
        )
        return tokens.input_ids


def cast_network(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts a network in place; diffusers' own `to` warns of an empty list of modules that it would keep in float32."""
    nn.Module.to(cast(Any, network), dtype)


@contextmanager
def single_progress_bar() -> Iterator[None]:
    """Inside the block transformers shows no progress bars within those of diffusers and of our commands."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
