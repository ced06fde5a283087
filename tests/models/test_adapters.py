"""Two LoRAs on one network: who acts, who learns, what is saved."""

import pytest
import torch
from conftest import merge_in_place, tiny_networks
from safetensors.torch import load_file, save_file

from imageconductor.models.adapters import (
    WEIGHTS_NAME,
    Adapter,
    activate,
    active,
    active_adapters,
    adapter_parameters,
    add_adapter,
    attached_adapters,
    freeze_all_but_adapter,
    load_adapter,
    lora_targets,
    merge_copy,
    save_adapter,
    save_for_diffusers,
)

CAMERA, OBJECT = Adapter.CAMERA, Adapter.OBJECT


@pytest.fixture
def network():
    return tiny_networks().motion_controlnet


def fill(network, *adapters):
    for i, adapter in enumerate(adapters):
        add_adapter(network, adapter, rank=2)
        generator = torch.Generator().manual_seed(i)
        for parameter in adapter_parameters(network, adapter).values():
            parameter.data.normal_(0, 0.2, generator=generator)


@torch.no_grad()
def output(network):
    generator = torch.Generator().manual_seed(0)
    text, flow = torch.randn(1, 5, 16, generator=generator), torch.randn(1, 2, 3, 16, 16, generator=generator)
    return network(torch.tensor(5), text, flow).mid


def test_a_fresh_adapter_changes_nothing(network):
    before = output(network)
    add_adapter(network, CAMERA, rank=2)
    assert torch.equal(output(network), before)
    with active(network, CAMERA):
        assert torch.equal(output(network), before)
    with pytest.raises(ValueError, match="attached already"):
        add_adapter(network, CAMERA, rank=2)


def test_every_combination_acts_and_the_state_comes_back(network):
    fill(network, CAMERA, OBJECT)
    outputs = {}
    for names in ((), (CAMERA,), (OBJECT,), (CAMERA, OBJECT)):
        with active(network, *names):
            assert active_adapters(network) == names
            outputs[names] = output(network)
        assert active_adapters(network) == ()
    values = list(outputs.values())
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(values) for b in values[:i])


def test_activation_leaves_requires_grad_alone(network):
    fill(network, CAMERA, OBJECT)
    freeze_all_but_adapter(network, OBJECT)
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    for names in ((CAMERA,), (CAMERA, OBJECT), (), (OBJECT,)):
        activate(network, *names)
        assert {id(p) for p in network.parameters() if p.requires_grad} == trained
    assert trained == {id(p) for p in adapter_parameters(network, OBJECT).values()}


def test_stage_one_trains_the_base_without_conv_in(network):
    names = {name for name, _ in network.named_parameters()} - {"conv_in.weight"}
    network.unfreeze_()
    assert {name for name, p in network.named_parameters() if p.requires_grad} == names


def test_targets(network):
    targets = lora_targets(network)
    assert "conv_in" not in targets
    assert {"controlnet_cond_embedding", "controlnet_mid_block", "time_embedding.linear_1"} <= set(targets)
    linear = lora_targets(network, "linear")
    assert set(linear) < set(targets)
    assert all(isinstance(network.get_submodule(name), torch.nn.Linear) for name in linear)
    with pytest.raises(ValueError, match="match no layer: nowhere"):
        add_adapter(network, CAMERA, rank=2, targets=["nowhere"])
    fill(network, CAMERA)
    assert set(lora_targets(network)) == set(targets), "a layer keeps its name when it carries a LoRA"


def test_saved_adapters_come_back_bit_for_bit(network, tmp_path):
    fill(network, CAMERA, OBJECT)
    for adapter in Adapter:
        save_adapter(network, adapter, tmp_path / adapter.value)
    assert all(key.startswith("base_model.model.") for key in load_file(tmp_path / "camera" / WEIGHTS_NAME))
    other = tiny_networks().motion_controlnet
    for adapter in reversed(Adapter):
        load_adapter(other, adapter, tmp_path / adapter.value)
    for names in ((CAMERA,), (OBJECT,), (CAMERA, OBJECT)):
        with active(network, *names), active(other, *names):
            assert torch.equal(output(network), output(other))


def test_an_adapter_that_does_not_fit_is_named(network, tmp_path):
    fill(network, CAMERA)
    save_adapter(network, CAMERA, tmp_path)
    state = load_file(tmp_path / WEIGHTS_NAME)
    key = next(key for key in state if ".lora_B." in key)
    state[key] = torch.zeros(3, 2)
    save_file(state, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=key.removeprefix("base_model.model.")):
        load_adapter(tiny_networks().motion_controlnet, CAMERA, tmp_path)
    with pytest.raises(FileNotFoundError, match="no object LoRA"):
        load_adapter(network, OBJECT, tmp_path / "nowhere")


@pytest.mark.parametrize("names", [(CAMERA,), (OBJECT,), (CAMERA, OBJECT)])
def test_a_merged_copy_leaves_the_network_alone(network, names):
    fill(network, CAMERA, OBJECT)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    base = output(network)
    with active(network, *names):
        loose = output(network)
    copied = merge_copy(network, *names)
    torch.testing.assert_close(output(copied), loose, rtol=1e-4, atol=1e-4)
    assert not [key for key in copied.state_dict() if ".lora_" in key]
    assert copied.conv_in.weight is network.conv_in.weight, "what is not adapted is shared"
    assert active_adapters(network) == ()
    assert torch.equal(output(network), base)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    merge_in_place(network, CAMERA)
    with pytest.raises(ValueError, match=r"unmerge\(\) of its layers"):
        merge_copy(network, CAMERA)


def test_adapters_of_any_network_by_any_name(tmp_path):
    """Nothing counts on the motion ControlNet, on two adapters, or on their names."""
    unet = tiny_networks().unet
    spatial, temporal = lora_targets(unet, "spatial"), lora_targets(unet, "motion")
    assert not set(spatial) & set(temporal)
    assert all(".attentions." in name and ".motion_modules." not in name for name in spatial)
    assert all(".motion_modules." in name for name in temporal)
    assert {name.rpartition(".")[2] for name in temporal} >= {"to_q", "proj"}
    for name, targets in (("waltz", temporal), ("ink", spatial), ("clip_7", spatial)):
        add_adapter(unet, name, rank=2, targets=targets, seed=1)
    assert set(attached_adapters(unet)) == {"waltz", "ink", "clip_7"}
    first, second = (adapter_parameters(unet, name) for name in ("ink", "clip_7"))
    assert all(torch.equal(first[key], second[key]) for key in first), "the same seed"
    freeze_all_but_adapter(unet, "waltz")
    assert sum(p.requires_grad for p in unet.parameters()) == 2 * len(temporal)
    save_for_diffusers(unet, "ink", tmp_path, torch.float16)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {key.partition(".lora_")[0].removeprefix("unet.") for key in saved} == set(spatial)
    assert {value.dtype for value in saved.values()} == {torch.float16}
    add_adapter(unet, "loud", rank=2, alpha=4, targets=spatial)
    with pytest.raises(ValueError, match="alpha 4, which must equal the rank 2"):
        save_for_diffusers(unet, "loud", tmp_path)


def test_absent_adapters_are_told(network):
    assert attached_adapters(network) == ()
    with pytest.raises(ValueError, match="no camera LoRA"):
        activate(network, CAMERA)
