"""Latents as the UNet sees them: shifted and scaled by what the configuration of the VAE says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def scale_latents(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """(z - shift_factor) * scaling_factor of the VAE's latents z, of any shape."""
    shift = vae_config.get("shift_factor")
    return (latents if shift is None else latents - shift) * vae_config["scaling_factor"]


def unscale_latents(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """The VAE's latents, of those that `scale_latents` gives."""
    shift, latents = vae_config.get("shift_factor"), latents / vae_config["scaling_factor"]
    return latents if shift is None else latents + shift
