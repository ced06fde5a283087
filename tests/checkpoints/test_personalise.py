"""Style and motion LoRAs in the layouts of community sites, on a tiny model."""

import re

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from safetensors.torch import save_file

from imageconductor.checkpoints.personalise import (
    fold_loras,
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
            {
                "mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor."
                f"to_q_lora.{side}.weight": (2, 2)
                for side in ("down", "up")
            },
            load_motion_lora,
            "for motion modules with a mid block, as AnimateDiff v2's; v3 has none",
        ),
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
