"""LoRA files of other tools: strength from wherever a format keeps alpha, and what cannot be applied is refused."""

import argparse
import json

import pytest
import torch
from conftest import tiny_pipeline
from safetensors.torch import save_file

from imageconductor.checkpoints.personalise import load_motion_lora, load_style_lora, personalise
from imageconductor.models.adapters import active, load_adapter, save_adapter
from imageconductor.models.weights import read_checkpoint

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
QUERY, VALUE = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_v"
MOTION = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
TEXT = "encoder.layers.0.self_attn.q_proj"
MLP = "encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def shared():
    return tiny_pipeline()


@pytest.fixture
def pipe(shared):
    yield shared
    shared.unload_lora_weights()


def matrices(network, layer, rank=4):
    """A and B of a layer, the same each time."""
    out, into = network.get_submodule(layer).weight.shape[:2]
    generator = torch.Generator().manual_seed(len(layer) + rank)
    return torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)


def growth(network, layer):
    """What the LoRA of a layer adds to its weight."""
    module = network.get_submodule(layer)
    return sum(module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A)


def in_kohya(pipe, alpha):
    state = {}
    for prefix, network, layer in (("unet", pipe.unet, QUERY), ("te_text_model", pipe.text_encoder, TEXT)):
        down, up = matrices(network, layer)
        key = f"lora_{prefix}_{layer.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def in_diffusers(pipe, a="lora_A", b="lora_B"):
    state = {}
    for part, layer in (("unet", QUERY), ("text_encoder", TEXT)):
        down, up = matrices(getattr(pipe, part), layer)
        state |= {f"{part}.{layer}.{a}.weight": down, f"{part}.{layer}.{b}.weight": up}
    return state


def header(**settings):
    return {"lora_adapter_metadata": json.dumps(settings), "format": "pt"}


def write_keys(pipe, folder):
    save_file(in_kohya(pipe, 1.0), folder / "x.safetensors")


def write_kohya_header(pipe, folder):
    save_file(in_kohya(pipe, None), folder / "x.safetensors", {"ss_network_alpha": "1.0", "ss_network_dim": "4"})


def write_diffusers_header(pipe, folder):
    one = {"r": 4, "lora_alpha": 1, "use_dora": False}
    settings = {f"{part}.{key}": value for part in ("unet", "text_encoder") for key, value in one.items()}
    save_file(in_diffusers(pipe), folder / "x.safetensors", header(**settings))


def write_diffusers_keys(pipe, folder):
    state = in_diffusers(pipe, "lora.down", "lora.up")
    state |= {f"unet.{QUERY}.alpha": torch.tensor(1.0), f"text_encoder.{TEXT}.alpha": torch.tensor(1.0)}
    save_file(state, folder / "x.safetensors")


def write_pickled_numbers(pipe, folder):
    state = {key: float(value) if key.endswith(".alpha") else value for key, value in in_kohya(pipe, 1.0).items()}
    torch.save({"state_dict": state}, folder / "x.pt")


@pytest.mark.parametrize(
    "write", [write_keys, write_kohya_header, write_diffusers_header, write_diffusers_keys, write_pickled_numbers]
)
def test_the_strength_is_alpha_over_rank_wherever_alpha_stands(write, pipe, tmp_path):
    write(pipe, tmp_path)
    expected = [matrices(pipe.unet, QUERY), matrices(pipe.text_encoder, TEXT)]
    load_style_lora(pipe, next(tmp_path.iterdir()), "one")
    for network, layer, (down, up) in zip((pipe.unet, pipe.text_encoder), (QUERY, TEXT), expected, strict=True):
        torch.testing.assert_close(growth(network, layer), 1 / 4 * up @ down)


def write_peft(pipe, folder, **settings):
    state = {}
    for layer, rank in ((QUERY, 4), (VALUE, 2)):
        down, up = matrices(pipe.unet, layer, rank)
        state |= {f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up}
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"to_v": 2}, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


PEFT = {
    "alpha of all": ({}, 8 / 4, 8 / 2),
    "alpha by layer": ({"alpha_pattern": {"attn1.to_v": 3}}, 8 / 4, 3 / 2),
    "stabilised by rank": ({"use_rslora": True}, 8 / 4**0.5, 8 / 2**0.5),
}


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
def test_a_peft_folder_acts_as_its_config_says(name, file, pipe, tmp_path):
    settings, query, value = PEFT[name]
    expected = [matrices(pipe.unet, QUERY, 4), matrices(pipe.unet, VALUE, 2)]
    load_style_lora(pipe, write_peft(pipe, tmp_path, **settings) / file, "one")
    for layer, scale, (down, up) in zip((QUERY, VALUE), (query, value), expected, strict=True):
        torch.testing.assert_close(growth(pipe.unet, layer), scale * up @ down)


def test_an_adapter_of_a_model_folder_acts_as_its_config_says(tmp_path):
    network = tiny_pipeline().motion_controlnet
    folder, copy = tmp_path / "made", tmp_path / "saved"
    for place in (folder, copy):
        place.mkdir()
    layers = [name for name, _ in network.named_modules() if name.endswith((".to_q", ".to_v"))][:2]
    state, expected = {}, []
    for layer, rank in zip(layers, (4, 2), strict=True):
        module = network.get_submodule(layer).base_layer
        down, up = torch.randn(rank, module.in_features), torch.randn(module.out_features, rank)
        state |= {f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up}
        expected.append(8 / rank**0.5 * up @ down)
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(network, "made", folder)
    save_adapter(network, "made", copy)
    load_adapter(network, "saved", copy)
    for name in ("made", "saved"):
        with active(network, name):
            for layer, delta in zip(layers, expected, strict=True):
                torch.testing.assert_close(network.get_submodule(layer).get_delta_weight(name), delta)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="is a DoRA"):
        load_adapter(network, "third", folder)


def test_a_motion_lora_has_its_strength_too(pipe, tmp_path):
    down, up = matrices(pipe.unet, MOTION)
    original = MOTION.replace(".transformer_blocks", ".temporal_transformer.transformer_blocks").replace(
        ".attn1.to_q", ".attention_blocks.0.processor.to_q_lora"
    )
    state = {f"{original}.down.weight": down, f"{original}.up.weight": up, f"{original}.alpha": torch.tensor(1.0)}
    torch.save({"state_dict": state}, tmp_path / "motion.ckpt")
    state = {f"unet.{MOTION}.lora_A.weight": down, f"unet.{MOTION}.lora_B.weight": up}
    save_file(state, tmp_path / "motion.safetensors", header(**{"unet.r": 4, "unet.lora_alpha": 1}))
    for number, name in enumerate(("motion.ckpt", "motion.safetensors")):
        load_motion_lora(pipe, tmp_path / name, f"m{number}")
        pipe.set_adapters([f"m{number}"])
        torch.testing.assert_close(growth(pipe.unet, MOTION), 1 / 4 * up @ down)


def test_files_for_one_part_act_together(pipe, tmp_path):
    deltas = {}
    for name, network, layers in (
        ("te_text_model", pipe.text_encoder, (TEXT, MLP)),
        ("unet", pipe.unet, (QUERY, VALUE)),
    ):
        state = {}
        for layer in layers:
            down, up = matrices(network, layer)
            key = f"lora_{name}_{layer.replace('.', '_')}"
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
            deltas[layer] = 2 / 4 * up @ down
        save_file(state, tmp_path / f"{name}.safetensors")
    personalise(pipe, None, [(str(tmp_path / f"{n}.safetensors"), 0.5) for n in ("te_text_model", "unet")], [])
    for layer, delta in deltas.items():
        network = pipe.unet if "blocks" in layer else pipe.text_encoder
        torch.testing.assert_close(growth(network, layer), 0.5 * delta)


KINDS = {
    "DoRA": {f"unet.{QUERY}.lora_magnitude_vector.weight": (16,)},
    "DoRA of kohya": {"lora_unet_x.dora_scale": (16, 1)},
    "LoHa": {"lora_unet_x.hada_w1_a": (2, 2)},
    "LoKr": {"lora_unet_x.lokr_w1": (2, 2)},
    "OFT": {"lora_unet_x.oft_blocks": (2, 2)},
    "(IA)3": {"lora_unet_x.on_input": (2,)},
    "LoCon with a Tucker core": {"lora_unet_x.lora_mid.weight": (2, 2, 3, 3)},
    "LoRA with biases": {f"unet.{QUERY}.lora_B.bias": (16,)},
    "full difference of weights": {"lora_unet_x.diff": (2, 2)},
}


def state_of(pipe):
    return {**pipe.unet.state_dict(), **{f"t.{key}": value for key, value in pipe.text_encoder.state_dict().items()}}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name_and_leave_nothing(kind, pipe, tmp_path):
    good = tmp_path / "good.safetensors"
    save_file(in_kohya(pipe, 1.0), good)
    extra = {key: torch.zeros(shape) for key, shape in KINDS[kind].items()}
    save_file({**in_diffusers(pipe), **extra}, tmp_path / "other.safetensors")
    before = state_of(pipe).keys()
    with pytest.raises(ValueError, match=r"other\.safetensors is a") as error:
        personalise(pipe, None, [(str(good), 1.0), (str(tmp_path / "other.safetensors"), 1.0)], [])
    assert kind.removesuffix(" of kohya") in str(error.value)
    assert "\n" not in str(error.value)
    assert state_of(pipe).keys() == before
    assert not pipe.get_list_adapters()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"peft_type": "LOHA"}, "is a LOHA adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 LoRA, whose base has other weights"),
        ({"bias": "all"}, "LoRA with biases"),
        ({"lora_alpha": "much"}, "settings cannot be read"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(settings, said, pipe, tmp_path):
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors.*{said}"):
        load_style_lora(pipe, write_peft(pipe, tmp_path, **settings), "one")
    prefixed = {f"unet.{key}": value for key, value in {"r": 4, "lora_alpha": 4, **settings}.items()}
    save_file(in_diffusers(pipe), tmp_path / "x.safetensors", header(**prefixed))
    with pytest.raises(ValueError, match=rf"x\.safetensors.*{said}"):
        load_style_lora(pipe, tmp_path / "x.safetensors", "one")
    assert not pipe.get_list_adapters()


def test_what_is_missing_is_named(pipe, tmp_path):
    down, up = matrices(pipe.unet, QUERY)
    for name, state, said in (
        ("half", {f"unet.{QUERY}.lora_A.weight": down}, "has a LoRA down and no up"),
        ("layer", {f"unet.{QUERY}9.lora_A.weight": down, f"unet.{QUERY}9.lora_B.weight": up}, "has no layer"),
        ("xl", {"lora_te2_x.lora_down.weight": down, "lora_te2_x.lora_up.weight": up}, "has no layer lora_te2_x"),
        ("peft", {f"base_model.model.{QUERY}.lora_A.weight": down}, "keeps its strength in adapter_config.json"),
    ):
        save_file({**in_diffusers(pipe), **state} if name != "half" else state, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=rf"{name}\.safetensors.*{said}"):
            load_style_lora(pipe, tmp_path / f"{name}.safetensors", "one")
    with pytest.raises(FileNotFoundError, match="holds no LoRA; looked for adapter_model"):
        load_style_lora(pipe, tmp_path, "one")
    assert not pipe.get_list_adapters()


def test_a_pickle_with_foreign_classes_is_refused_with_the_way_out(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1)}, "hparams": argparse.Namespace(lr=1)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt .* it holds more than tensors \(argparse\.Namespace\)") as error:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "safetensors.torch.save_file" in str(error.value)
    (tmp_path / "y.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"y\.ckpt cannot be read as a checkpoint") as damaged:
        read_checkpoint(tmp_path / "y.ckpt")
    for text in (str(error.value), str(damaged.value)):
        assert "\x1b" not in text
        assert "\n" not in text
