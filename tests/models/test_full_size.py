"""The networks at SD-1.5's size, on the meta device: counts, and every key of the published files."""

import json

import pytest
import torch
from parity import FOLDER

from imageconductor.models.checkpoints import load_published
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.lora import Adapter, adapter_parameters, add_adapter
from imageconductor.models.motion_unet import SD15_ANIMATEDIFF_V3, MotionUNet


def millions(parameters) -> float:
    return round(sum(p.numel() for p in parameters) / 1e6, 1)


@pytest.fixture(scope="module")
def published():
    keys = json.loads((FOLDER / "full_size_keys.json").read_text())
    return {
        module: {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        for module, shapes in keys.items()
    }


def test_every_published_key_has_its_place(published):
    with torch.device("meta"):
        unet, image_controlnet, motion_controlnet = load_published(
            published["unet"], published["image_controlnet"], published["flow_controlnet"]
        )
    assert millions(unet.parameters()) == 1276.7
    assert millions(p for n, p in unet.named_parameters() if "motion_modules" in n) == 417.1
    assert millions(image_controlnet.parameters()) == 496.7
    assert millions(p for n, p in motion_controlnet.named_parameters() if ".lora_" not in n) == 497.1
    for adapter in Adapter:
        parameters = adapter_parameters(motion_controlnet, adapter)
        assert len(parameters) == 400
        assert round(sum(p.numel() for p in parameters.values()) / 1e6, 2) == 40.76


def test_networks_built_from_the_unet_have_the_published_sizes():
    with torch.device("meta"):
        unet = MotionUNet(**SD15_ANIMATEDIFF_V3)
        image_controlnet = ImageControlNet.from_unet(unet, conditioning_channels=4)
        motion_controlnet = MotionControlNet.from_unet(unet)
        assert millions(image_controlnet.parameters()) == 496.7
        assert millions(motion_controlnet.parameters()) == 497.1
        add_adapter(motion_controlnet, Adapter.CAMERA, rank=64)
    names = adapter_parameters(motion_controlnet, Adapter.CAMERA)
    assert len(names) == 398, "every Linear and Conv2d of the published 200, conv_in excepted"
    assert not any(name.startswith("conv_in.") for name in names)
