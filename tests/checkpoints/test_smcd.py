"""Released SMCD and GLIGEN checkpoints: every key has its place, at full size and as files."""

import logging
import re
from functools import cache

import pytest
import torch
from conftest import tiny_networks
from diffusers import UNet3DConditionModel
from parity_smcd import CONFIG, FULL_SIZE, KEYS, META, backbone, backbone_state, first_conv, weights

from imageconductor.checkpoints.smcd import build_gates, load_smcd, split_gates
from imageconductor.models.gated_attention import ObjectGates, SceneGates
from imageconductor.models.gating import gate_places, gate_scalars
from imageconductor.models.motion_unet import SD15_ANIMATEDIFF_V3, MotionUNet, TextToVideoUNet

FULL = META["full_size"]
HEAD_DIM = CONFIG["unet"]["head_dim"]


def count(network) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.fixture(scope="module")
def published():
    """The released files as tensors without memory, by their suffix."""
    files = {
        name: {k: torch.empty(s, device="meta") for k, s in keys.items()} for name, keys in FULL_SIZE["files"].items()
    }
    assert {name: len(keys) for name, keys in files.items()} == FULL["keys"]
    return [files[f"pytorch_model{number}.bin"] for number in ("", "_1", "_2")]


@pytest.fixture(scope="module")
def modelscope():
    with torch.device("meta"):
        return TextToVideoUNet()


def test_every_published_gate_has_its_place(published, modelscope):
    with torch.device("meta"):
        object_gates, scene_gates = build_gates(*published, modelscope, "the release")
    assert count(object_gates.gates) == FULL["gate_params_vanilla"]
    assert count(scene_gates.gates) == FULL["gate_params_cross"]
    assert count(object_gates.position_net) == FULL["params"]["position_net"]
    assert count(scene_gates.image_encoder) == FULL["params"]["visual_encoder"]
    assert len(object_gates.gates) == FULL["gate_attn_count"]
    places = gate_places(modelscope)
    cells, _ = split_gates(published[0], "the release")
    for (name, place), block in zip(places.items(), cells, strict=True):
        key = f"{block}.gate_attn"
        assert (place.width, place.heads) == (FULL["gate_query_dims"][key], FULL["gate_heads"][key]), key
        assert object_gates.config.places[name] == (place.width, place.heads, place.head_dim)
    for block, name in zip(cells, places, strict=True):
        part, number = block.partition("_")[0], int(re.search(r"\d+", block)[0])  # Three blocks of the release a level.
        level = {
            "input": f"down_blocks_{(number - 1) // 3}_",
            "middle": "mid_block_",
            "output": f"up_blocks_{number // 3}_",
        }
        assert name.startswith(level[part])


def test_the_rest_of_the_release_is_the_modelscope_backbone(published, modelscope):
    """Gates and the widened convolution apart, every key is one of ModelScope's, and none is left over."""
    cells, others = split_gates(published[0], "the release")
    own = {f"{block}.gate_attn.{key}" for block, cell in cells.items() for key in cell}
    assert own == set(FULL_SIZE["only_in_smcd_unet_vs_modelscope_unet"])
    assert sum(v.numel() for v in published[0].values()) == FULL["params"]["unet_smcd"]
    (key, (before, after)), *rest = FULL_SIZE["shape_changed"].items()
    assert not rest
    assert list(others[key].shape) == after
    others = {**others, key: others[key][:, : before[1]]}
    renamed = backbone_state(others, FULL["config"])
    ours = modelscope.state_dict()
    assert {name: v.shape for name, v in renamed.items()} == {name: v.shape for name, v in ours.items()}
    assert sum(v.numel() for v in others.values()) == FULL["params"]["unet_base"] == count(modelscope)
    check = META["full_config_cross_check"]
    assert len(renamed) == check["mapped"] == check["modelscope_keys"] == check["diffusers_keys"]
    assert not check["missing"]
    assert not check["extra"]
    with torch.device("meta"):
        assert UNet3DConditionModel().state_dict().keys() == ours.keys()


def test_what_each_stage_of_the_release_trained(published):
    stage_1 = {key for key in published[0] if ".gate_attn." in key and not re.search(r"\.(cross_|v_linear)", key)}
    record = FULL["stage1_trainable_unet"]
    assert set(FULL_SIZE["stage1_trainable_unet"]) <= stage_1
    assert (len(stage_1), sum(published[0][key].numel() for key in stage_1)) == (record["tensors"], record["params"])
    stage_2, record = set(FULL_SIZE["stage2_trainable_unet"]), FULL["stage2_trainable_unet"]
    assert (len(stage_2), sum(published[0][key].numel() for key in stage_2)) == (record["tensors"], record["params"])
    scene = {key for key in published[0] if ".gate_attn." in key} - stage_1
    convolution = {"input_blocks.0.0.weight", "input_blocks.0.0.bias"}
    temporal = stage_2 - scene - convolution
    assert scene | convolution <= stage_2
    assert {key.partition(".transformer_blocks.")[0] for key in temporal} == set(record["temporal_blocks_trained"])
    assert len(record["temporal_blocks_trained"]) == record["temporal_transformers_total"] - 1
    assert {"input_blocks.0.1"} | set(record["temporal_blocks_trained"]) == {
        key.partition(".proj_in.")[0] for key, value in published[0].items() if ".proj_in." in key and value.ndim == 3
    }


def test_gates_at_stable_diffusions_size():
    """SMCD's figures by width are those of 1024 numbers a token; Stable Diffusion's text has 768."""
    with torch.device("meta"):
        unet = MotionUNet(**SD15_ANIMATEDIFF_V3)
        object_gates, scene_gates = ObjectGates.from_unet(unet), SceneGates.from_unet(unet)
    by_width = {place[0]: 0 for place in object_gates.config.places.values()}
    for name, gate in object_gates.gates.items():
        by_width[object_gates.config.places[name][0]] += 1
        width = object_gates.config.places[name][0]
        assert round(count(gate) / 1e6, 2) == {320: 1.89, 640: 7.05, 1280: 27.22}[width]
        assert round(count(scene_gates.gates[name]) / 1e6, 2) == {320: 1.97, 640: 7.22, 1280: 27.54}[width]
    assert by_width == {320: 5, 640: 5, 1280: 6}
    assert round(count(object_gates.gates) / 1e6) == 208
    assert count(scene_gates.gates) == FULL["gate_params_cross"]
    assert count(scene_gates.image_encoder) == FULL["params"]["visual_encoder"]
    assert count(scene_gates.input_branch) == 320 * 4 * 9
    assert len(gate_scalars(object_gates)) == 2 * FULL["gate_attn_count"]


# -- files


MIDDLE = "middle_block.1.transformer_blocks.0"


@cache
def release():
    """The three files of the tiny reference network, brought to common widths of text and of scene tokens."""
    state, position, image = weights("unet_smcd", "unet"), weights("position_net"), weights("visual_encoder")
    state["input_blocks.0.0.weight"] = torch.cat(first_conv(), dim=1)
    scene_dim = CONFIG["enc_channels"][-1]
    state |= {key: value[:, :scene_dim] for key, value in state.items() if key.endswith(".v_linear.weight")}
    text_dim = state[f"{MIDDLE}.attn2.to_k.weight"].shape[1]
    token_dim = state[f"{MIDDLE}.gate_attn.linear.weight"].shape[1]
    rows, hidden = position["linears.0.weight"][:, CONFIG["text_dim"] :], len(position["linears.0.bias"])
    position["linears.0.weight"] = torch.cat([torch.ones(hidden, text_dim), rows], dim=1)
    position["null_positive_feature"] = torch.zeros(text_dim)
    position |= {"linears.4.weight": torch.ones(token_dim, hidden), "linears.4.bias": torch.ones(token_dim)}
    return state, position, image


def write(folder, *contents, prefix=""):
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        suffix = f"_{number}" if number else ""
        torch.save({prefix + k: v for k, v in content.items()}, folder / f"pytorch_model{suffix}.bin")
    return folder


@pytest.fixture(scope="module")
def unet():
    return backbone()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_accelerate_folder(unet, tmp_path, prefix, caplog):
    state, position, _ = release()
    with caplog.at_level(logging.WARNING):
        object_gates, scene_gates = load_smcd(write(tmp_path / "r", *release(), prefix=prefix), unet, head_dim=HEAD_DIM)
    left = len(KEYS["unet_base"])
    assert f"{left} tensors of the network around the gates are left out" in caplog.text
    name = "mid_block_attentions_0_transformer_blocks_0"
    gate = object_gates.gates[name].state_dict()
    assert all(torch.equal(value, state[f"{MIDDLE}.gate_attn.{key}"]) for key, value in gate.items())
    scene = scene_gates.gates[name].state_dict()
    assert torch.equal(scene["linear.weight"], state[f"{MIDDLE}.gate_attn.v_linear.weight"])
    assert torch.equal(scene["attn.to_k.weight"], state[f"{MIDDLE}.gate_attn.cross_attn.to_k.weight"])
    assert torch.equal(scene["alpha_dense"], state[f"{MIDDLE}.gate_attn.cross_alpha_dense"])
    assert torch.equal(scene_gates.input_branch.weight, first_conv()[1])
    assert torch.equal(object_gates.position_net.linears[0].weight, position["linears.0.weight"])
    assert list(scene_gates.config.channels) == CONFIG["enc_channels"]
    encoder = scene_gates.image_encoder.state_dict()
    assert all(torch.equal(encoder[key], value) for key, value in release()[2].items())
    assert {gate.attn.heads for gate in object_gates.gates.values()} == {p.heads for p in gate_places(unet).values()}
    assert object_gates.max_objects == 8
    first_stage = without(state, ".cross_", ".v_linear.")
    assert load_smcd(write(tmp_path / "first", first_stage, position), unet, head_dim=HEAD_DIM)[0].max_objects == 30


@pytest.mark.parametrize("is_original", [False, True])
def test_a_file_of_gligen(tmp_path, is_original):
    """The UNet's file with `fuser` and `position_net` in it; eight heads, whatever their width, and 30 objects.

    diffusers' form, or the nesting of the original one, whose other networks and settings lie beside the UNet.
    """
    unet = tiny_networks().unet
    gates = ObjectGates.from_unet(unet)
    state = dict(unet.state_dict())
    blocks = {path.replace(".", "_"): path for path, _ in unet.named_modules()}
    for key, value in gates.state_dict().items():
        if key.startswith("gates."):
            place, _, name = key.removeprefix("gates.").partition(".")
            key = f"{blocks[place]}.fuser.{name}"
        state[key] = value + 1
    content = dict(sorted(state.items()))  # "mid_block" before "up_blocks", "down" first
    if is_original:
        others = {"autoencoder": {"a": torch.zeros(1)}, "text_encoder": {}, "diffusion": {}, "config_dict": {"lr": 1}}
        content = {"model": content, **others}
    torch.save(content, tmp_path / "unet.bin")
    loaded, scene_gates = load_smcd(tmp_path / "unet.bin", unet)
    assert scene_gates is None
    assert loaded.max_objects == 30
    assert load_smcd(tmp_path / "unet.bin", unet, max_objects=5)[0].max_objects == 5
    assert {gate.attn.heads for gate in loaded.gates.values()} == {8}
    expected = {key: value + 1 for key, value in gates.state_dict().items()}
    torch.testing.assert_close(dict(loaded.state_dict()), expected, rtol=0, atol=0)


def without(state, *parts):
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


def test_what_does_not_fit_is_told(unet, tmp_path):
    state, position, image = release()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*pytorch_model.bin"):
        load_smcd(tmp_path, unet)
    cases = {
        r"holds no gates: none of its \d+ keys": (weights("unet_base", "unet"), position, image),
        "holds no position network": (state,),
        "no first-frame encoder": (state, position),
        r"first-frame encoder \(pytorch_model_2": (state, position, {"input_hint_block.0.weight": torch.zeros(1)}),
        "does not read the first frame beside": (state | {"input_blocks.0.0.weight": first_conv()[0]}, position, image),
        r"gates at \d+ places, and the model has": (without(state, "middle_block.1.transformer"), position, image),
        r"1 missing: gates.mid_block\w+.norm2.bias": (without(state, f"{MIDDLE}.gate_attn.norm2.b"), position, image),
    }
    for message, contents in cases.items():
        files = (*contents, None, None)[:3]
        with pytest.raises(ValueError, match=message):
            build_gates(*files, unet, "a file", HEAD_DIM)
    narrow = position | {"null_positive_feature": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"7 numbers and this model by \d+; the published SMCD model as a whole"):
        build_gates(state, narrow, image, unet, "a file", HEAD_DIM)
    width = len(state[f"{MIDDLE}.gate_attn.norm1.weight"])
    wider = state | {f"{MIDDLE}.gate_attn.norm1.weight": torch.zeros(width + 8)}
    with pytest.raises(ValueError, match=f"is {width + 8} wide, its place mid_block_.* {width}$"):
        build_gates(wider, position, image, unet, "a file", HEAD_DIM)


@pytest.mark.parametrize("variant", ["parallel", "double", "merge"])
def test_other_variants_are_refused_by_name(variant):
    """Their keys are known, and no gate of ours computes what they do."""
    cell = {f"{MIDDLE}.gate_attn.{key}": torch.zeros(shape) for key, shape in KEYS[f"gate_{variant}"].items()}
    with pytest.raises(ValueError, match=f"variant '{variant}', which is not supported"):
        split_gates(cell, "a file")
