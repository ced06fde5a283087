"""DreamBooth files in the original Stable Diffusion layout, on a tiny model."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from safetensors.torch import load_file, save_file
from test_personalise import video

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.personalise import load_base, personalise
from imageconductor.sampling.pipeline import ImageConductorPipeline


@pytest.fixture
def pipe():
    return tiny_pipeline()


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
    torch.testing.assert_close(dict(pipe.motion_controlnet.state_dict()), control, rtol=0, atol=0)
    made = video(pipe)
    pipe.save_pretrained(tmp_path / "model")
    again = ImageConductorPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(video(again), made)


def add_to_file(path, **tensors):
    save_file({**load_file(path), **tensors}, path)


def test_what_a_single_file_holds_besides_a_model_is_left_out(pipe, tmp_path, caplog):
    """The projection of the whole CLIP; schedule and averages of the training, which need not be finite."""
    path = tmp_path / "base.safetensors"
    _, _, text = ldm_file(pipe, path)
    more = {"cond_stage_model.transformer.text_projection.weight": torch.ones(2, 2)}
    more |= {"sqrt_recip_alphas_cumprod": torch.full((3,), torch.inf), "model_ema.decay": torch.tensor(torch.nan)}
    add_to_file(path, **more)
    with caplog.at_level("INFO"):
        load_base(pipe, path)
    assert "text_projection.weight of the text encoder is left out" in caplog.text
    torch.testing.assert_close(dict(pipe.text_encoder.state_dict()), text, rtol=0, atol=0)
    key = "model.diffusion_model.time_embed.0.bias"
    add_to_file(path, **{key: torch.full_like(load_file(path)[key], torch.inf)})
    with pytest.raises(ValueError, match=f"is damaged: {key} holds nan"):
        load_base(pipe, path)


def test_a_base_takes_the_domain_adapter_out_and_is_noted(pipe, tmp_path):
    ldm_file(pipe, tmp_path / "base.safetensors")
    unet = load_file(tmp_path / "base.safetensors")["model.diffusion_model.time_embed.0.weight"]
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    state = {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    source = {"path": "unet.ckpt", "sha256": {}, "keys": 1}
    merged = pipe.domain_adapter = DomainAdapter(state, 1.0, "adapter.ckpt")
    pipe.provenance = {"sources.json": json.dumps({"recipe": {}, "sources": {"unet": source}})}
    load_base(pipe, tmp_path / "base.safetensors")
    assert (pipe.domain_adapter.merged_scale, merged.merged_scale) == (0.0, 1.0)
    sources = json.loads(pipe.provenance["sources.json"])["sources"]
    assert list(sources) == ["unet", "base"]
    replaced = "base.safetensors, in place of: spatial layers of the UNet, VAE, text encoder"
    assert sources["base"]["path"] == f"{tmp_path}/{replaced}"
    assert torch.equal(pipe.unet.time_embedding.linear_1.weight, unet)
    personalise(pipe, None, [], [], domain_adapter_scale=0.5)
    assert pipe.get_list_adapters() == {"unet": ["domain"]}
    assert pipe.unet.get_submodule(layer).scaling["domain"] == 0.5
    pipe.unload_lora_weights()
    for scale in (0.5, 0.0):  # a folder of before is written again
        pipe.domain_adapter.merged_scale = scale
        pipe.save_pretrained(tmp_path / "model")
        assert DomainAdapter.load(tmp_path / "model").merged_scale == scale


def test_a_base_is_not_lost_in_offloaded_weights(pipe, tmp_path):
    """accelerate keeps them elsewhere, and empty ones in the network."""
    ldm_file(pipe, tmp_path / "base.safetensors")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    pipe.vae.to("meta")
    with pytest.raises(ValueError, match=r"VAE cannot be put in place of weights that are offloaded, e\.g\. \w+"):
        load_base(pipe, tmp_path / "base.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


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
        ({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1)}, "is a LoRA and no base model; give it as lora"),
        ({"model.diffusion_model.time_embed.0.weight": torch.zeros(1)}, "does not fit"),
    ],
)
def test_a_base_that_is_none_is_refused(content, said, pipe, tmp_path):
    save_file(content, tmp_path / "base.safetensors")
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_base(pipe, tmp_path / "base.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
