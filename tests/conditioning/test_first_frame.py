import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from imageconductor.conditioning import (
    Trajectories,
    cover_crop,
    encode_first_frame,
    first_frame_condition,
    load_image,
    to_pixels,
)


def blob(size, at, sigma=4.0):
    """A picture with one bright spot whose centre of mass is `at`."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(255 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * sigma**2)).astype(np.float32))


def centre_of_mass(image):
    values = np.asarray(image, np.float64)
    y, x = np.indices(values.shape)
    return np.array([(values * x).sum(), (values * y).sum()]) / values.sum()


@pytest.mark.parametrize("new", [(48, 32), (61, 61), (30, 47), (240, 100), (384, 256)])
def test_cover_crop_moves_points_with_the_picture(new):
    old, at = (151, 100), (80.0, 44.0)
    tracks = Trajectories.from_tracks([[at]], old, 1).cover_crop(new)
    image = cover_crop(blob(old, at), new)
    assert image.size == tracks.size == new
    assert np.abs(centre_of_mass(image) - tracks.points[0, 0].numpy()).max() < 0.02
    assert tracks.visible.all()


def test_what_cover_crop_cuts_away_is_invisible():
    tracks = Trajectories.from_tracks([[[10, 50], [190, 50]]], (200, 100), 5).cover_crop((50, 50))
    assert tracks.visible.tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("new", [(64, 32), (40, 25), (320, 200)])
def test_resize_moves_points_with_the_picture(new):
    old, at = (160, 100), (70.0, 44.0)
    image = blob(old, at).resize(new, Image.Resampling.BICUBIC)
    point = Trajectories.from_tracks([[at]], old, 1).resize(new).points[0, 0].numpy()
    assert np.abs(centre_of_mass(image) - point).max() < 0.02


def test_pixels_run_from_minus_one_to_one():
    image = Image.new("RGB", (6, 4), (255, 0, 255))
    pixels = to_pixels(image, (6, 4))
    assert pixels.shape == (1, 3, 4, 6)
    assert pixels[0, :, 0, 0].tolist() == [1, -1, 1]


def test_load_image_turns_the_picture_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shot with the camera turned a quarter
    Image.new("L", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    image = load_image(tmp_path / "turned.jpg")
    assert (image.size, image.mode) == ((4, 6), "RGB")


def test_bad_image_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png: not an image"):
        load_image(tmp_path / "text.png")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"half\.png: damaged image"):
        load_image(tmp_path / "half.png")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.5, shift_factor=0.25).eval()


def test_encoding_is_the_scaled_mode_and_repeats(vae):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    latent = encode_first_frame(vae, pixels)
    assert not latent.requires_grad
    assert torch.equal(latent, encode_first_frame(vae, pixels))
    torch.testing.assert_close(latent / 0.5 + 0.25, vae.encode(pixels).latent_dist.mean.detach())


def test_the_condition_fills_frame_zero_only():
    latent = torch.randn(2, 4, 3, 5)
    clip, mask = first_frame_condition(latent, 6)
    assert torch.equal(clip[:, :, 0], latent)
    assert not clip[:, :, 1:].any()
    assert torch.equal(mask, torch.tensor([1.0, 0, 0, 0, 0, 0]).view(1, 1, 6, 1, 1).expand(2, 1, 6, 3, 5))
    with pytest.raises(ValueError, match="at least one frame"):
        first_frame_condition(latent, 0)
