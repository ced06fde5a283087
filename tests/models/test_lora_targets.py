"""MotionDirector's two sets of layers, on AnimateDiff's UNet and on diffusers' UNet3DConditionModel."""

import json

import pytest
import torch
from diffusers import UNet3DConditionModel
from parity_md import ANIMATEDIFF, FOLDER, MODELSCOPE, animatediff_unet, modelscope_unet

from imageconductor.models.adapters import (
    activate,
    active,
    adapter_parameters,
    add_adapter,
    lora_targets,
    plain_layers,
)
from imageconductor.models.motion_unet import SD15_ANIMATEDIFF_V3, MotionUNet

SETS = {"appearance": "spatial", "motion": "temporal"}
FULL_SIZE = json.loads((FOLDER / "placement_full_modelscope.json").read_text())


def full_unet(family):
    """The full-size network, without weights."""
    with torch.device("meta"):
        return UNet3DConditionModel() if family is MODELSCOPE else MotionUNet(**SD15_ANIMATEDIFF_V3)


def full_size(family, target_set, rank):
    """The layers of the full-size network, and the parameters of a LoRA on them."""
    unet = full_unet(family)
    layers = lora_targets(unet, target_set)
    with torch.device("meta"):
        add_adapter(unet, "one", rank=rank, targets=layers)
    return layers, sum(p.numel() for p in adapter_parameters(unet, "one").values())


def count_layers(unet, family, targets):
    """Layers with a LoRA of the family's rank, and its parameters."""
    add_adapter(unet, "counted", rank=family.config["rank"], targets=targets, clips_rank=True)
    own = adapter_parameters(unet, "counted").values()
    return len(own) // 2, sum(p.numel() for p in own)


@pytest.mark.parametrize("target_set", SETS)
def test_the_sets_are_the_recorded_ones_in_the_published_order(target_set):
    recorded = FULL_SIZE[SETS[target_set]]
    layers, parameters = full_size(MODELSCOPE, target_set, 32)
    assert layers == recorded["names_in_published_order"]
    assert (len(layers), parameters) == (recorded["count"], recorded["lora_params"])
    tiny = MODELSCOPE.meta["placement_tiny"][SETS[target_set]]
    unet = modelscope_unet()
    assert lora_targets(unet, target_set) == tiny["names_in_published_order"]
    assert count_layers(unet, MODELSCOPE, tiny["names_in_published_order"]) == (tiny["count"], tiny["lora_params"])
    assert sum(p.numel() for p in full_unet(MODELSCOPE).parameters()) == MODELSCOPE.meta["full_total_params"]


def test_animatediffs_sets():
    unet, recorded = animatediff_unet(), ANIMATEDIFF.meta
    published = [ANIMATEDIFF.published_names[name] for name in lora_targets(unet, "motion")]
    assert sorted(published) == sorted(recorded["placement_tiny"]["temporal"]["names"])
    # Of the port's spatial layers MotionDirector's own rule takes self-attention and feed-forward only.
    by_rule = {name for name in recorded["placement_tiny"]["spatial"]["names"] if ".attn1." in name or ".ff." in name}
    assert set(lora_targets(unet, "appearance")) == by_rule
    assert len(by_rule) == recorded["placement_tiny"]["spatial"]["subset_matching_the_MotionDirector_rule_attn1_ff"]
    for name, targets in (("spatial", ANIMATEDIFF.ported_layers), ("temporal", lora_targets(unet, "motion"))):
        tiny = recorded["placement_tiny"][name]
        assert count_layers(animatediff_unet(), ANIMATEDIFF, targets) == (tiny["count"], tiny["lora_params"])
    for rank in (32, 64):
        at_rank = recorded["placement_full_sd15_animatediff_v3"][f"temporal_r{rank}"]
        layers, parameters = full_size(ANIMATEDIFF, "motion", rank)
        assert (len(layers), parameters) == (at_rank["count"], at_rank["lora_params"])
        unet, port = full_unet(ANIMATEDIFF), recorded["placement_full_sd15_animatediff_v3"][f"spatial_r{rank}"]
        with torch.device("meta"):
            add_adapter(
                unet, "port", rank=rank, targets=[name for name in plain_layers(unet) if ".attentions." in name]
            )
        own = adapter_parameters(unet, "port").values()
        assert (len(own) // 2, sum(p.numel() for p in own)) == (port["count"], port["lora_params"])
    layers, parameters = full_size(ANIMATEDIFF, "appearance", 32)
    # The spatial transformers are ModelScope's, at the same widths.
    assert (len(layers), parameters) == (FULL_SIZE["spatial"]["count"], FULL_SIZE["spatial"]["lora_params"])


@pytest.mark.parametrize("build", [animatediff_unet, modelscope_unet])
def test_the_sets_have_no_layer_in_common_and_stay_with_adapters_attached(build):
    unet = build()
    before = {target_set: lora_targets(unet, target_set) for target_set in SETS}
    assert not set(before["appearance"]) & set(before["motion"])
    for name, layers in before.items():
        add_adapter(unet, name, rank=2, targets=layers)
    assert {target_set: lora_targets(unet, target_set) for target_set in SETS} == before


def test_dropout_acts_in_training_only():
    unet = animatediff_unet()
    layer = lora_targets(unet, "appearance")[0]
    x = torch.ones(3, unet.get_submodule(layer).in_features)
    for name, dropout in (("certain", 0.0), ("dropped", 0.5)):
        add_adapter(unet, name, rank=2, targets=[layer], dropout=dropout, seed=0)
        for parameter in adapter_parameters(unet, name).values():
            parameter.data.fill_(1.0)
    outputs = {}
    for training in (False, True):
        unet.train(training)
        for name in ("certain", "dropped"):
            with active(unet, name):
                outputs[training, name] = unet.get_submodule(layer)(x)
    activate(unet)
    assert torch.equal(outputs[False, "dropped"], outputs[False, "certain"])
    assert torch.equal(outputs[True, "certain"], outputs[False, "certain"])
    assert not torch.equal(outputs[True, "dropped"], outputs[True, "certain"])
