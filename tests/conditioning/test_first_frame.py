import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from imageconductor.conditioning import (
    Trajectories,
    cover_crop,
    encode_first_frame,
    keyframe_condition,
    load_image,
    to_pixels,
    to_rgb,
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


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).round()


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif", "ramp.pgm"])
def test_sixteen_bits_are_scaled_and_not_clipped(name, tmp_path):
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / name)
    pixels = np.asarray(load_image(tmp_path / name)).astype(int)
    assert np.abs(pixels - RAMP[..., None] / 257).max() <= 0.5
    assert len(np.unique(pixels)) == 256


def test_white_is_where_a_tiff_file_says(tmp_path):
    levels = (RAMP / 65535 * 4095).astype(np.uint16)
    image = Image.fromarray(levels)
    image.save(tmp_path / "negative.tif", tiffinfo={262: 0})
    shown = np.asarray(load_image(tmp_path / "negative.tif"))[..., 0]
    assert (shown[0, 0], shown[-1, -1]) == (255, 239)  # 4095 of 65535, from white
    tagged = Image.open(tmp_path / "negative.tif")
    tagged.load()
    assert isinstance(tagged, TiffImageFile)
    tagged.tag_v2[258], tagged.tag_v2[262] = (12,), 1
    assert np.asarray(to_rgb(tagged))[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_that_state_no_white_are_refused(dtype, tmp_path):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "scan.tif")
    with pytest.raises(ValueError, match=r"scan\.tif: its pixels are .* how bright white is; save 8 or 16 bits"):
        load_image(tmp_path / "scan.tif")
    with pytest.raises(ValueError, match="image: its pixels are"):
        to_pixels(Image.fromarray(RAMP.astype(dtype)), (64, 64))


def cutout(hidden, alpha=(0, 128, 255)):
    """Three columns of blue: nothing, half, all; `hidden` is the colour of what cannot be seen."""
    image = Image.new("RGBA", (3, 2), (*hidden, 0))
    for x, value in enumerate(alpha):
        image.paste((0, 0, 255, value) if value else (*hidden, 0), (x, 0, x + 1, 2))
    return image


def test_hidden_colours_stay_hidden_behind_one_background(tmp_path):
    shown = []
    for name, hidden in {"red": (255, 0, 0), "black": (0, 0, 0)}.items():
        for suffix in ("png", "webp", "tif"):
            cutout(hidden).save(tmp_path / f"{name}.{suffix}", lossless=True)
            shown.append(np.asarray(load_image(tmp_path / f"{name}.{suffix}"))[0].tolist())
    assert shown == [[[255, 255, 255], [127, 127, 255], [0, 0, 255]]] * 6


def test_every_form_of_transparency_shows_the_background(tmp_path):
    picture = cutout((255, 0, 0), (0, 255, 255))
    palette = picture.convert("RGB").quantize(4)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    picture.save(tmp_path / "cutout.gif")
    key = Image.new("RGB", (3, 2), (0, 0, 255))
    key.putpixel((0, 0), (255, 0, 0))
    key.save(tmp_path / "key.png", transparency=(255, 0, 0))
    for name in ("palette.png", "cutout.gif", "key.png"):
        shown = np.asarray(load_image(tmp_path / name))[0]
        assert shown[0].tolist() == [255, 255, 255], name
        assert np.abs(shown[1].astype(int) - [0, 0, 255]).max() <= 1, name
    deep = Image.fromarray(np.array([[1000, 65535, 0]], np.uint16))
    deep.save(tmp_path / "deep.png", transparency=1000)
    assert np.asarray(load_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [255, 255, 0]
    for mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        shown = to_rgb(Image.new(mode, (2, 2)))
        assert (shown.mode, shown.getpixel((0, 0))) == ("RGB", (255, 255, 255)), mode


def test_other_colour_models_become_rgb(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert np.abs(np.asarray(load_image(tmp_path / "print.jpg")).astype(int) - (255, 0, 0)).max() <= 2
    Image.new("LAB", (2, 2), (255, 128, 128)).save(tmp_path / "white.tif")
    assert np.asarray(load_image(tmp_path / "white.tif")).min() >= 254
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert load_image(tmp_path / "bit.png").getpixel((0, 0)) == (255, 255, 255)
    for mode, colour in {"YCbCr": (255, 128, 128), "HSV": (0, 0, 255), "L": 255, "RGBX": (255, 255, 255, 0)}.items():
        assert to_rgb(Image.new(mode, (2, 2), colour)).getpixel((0, 0)) == (255, 255, 255), mode


@pytest.mark.parametrize("name", ["film.gif", "film.png", "film.webp"])
def test_the_first_frame_of_an_animation_is_shown(name, tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


def test_the_stand_in_of_an_animated_png_is_not_shown(tmp_path):
    stand_in, *frames = (Image.new("RGB", (8, 8), colour) for colour in ((0, 0, 0), (255, 0, 0), (0, 255, 0)))
    stand_in.save(tmp_path / "film.png", save_all=True, append_images=frames, default_image=True)
    assert load_image(tmp_path / "film.png").getpixel((4, 4)) == (255, 0, 0)


def test_an_orientation_holds_for_every_depth(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP[:32].astype(np.uint16)).save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(load_image(tmp_path / "turned.png"))
    assert turned.shape == (64, 32, 3)
    assert np.abs(turned[..., 0] - np.rot90(RAMP[:32], -1) / 257).max() <= 0.5
    assert to_pixels(Image.open(tmp_path / "turned.png"), (32, 64)).shape == (1, 3, 64, 32)


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


def test_the_condition_fills_the_given_frames_only():
    latents = torch.randn(2, 4, 2, 3, 5)
    clip, mask = keyframe_condition(latents[:, :, :1], (0,), 6)
    assert torch.equal(clip[:, :, 0], latents[:, :, 0])
    assert not clip[:, :, 1:].any()
    assert torch.equal(mask, torch.tensor([1.0, 0, 0, 0, 0, 0]).view(1, 1, 6, 1, 1).expand(2, 1, 6, 3, 5))
    clip, mask = keyframe_condition(latents, (5, 2), 6)
    assert torch.equal(clip[:, :, (5, 2)], latents)
    assert mask[:, 0, :, 0, 0].tolist() == [[0, 0, 1, 0, 0, 1]] * 2
    assert not clip[:, :, (0, 1, 3, 4)].any()
    with pytest.raises(ValueError, match="at least one frame"):
        keyframe_condition(latents, (0, 1), 0)
    with pytest.raises(ValueError, match=r"2 latents cannot stand at frames \[0, 6\] of 6"):
        keyframe_condition(latents, (0, 6), 6)
