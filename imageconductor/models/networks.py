"""The parts of a model folder, as training and assembly use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.denoiser import Denoiser
from imageconductor.models.motion_unet import MotionUNet

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Encoders:
    """The parts of a model that encode clips and captions."""

    KINDS: ClassVar[dict[str, Any]] = {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
    }

    vae: Any  # AutoencoderKL, whose outputs diffusers does not type
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The parts of a model folder, networks in float32, in eval mode and frozen, without LoRAs.

        Raises:
            FileNotFoundError: The folder, or a part of it, is missing.
        """
        folder = cls.check_folder(folder)
        parts = {}
        with single_progress_bar():
            for name, kind in cls.KINDS.items():
                precision = {"dtype": torch.float32} if issubclass(kind, nn.Module) else {}
                parts[name] = cast("Any", kind).from_pretrained(folder / name, **precision)
        loaded = cls(**parts)
        loaded.freeze()
        return loaded

    @classmethod
    def check_folder(cls, folder: str | Path) -> Path:
        """The folder of a model, once it is sure that no part is missing.

        Raises:
            FileNotFoundError: The folder, or a part of it, is missing.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no model folder at {folder}")
        if missing := [name for name in cls.KINDS if not (folder / name).is_dir()]:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
        return folder

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks among the parts, by name."""
        return {name: part for name, part in vars(self).items() if isinstance(part, nn.Module)}

    def freeze(self) -> None:
        """Puts every network into eval mode without gradients."""
        for network in self.modules.values():
            network.eval().requires_grad_(False)

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


@dataclass
class Networks(Encoders):
    """All parts of a model."""

    KINDS: ClassVar[dict[str, Any]] = {
        **Encoders.KINDS,
        "unet": MotionUNet,
        "image_controlnet": ImageControlNet,
        "motion_controlnet": MotionControlNet,
        "scheduler": DDIMScheduler,
    }

    unet: MotionUNet
    image_controlnet: ImageControlNet
    motion_controlnet: MotionControlNet
    scheduler: Any  # DDIMScheduler

    @property
    def denoiser(self) -> Denoiser:
        """The networks that predict the noise."""
        return Denoiser(self.unet, self.image_controlnet, self.motion_controlnet)

    def to(self, dtype: torch.dtype) -> None:
        """Casts every network, in place."""
        for network in self.modules.values():
            cast_network(network, dtype)


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
