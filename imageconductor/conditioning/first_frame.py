"""The first frame, or several, from picture files to the condition of the image ControlNet."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from imageconductor.conditioning.trajectory_json import check_size
from imageconductor.diffusion.latents import scale_latents

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


BACKGROUND = (255, 255, 255)
"""What stands behind the transparent parts of a picture: white, as in most viewers."""

_COLOUR = cast("Any", ImageCms)  # without types of its own
_INTEGER_FORMATS = ("PNG", "PPM")  # their 16-bit pictures may be opened as 32-bit integers from 0 to 65535
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF file


def load_image(path: str | Path) -> Image.Image:
    """The RGB picture in a file, as a viewer shows it: see `to_rgb`. Of an animation, its first frame.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable picture, or one whose pixels state no white.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            if getattr(image, "default_image", False):
                image.seek(1)  # An APNG's frame 0 may be a stand-in for viewers that show no animation.
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"damaged image: {error}"
        raise ValueError(f"{path}: {reason}; give a PNG, JPEG or WebP file") from error
    return to_rgb(image, str(path))


def to_rgb(image: Image.Image, source: str = "image") -> Image.Image:
    """A picture of any mode as 8-bit RGB: scaled to 8 bits, upright by its EXIF orientation, on `BACKGROUND`.

    Args:
        image: any picture that Pillow opens, also one with transparency, a palette, CMYK or CIELAB.
        source: name at the start of messages.

    Raises:
        ValueError: no picture of Pillow's, or numbers of 32 bits, which do not say how bright white is.
    """
    if not isinstance(cast("object", image), Image.Image):
        raise ValueError(f"{source}: expected a PIL image, got {type(image).__name__}")
    if image.mode == "RGB" and not image.has_transparency_data and not image.getexif():
        return image
    white = _white_level(image, source)
    is_inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    try:
        image = ImageOps.exif_transpose(image)
        if white is not None:
            image = _scale_to_8_bits(image, white, is_inverted)
        elif image.mode == "LAB":
            profiles = _COLOUR.createProfile("LAB"), _COLOUR.createProfile("sRGB")
            image = _COLOUR.profileToProfile(image, *profiles, outputMode="RGB")
        elif image.mode == "La":  # premultiplied; Pillow converts it to its own straight form alone
            image = image.convert("LA")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, ImageCms.PyCMSError) as error:
        raise ValueError(f"{source}: cannot be turned into RGB: {error}; save it as RGB with 8 bits") from error


def _white_level(image: Image.Image, source: str) -> int | None:
    """The number that stands for white in a picture of more than 8 bits; None = at most 8 bits."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        return 2**bits - 1
    if image.mode == "I" and image.format in _INTEGER_FORMATS:
        return 65535
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"{source}: its pixels are {kind}, which do not say how bright white is; save 8 or 16 bits")
    return None


def _scale_to_8_bits(image: Image.Image, white: int, is_inverted: bool) -> Image.Image:
    """Gray levels from 0 to `white` as 8 bits, with alpha if one level is transparent."""
    levels = np.asarray(image)
    scaled = np.rint(levels.clip(0, white) * (255 / white)).astype(np.uint8)
    gray = Image.fromarray(255 - scaled if is_inverted else scaled)
    if (transparent := image.info.get("transparency")) is not None:
        gray.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return gray


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
    """`image` as RGB, cover-cropped to `size` (W, H): (1, 3, H, W) float32 in [-1, 1]."""
    values = np.array(cover_crop(to_rgb(image), size), dtype=np.float32) / 127.5 - 1
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
    return scale_latents(latent, cast("Any", vae.config))


def keyframe_condition(latents: Tensor, frames: Sequence[int], num_frames: int) -> tuple[Tensor, Tensor]:
    """A clip of zeros with latents at some of its frames, and the mask of those frames.

    Args:
        latents: (B, C, K, h, w), scaled.
        frames: K numbers of frames, (0,) for a first frame alone.
        num_frames: T.

    Returns:
        (B, C, T, h, w), and (B, 1, T, h, w) with ones where latents are; dtype of `latents`.

    Raises:
        ValueError: The latents have another shape, or a frame is not among the clip's.
    """
    if latents.ndim != 5 or num_frames < 1:
        raise ValueError(
            f"need (B, C, K, h, w) latents and at least one frame, got {tuple(latents.shape)} and {num_frames} frames"
        )
    if latents.shape[2] != len(frames) or not all(0 <= frame < num_frames for frame in frames):
        raise ValueError(f"{latents.shape[2]} latents cannot stand at frames {list(frames)} of {num_frames}")
    batch, channels, _, height, width = latents.shape
    clip = latents.new_zeros(batch, channels, num_frames, height, width)
    mask = latents.new_zeros(batch, 1, num_frames, height, width)
    clip[:, :, list(frames)] = latents
    mask[:, :, list(frames)] = 1
    return clip, mask
