"""Two LoRAs on one network: who acts, who learns, what is saved."""

import pytest
import torch
from conftest import tiny_networks
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
    load_adapter,
    lora_targets,
    merge,
    save_adapter,
    train_only,
    unmerge,
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
    trained = {id(p) for p in train_only(network, OBJECT)}
    for names in ((CAMERA,), (CAMERA, OBJECT), (), (OBJECT,)):
        activate(network, *names)
        assert {id(p) for p in network.parameters() if p.requires_grad} == trained
    assert trained == {id(p) for p in adapter_parameters(network, OBJECT).values()}


def test_stage_one_trains_the_base_without_conv_in(network):
    names = {name for name, _ in network.named_parameters()} - {"conv_in.weight"}
    train_only(network, None)
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
def test_merged_equals_unmerged(network, names):
    fill(network, CAMERA, OBJECT)
    base = output(network)
    with active(network, *names):
        loose = output(network)
        merge(network, *names)
        torch.testing.assert_close(output(network), loose, rtol=1e-4, atol=1e-4)
        unmerge(network)
        torch.testing.assert_close(output(network), loose, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(network), base, rtol=1e-5, atol=1e-5)


def test_absent_adapters_are_told(network):
    assert attached_adapters(network) == set()
    with pytest.raises(ValueError, match="no camera LoRA"):
        activate(network, CAMERA)
