"""The up path of a small UNet reads the first frame at places that it chooses."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from imageconductor.models.first_frame_warp import FirstFrameWarp
from imageconductor.models.motion_module import motion_modules_bypassed
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.models.small_model import SmallModelConfig, build_small_model

SMALL = SmallModelConfig(
    (8, 8), 4, (8, 16), 1, 2, 4, 16, text_width=8, text_layers=1, text_length=8, first_frame_warp=True
)


def reading_warp(*offsets):
    """A warp of two heads that adds the first frame's features at the offsets (x, y), in parts of the frame."""
    warp = FirstFrameWarp(8, 2, 2)
    with torch.no_grad():
        warp.offsets.bias.copy_(torch.tensor(offsets).flatten() * 16)
        for layer in (warp.values, warp.merge):
            nn.init.eye_(layer.weight.view(8, 8))
            layer.bias.zero_()
    return warp


def test_each_head_reads_the_first_frame_at_its_offset():
    warp = reading_warp((3 / 10, 0.0), (0.0, -2 / 6))
    x = torch.randn(8, 8, 6, 10)
    with torch.no_grad():
        read = warp(x, 4) - x
    first = x[[0, 0, 0, 0, 4, 4, 4, 4]]
    torch.testing.assert_close(read[:, :4, :, :7], first[:, :4, :, 3:])
    torch.testing.assert_close(read[:, 4:, 2:], first[:, 4:, :-2])
    torch.testing.assert_close(read[:, :4, :, 7:], first[:, :4, :, 9:].expand(-1, -1, -1, 3))  # Edges are repeated.


def test_an_untrained_warp_reads_each_place_itself_and_learns_its_offsets():
    warp = reading_warp((0.0, 0.0), (0.0, 0.0))
    x = torch.randn(4, 8, 5, 5)
    read = warp(x, 4) - x
    torch.testing.assert_close(read, x[[0, 0, 0, 0]])
    read.square().sum().backward()
    assert warp.offsets.weight.grad.abs().sum() > 0


def test_an_offset_is_a_part_of_the_frame_at_every_resolution():
    warp = reading_warp((0.25, 0.0), (0.25, 0.0))
    x = torch.randn(2, 8, 4, 4)
    fine = nn.functional.interpolate(x, scale_factor=4)
    with torch.no_grad():
        torch.testing.assert_close((warp(x, 2) - x)[..., 0], x[[0, 0], :, :, 1])
        read = (warp(fine, 2) - fine)[:, :, 1::4, 1]
    torch.testing.assert_close(read, fine[[0, 0], :, 1::4, 5])


def test_half_precision_keeps_places():
    warp = reading_warp((3 / 64, 0.0), (3 / 64, 0.0)).to(torch.bfloat16)
    x = torch.randn(1, 8, 4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        read = (warp(x, 1) - x).float()
    assert (read[..., :60] - x[..., 3:63].float()).abs().max() < 0.1


@pytest.fixture(scope="module")
def networks():
    return build_small_model(SMALL, ["a word"], seed=1)


def predict(unet, x, **kwargs):
    with torch.no_grad():
        return unet(x, torch.tensor(500), torch.zeros(len(x), 4, 8), **kwargs).sample


def test_only_a_videos_own_first_frame_is_read(networks):
    unet = networks.unet
    with torch.no_grad():
        for block in unet.up_blocks:
            for module in block.motion_modules:
                module.first_frame_warp.offsets.bias.fill_(2.0)
    x = torch.randn(2, 4, 3, 8, 8)
    before = predict(unet, x)
    other = x.clone()
    other[1] += torch.randn_like(other[1])
    torch.testing.assert_close(predict(unet, other)[0], before[0])


def test_where_motion_modules_are_bypassed_so_is_the_warp(networks):
    plain = build_small_model(replace(SMALL, first_frame_warp=False), ["a word"], seed=1).unet
    state = {key: value for key, value in networks.unet.state_dict().items() if key in plain.state_dict()}
    plain.load_state_dict(state)
    with torch.no_grad():
        networks.unet.linear_out.weight.zero_()
        networks.unet.linear_out.bias.zero_()
    x = torch.randn(2, 4, 1, 8, 8)
    with motion_modules_bypassed(plain), motion_modules_bypassed(networks.unet):
        assert torch.equal(predict(plain, x), predict(networks.unet, x))
    assert not torch.allclose(predict(plain, x), predict(networks.unet, x))


def test_a_saved_unet_keeps_it_and_others_have_none(networks, tmp_path):
    networks.unet.save_pretrained(tmp_path / "warp")
    loaded = MotionUNet.from_pretrained(tmp_path / "warp")
    x = torch.randn(1, 4, 3, 8, 8)
    torch.testing.assert_close(predict(loaded, x), predict(networks.unet, x))
    assert sum("first_frame_warp" in key for key in loaded.state_dict()) == 4 * 8
    plain = build_small_model(replace(SMALL, first_frame_warp=False), ["a word"], seed=1)
    assert not any("first_frame_warp" in key or "linear_out" in key for key in plain.unet.state_dict())
    for controlnet in (networks.image_controlnet, networks.motion_controlnet):
        assert not any("first_frame_warp" in key for key in controlnet.state_dict())
