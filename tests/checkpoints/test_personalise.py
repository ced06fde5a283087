"""DreamBooth files, style and motion LoRAs in the layouts of community sites, on a tiny model."""

import re

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from imageconductor.checkpoints.personalise import (
    fold_loras,
    load_base,
    load_motion_lora,
    load_style_lora,
    personalise,
)
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.loras import parse_lora
from imageconductor.sampling.pipeline import ImageConductorPipeline


@pytest.fixture
def pipe():
    return tiny_pipeline()


def video(pipe):
    image = Image.fromarray(np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8))
    return pipe(image, prompt="a red circle", generator=torch.Generator().manual_seed(0), output_type="np").frames


def linear_layers(network, part, kind):
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and part in name and name.split(".")[-1] in kind
    }


def lora_pairs(layers, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, module in layers.items():
        yield (
            name,
            torch.randn(rank, module.in_features, generator=generator),
            torch.randn(module.out_features, rank, generator=generator),
        )


SPATIAL = ("to_q", "to_k", "to_v")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")


def kohya(pipe, path, alpha=1.0):
    state = {}
    layers = linear_layers(pipe.unet, ".attentions.", SPATIAL)
    for name, down, up in lora_pairs(layers):
        key = "lora_unet_" + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    for name, down, up in lora_pairs(linear_layers(pipe.text_encoder, "self_attn", TEXT)):
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        key = "lora_te_" + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return layers


def diffusers_format(pipe, path):
    state = {}
    for name, down, up in lora_pairs(linear_layers(pipe.unet, ".attentions.", SPATIAL)):
        state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(state, path)


def original_motion(pipe, path):
    state = {}
    for name, down, up in lora_pairs(linear_layers(pipe.unet, ".motion_modules.", SPATIAL)):
        name = re.sub(r"(motion_modules\.\d+)", r"\1.temporal_transformer", name)
        name = name.replace(".attn1.", ".attention_blocks.0.").replace(".attn2.", ".attention_blocks.1.")
        layer, _, projection = name.rpartition(".")
        state[f"{layer}.processor.{projection}_lora.down.weight"] = down
        state[f"{layer}.processor.{projection}_lora.up.weight"] = up
    torch.save({"state_dict": state}, path)


FORMATS = {
    "kohya": (kohya, load_style_lora, "style.safetensors"),
    "diffusers": (diffusers_format, load_style_lora, "style.safetensors"),
    "motion": (original_motion, load_motion_lora, "motion.ckpt"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_lora_acts_by_its_scale_and_leaves_no_trace(form, pipe, tmp_path):
    write, load, name = FORMATS[form]
    write(pipe, tmp_path / name)
    plain = video(pipe)
    load(pipe, tmp_path / name, "one")
    full = video(pipe)
    assert np.abs(full - plain).max() > 1e-3
    pipe.set_adapters(["one"], [0.5])
    half = video(pipe)
    assert np.abs(half - plain).max() > 1e-4
    assert np.abs(half - full).max() > 1e-4
    pipe.set_adapters(["one"], [0.0])
    assert np.array_equal(video(pipe), plain)
    pipe.unload_lora_weights()
    assert np.array_equal(video(pipe), plain)


def test_a_kohya_lora_adds_alpha_over_rank_times_up_down(pipe, tmp_path):
    layers = kohya(pipe, tmp_path / "style.safetensors", alpha=1.0)
    name, down, up = next(lora_pairs(layers))
    module = layers[name]
    x = torch.randn(3, module.in_features)
    before = module(x)
    load_style_lora(pipe, tmp_path / "style.safetensors", "one")
    after = pipe.unet.get_submodule(name)(x)
    torch.testing.assert_close(after, before + 1.0 / 2 * x @ down.T @ up.T)


def test_two_loras_add_up_in_either_order(pipe, tmp_path):
    kohya(pipe, tmp_path / "style.safetensors")
    original_motion(pipe, tmp_path / "motion.ckpt")
    videos = []
    for order in ((0, 1), (1, 0)):
        for which in order:
            load, name = ((load_style_lora, "style.safetensors"), (load_motion_lora, "motion.ckpt"))[which]
            load(pipe, tmp_path / name, name.partition(".")[0])
        pipe.set_adapters(["style", "motion"], [0.6, 0.8])
        videos.append(video(pipe))
        pipe.unload_lora_weights()
    np.testing.assert_allclose(videos[0], videos[1], atol=1e-5)


def test_folded_loras_act_as_attached_ones(pipe, tmp_path):
    plain = video(pipe)
    kohya(pipe, tmp_path / "style.safetensors")
    original_motion(pipe, tmp_path / "motion.ckpt")
    personalise(pipe, None, [(str(tmp_path / "style.safetensors"), 0.6)], [(str(tmp_path / "motion.ckpt"), 0.8)])
    pipe.to(torch.float64)  # In float32 the steps of a random network with so large LoRAs magnify what is rounded.
    attached = video(pipe)
    fold_loras(pipe)
    np.testing.assert_allclose(video(pipe), attached, atol=1e-5)
    assert np.abs(plain - attached).max() > 1e-3
    parts = pipe.unet, pipe.text_encoder
    assert not [key for part in parts for key in part.state_dict() if "lora_" in key], "products cost time"
    load_style_lora(pipe, tmp_path / "style.safetensors", "style0")  # The name is free again.


def test_a_style_is_saved_once_it_is_fused(pipe, tmp_path):
    plain = video(pipe)
    kohya(pipe, tmp_path / "style.safetensors")
    load_style_lora(pipe, tmp_path / "style.safetensors", "one")
    styled = video(pipe)
    with pytest.raises(ValueError, match=r"one is attached .* fuse_lora"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    pipe.fuse_lora(lora_scale=1.0)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "model")
    again = ImageConductorPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(video(again), video(pipe))
    assert np.abs(video(again) - styled).mean() < 0.05 * np.abs(plain - styled).mean()


def test_textual_inversion_teaches_the_prompt_a_word(pipe, tmp_path):
    width = pipe.text_encoder.config.hidden_size
    embedding = torch.randn(2, width, generator=torch.Generator().manual_seed(3))
    torch.save({"string_to_param": {"*": embedding}, "name": "<style>"}, tmp_path / "style.pt")
    words = ["a red circle, <style>"]
    before = pipe.encode_prompt(words)
    pipe.load_textual_inversion(str(tmp_path / "style.pt"), token="<style>")
    assert (pipe.encode_prompt(words) - before).abs().max() > 1e-3
    table = pipe.text_encoder.get_input_embeddings().weight
    token = pipe.tokenizer.convert_tokens_to_ids("<style>")
    assert torch.equal(table[token], embedding[0])
    assert torch.equal(table[pipe.tokenizer.convert_tokens_to_ids("<style>_1")], embedding[1])
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(words[0], pipe.tokenizer)).input_ids
    assert token in ids
    assert token + 1 in ids
    pipe.unload_textual_inversion("<style>")
    assert torch.equal(pipe.encode_prompt(words), before)


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def ldm_unet_key(key, layers, upsampler_place):
    """A diffusers UNet key under its original name, written from the layout of the original code.

    An upsampler is third in its block, second where there is no attention.
    """
    for ours, original in OUTER.items():
        key = re.sub(rf"^{re.escape(ours)}\.", f"{original}.", key)
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key):
        path, level, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = level * (layers + 1) + (1 if path == "down" else 0)
        block = f"{'input' if path == 'down' else 'output'}_blocks.{first + number}"
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{upsampler_place[level]}.{rest}"
        key = f"{block}.{0 if kind == 'resnets' else 1}.{rest}"
    if "transformer_blocks" not in key:
        for ours, original in RESNET.items():
            key = re.sub(rf"\.{ours}\.(weight|bias)$", rf".{original}.\1", key)
    return key


def ldm_vae_key(key, levels):
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    for ours, original in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        key = key.replace(f"mid_block.attentions.0.{ours}", f"mid.attn_1.{original}")
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    for ours, original in (("resnets", "block"), ("upsamplers.0", "upsample")):
        key = re.sub(rf"up_blocks\.(\d+)\.{ours}", lambda m, o=original: f"up.{levels - 1 - int(m[1])}.{o}", key)
    return key


def ldm_file(pipe, path):
    """A DreamBooth file with weights of its own, in the original Stable Diffusion layout; and those weights."""
    other = tiny_pipeline(seed=7)
    unet = {k: v for k, v in other.unet.state_dict().items() if ".motion_modules." not in k}
    text = other.text_encoder.state_dict()
    layers, levels = pipe.unet.config["layers_per_block"], len(pipe.vae.config["block_out_channels"])
    state = {f"model.diffusion_model.{ldm_unet_key(k, layers, {0: 2})}": v for k, v in unet.items()}
    state |= {f"first_stage_model.{ldm_vae_key(k, levels)}": v for k, v in other.vae.state_dict().items()}
    for key, value in text.items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        state[f"cond_stage_model.transformer.{key}"] = value
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return unet, other.vae.state_dict(), text


def test_a_dreambooth_file_replaces_pictures_and_keeps_motion(pipe, tmp_path):
    unet, vae, text = ldm_file(pipe, tmp_path / "base.safetensors")
    motion = {k: v.clone() for k, v in pipe.unet.state_dict().items() if ".motion_modules." in k}
    control = {k: v.clone() for k, v in pipe.motion_controlnet.state_dict().items()}
    load_base(pipe, tmp_path / "base.safetensors")
    for network, expected in ((pipe.unet, {**unet, **motion}), (pipe.vae, vae), (pipe.text_encoder, text)):
        found = network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(torch.equal(pipe.motion_controlnet.state_dict()[key], value) for key, value in control.items())
    made = video(pipe)
    pipe.save_pretrained(tmp_path / "model")
    again = ImageConductorPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(video(again), made)


def test_a_dreambooth_file_of_another_width_changes_nothing(pipe, tmp_path):
    ldm_file(pipe, tmp_path / "base.safetensors")
    state = load_file(tmp_path / "base.safetensors")
    key = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    state[key] = torch.zeros(5)
    save_file(state, tmp_path / "base.safetensors")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"base\.safetensors.* does not fit the model; 1 mis-shaped: .*final_layer_norm"
    ):
        load_base(pipe, tmp_path / "base.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"conditioner.embedders.0.x": torch.zeros(1)}, "is a Stable Diffusion XL model"),
        ({"some.weight": torch.zeros(1)}, "is no Stable Diffusion single file"),
        ({"model.diffusion_model.time_embed.0.weight": torch.zeros(1)}, "does not fit"),
    ],
)
def test_a_base_that_is_none_is_refused(content, said, pipe, tmp_path):
    save_file(content, tmp_path / "base.safetensors")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_base(pipe, tmp_path / "base.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("content", "load", "said"),
    [
        (
            {f"unet.{LAYER}.lora_A.weight": (2, 99), f"unet.{LAYER}.lora_B.weight": (32, 2)},
            load_style_lora,
            "another base",
        ),
        (
            {f"unet.{LAYER}9.lora_A.weight": (2, 32), f"unet.{LAYER}9.lora_B.weight": (32, 2)},
            load_style_lora,
            "this model has no layer",
        ),
        ({"something.weight": (2, 2)}, load_style_lora, "LoRA"),
        (
            {f"unet.{LAYER}.lora_A.weight": (2, 32), f"unet.{LAYER}.lora_B.weight": (32, 2)},
            load_motion_lora,
            "is no motion LoRA",
        ),
    ],
)
def test_a_lora_for_another_base_is_refused(content, load, said, pipe, tmp_path):
    save_file({key: torch.zeros(shape) for key, shape in content.items()}, tmp_path / "lora.safetensors")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match=said) as error:
        load(pipe, tmp_path / "lora.safetensors", "one")
    assert "lora.safetensors" in str(error.value)
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_how_a_lora_and_its_scale_are_written(tmp_path):
    assert parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_lora("a.safetensors:0.6") == ("a.safetensors", 0.6)
    (tmp_path / "b:1").touch()
    assert parse_lora(f"{tmp_path}/b:1") == (f"{tmp_path}/b:1", 1.0)
    with pytest.raises(ValueError, match="'x' is no number"):
        SampleJob(lora=["a.safetensors:x"])
