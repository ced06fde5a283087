"""The UNet in two halves, and ControlNets that start as nothing."""

import pytest
import torch
from conftest import merge_in_place, tiny_networks
from diffusers import UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

from imageconductor.conditioning import FlowMapConvention
from imageconductor.models.adapters import Adapter, activate, add_adapter
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.motion_module import MotionModule
from imageconductor.models.motion_unet import MotionUNet

T = 3


@pytest.fixture(scope="module")
def networks():
    return tiny_networks()


def clip(height=8, width=8, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, T, height, width, generator=g), torch.randn(batch, 5, 16, generator=g)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 5)], ids=["even", "odd"])
@pytest.mark.parametrize("motion_mid_block", [False, True])
def test_two_halves_are_the_whole_and_diffusers(networks, size, motion_mid_block):
    unet = networks.unet
    if motion_mid_block:
        torch.manual_seed(0)
        unet = MotionUNet.from_config({**unet.config, "use_motion_mid_block": True}).eval()
    x, text = clip(*size)
    residuals = networks.image_controlnet(
        torch.tensor(5), text, torch.randn(2, 4, T, *size), torch.ones(2, 1, T, *size)
    )
    halves = unet.decode(unet.encode(x, 5, text), residuals)
    arguments = {
        "down_block_additional_residuals": residuals.down,
        "mid_block_additional_residual": residuals.mid,
    }
    assert torch.equal(halves, unet(x, 5, text, **arguments).sample)
    theirs = UNetMotionModel.forward(unet, x, 5, text.repeat_interleave(T, 0), **arguments).sample
    torch.testing.assert_close(halves, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_features_can_be_cut_by_video(networks):
    x, text = clip(batch=3)
    features = networks.unet.encode(x, 5, text)
    alone = networks.unet.encode(x[1:2], 5, text[1:2])
    torch.testing.assert_close(features.videos(1, 2).mid, alone.mid, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        networks.unet.decode(features.videos(1, 2)), networks.unet.decode(alone), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_a_motion_module_normalises_each_frame_alone(networks):
    module = networks.unet.down_blocks[0].motion_modules[0]
    assert isinstance(module, MotionModule)
    assert all(isinstance(m, MotionModule) for m in networks.unet.modules() if isinstance(m, AnimateDiffTransformer3D))
    frames, seen = torch.randn(T, 16, 4, 4), []
    handle = module.norm.register_forward_hook(lambda _, __, output: seen.append(output))
    module(frames, num_frames=T)
    frames[2] *= 100
    module(frames, num_frames=T)
    handle.remove()
    assert torch.equal(seen[0][:2], seen[1][:2]), "another frame's values must not enter the statistics"


@torch.no_grad()
def test_a_fresh_controlnet_adds_nothing(networks):
    unet = networks.unet
    x, text = clip()
    motion = MotionControlNet.from_unet(unet, vae_scale_factor=2)
    residuals = motion(torch.tensor(5), text, torch.randn(2, 2, T, 16, 16))
    assert not any(value.any() for value in (*residuals.down, residuals.mid))
    features = unet.encode(x, 5, text)
    assert torch.equal(unet.decode(features, residuals), unet.decode(features))
    ours, theirs = motion.state_dict(), unet.state_dict()
    copied = [key for key in ours if key in theirs and not key.endswith(".pe")]
    assert any("attn1" in key for key in copied)
    assert all(torch.equal(ours[key], theirs[key]) for key in copied)
    assert {key for key in ours if key not in theirs} == {key for key in ours if key.startswith("controlnet_")}


@torch.no_grad()
def test_conditions_repeat_over_videos(networks):
    text, flow = clip()[1], torch.randn(2, 2, T, 16, 16)
    once = networks.motion_controlnet(torch.tensor(5), text, flow).repeat_videos(3, T)
    thrice = networks.motion_controlnet(torch.tensor(5), text.repeat_interleave(3, 0), flow.repeat_interleave(3, 0))
    torch.testing.assert_close(once.mid, thrice.mid, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(once.down[0], thrice.down[0], rtol=1e-4, atol=1e-5)


def test_the_wrong_number_of_residuals_is_told(networks):
    x, text = clip()
    residuals = networks.image_controlnet(torch.tensor(5), text, torch.randn(2, 4, T, 8, 8), torch.ones(2, 1, T, 8, 8))
    short = type(residuals)(residuals.down[:-1], residuals.mid)
    with pytest.raises(ValueError, match="skip connections"):
        networks.unet.decode(networks.unet.encode(x, 5, text), short)


def test_the_flow_convention_and_the_plain_base_are_saved(tmp_path):
    motion = tiny_networks().motion_controlnet
    before = {key: value.clone() for key, value in motion.state_dict().items()}
    for adapter in Adapter:
        add_adapter(motion, adapter, rank=2)
    activate(motion, Adapter.CAMERA)
    motion.save_pretrained(tmp_path / "plain")
    loaded = MotionControlNet.from_pretrained(tmp_path / "plain")
    assert loaded.flow_convention == motion.flow_convention != FlowMapConvention()
    torch.testing.assert_close(dict(loaded.state_dict()), before, rtol=0, atol=0)
    merge_in_place(motion, Adapter.CAMERA)
    with pytest.raises(ValueError, match="unmerge"):
        motion.save_pretrained(tmp_path / "merged")


def test_config_keys_survive_a_round_trip(networks, tmp_path):
    for network in (networks.unet, networks.image_controlnet):
        config = {**network.config, "motion_norm_num_groups": 4}
        again = type(network).from_config(config)
        again.save_pretrained(tmp_path / "net")
        loaded = type(network).from_pretrained(tmp_path / "net")
        groups = {m.norm.num_groups for m in loaded.modules() if isinstance(m, MotionModule)}
        assert groups == {4}
    assert isinstance(networks.image_controlnet, ImageControlNet)
