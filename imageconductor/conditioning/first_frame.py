"""The first frame, from a picture file to the condition of the image ControlNet."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from imageconductor.conditioning.trajectory_json import check_size

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


def load_image(path: str | Path) -> Image.Image:
    """The RGB picture in a file, upright according to its EXIF orientation.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable picture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    try:
        with path.open("rb") as file:
            return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"damaged image: {error}"
        raise ValueError(f"{path}: {reason}; give a PNG, JPEG or WebP file") from error


def cover_scale(old: tuple[int, int], new: tuple[int, int]) -> float:
    """The smallest scale at which a picture of size `old` (W, H) covers `new`."""
    return max(new[0] / old[0], new[1] / old[1])


def cover_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` resized to cover `size` (W, H), bicubic and antialiased, and cropped around its centre.

    A single resampling does both, so the crop is exactly centred. `Trajectories.cover_crop` moves points accordingly.
    """
    width, height = check_size(size)
    if image.size == (width, height):
        return image
    scale = cover_scale(image.size, (width, height))
    half_w, half_h = min(width / scale, image.width) / 2, min(height / scale, image.height) / 2
    x, y = image.width / 2, image.height / 2
    box = (x - half_w, y - half_h, x + half_w, y + half_h)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """`image` cover-cropped to `size` (W, H): (1, 3, H, W) float32 in [-1, 1]."""
    values = np.array(cover_crop(image.convert("RGB"), size), dtype=np.float32) / 127.5 - 1
    return torch.as_tensor(values).permute(2, 0, 1)[None].contiguous()


@torch.no_grad()
def encode_first_frame(vae: "AutoencoderKL", pixels: Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """Scaled latent of the first frame, without gradient.

    It is the mode of the posterior, so equal pictures give equal latents; the published release draws an unseeded
    sample.

    Args:
        vae: frozen autoencoder; runs in its own dtype and on its own device.
        pixels: (B, 3, H, W) in [-1, 1].
        device: where the autoencoder computes; None = where it is, which differs while it is offloaded.

    Returns:
        (B, C, h, w) in the VAE's dtype: (z - shift_factor) * scaling_factor.
    """
    posterior = cast("Any", vae.encode(pixels.to(device or vae.device, vae.dtype))).latent_dist
    latent: Tensor = posterior.mode()
    config = cast("Any", vae.config)
    shift = getattr(config, "shift_factor", None)
    return (latent if shift is None else latent - shift) * config.scaling_factor


def first_frame_condition(latent: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """A clip of zeros with the latent as frame 0, and the mask of that frame.

    Args:
        latent: (B, C, h, w), scaled.
        num_frames: T.

    Returns:
        (B, C, T, h, w) zeros with `latent` at frame 0; (B, 1, T, h, w) zeros with ones at frame 0. dtype of `latent`.
    """
    if latent.ndim != 4 or num_frames < 1:
        raise ValueError(
            f"need a (B, C, h, w) latent and at least one frame, got {tuple(latent.shape)} and {num_frames} frames"
        )
    batch, channels, height, width = latent.shape
    clip = latent.new_zeros(batch, channels, num_frames, height, width)
    mask = latent.new_zeros(batch, 1, num_frames, height, width)
    clip[:, :, 0] = latent
    mask[:, :, 0] = 1
    return clip, mask
