"""Every stored output of the published modules, within 1e-4 of its largest value."""

import hashlib

import numpy as np
import pytest
import torch
from parity import REFERENCE, TOLERANCE, expected, inputs, model_config, relative_error, weights

from imageconductor.checkpoints.published import load_published
from imageconductor.models.adapters import Adapter, active, merge_copy
from imageconductor.models.weights import copy_weights

ADAPTERS = {
    "base": (),
    "camera": (Adapter.CAMERA,),
    "object": (Adapter.OBJECT,),
    "both": (Adapter.CAMERA, Adapter.OBJECT),
}


@pytest.fixture(scope="module")
def networks():
    return load_published(weights("unet"), weights("image_controlnet"), weights("flow_controlnet"), **model_config())


@pytest.fixture(scope="module")
def x():
    return inputs()


@pytest.fixture(scope="module")
def reference():
    return expected()


def test_the_seeded_fill_is_the_recorded_one():
    record = REFERENCE["fill_check"]["flow_controlnet/conv_in.lora_B.cmcm_weights.weight"]
    filled = weights("flow_controlnet")["conv_in.lora_B.cmcm_weights.weight"].numpy()
    assert hashlib.sha256(np.ascontiguousarray(filled, "<f4").tobytes()).hexdigest() == record["sha256_f32le"]


@torch.no_grad()
def test_one_motion_module(networks, reference):
    module = networks[0].down_blocks[0].motion_modules[0]
    source = reference["unet/debug_mm_in_b0"]
    frames = source.squeeze(0).transpose(0, 1) if source.dim() == 5 else source.transpose(0, 1)
    output = module(frames.contiguous(), num_frames=frames.shape[0])
    target = reference["unet/debug_mm_out_b0"]
    assert relative_error(output.transpose(0, 1).reshape(target.shape), target) <= TOLERANCE


@torch.no_grad()
def test_unet_alone(networks, x, reference):
    output = networks[0](x["sample"], x["timestep"], x["text"]).sample
    assert relative_error(output, reference["unet/alone"]) <= TOLERANCE


def _assert_residuals(residuals, reference, name, frames):
    for i, value in enumerate((*residuals.down, residuals.mid)):
        key = f"{name}/mid_b1" if i == len(residuals.down) else f"{name}/down_{i:02d}_b1"
        row = value.unflatten(0, (-1, frames))[1:2].transpose(1, 2)
        assert relative_error(row.reshape(reference[key].shape), reference[key]) <= TOLERANCE, key


@torch.no_grad()
def test_image_controlnet(networks, x, reference):
    residuals = networks[1](x["timestep"], x["text"], x["condition"], x["mask"])
    _assert_residuals(residuals, reference, "image", x["flow"].shape[2])


@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("merged", [False, True], ids=["lora", "merged"])
def test_motion_controlnet_and_unet(networks, x, reference, name, merged):
    unet, image_controlnet, motion_controlnet = networks
    with active(motion_controlnet, *ADAPTERS[name]):
        network = merge_copy(motion_controlnet, *ADAPTERS[name]) if merged else motion_controlnet
        motion = network(x["timestep"], x["text"], x["flow"])
    _assert_residuals(motion, reference, f"flow_{name}", x["flow"].shape[2])

    image = image_controlnet(x["timestep"], x["text"], x["condition"], x["mask"])
    features = unet.encode(x["sample"], x["timestep"], x["text"])
    output = unet.decode(features, image + motion)
    assert relative_error(output, reference[f"unet/image_flow_{name}"]) <= TOLERANCE
    if name == "base":
        assert relative_error(unet.decode(features, image), reference["unet/image_only"]) <= TOLERANCE


def test_a_misfit_names_every_key(networks):
    state = weights("unet")
    del state["conv_in.bias"]
    state["conv_out.bias"] = torch.zeros(5)
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"(?s)missing: conv_in.bias.*unexpected: extra.weight.*mis-shaped: conv_out"):
        load_published(state, weights("image_controlnet"), weights("flow_controlnet"), **model_config())
    before = networks[0].conv_in.bias.clone()
    with pytest.raises(ValueError, match="missing"):
        copy_weights(networks[0].state_dict(), {"conv_in.bias": torch.zeros(32)}, "a partial file")
    assert torch.equal(networks[0].conv_in.bias, before), "a refused file must leave the model as it was"


def test_wrapped_and_prefixed_checkpoints_load(networks):
    wrapped = {"state_dict": {f"module.{k}": v for k, v in weights("unet").items()}, "global_step": 3}
    unet, _, _ = load_published(wrapped, weights("image_controlnet"), weights("flow_controlnet"), **model_config())
    assert torch.equal(unet.conv_in.weight, networks[0].conv_in.weight)
