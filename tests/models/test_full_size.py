"""The networks at SD-1.5's size, on the meta device: counts, and every key of the published files."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from parity import FOLDER
from test_dreambooth import ldm_unet_key, ldm_vae_key
from transformers import CLIPTextConfig, CLIPTextModel

from imageconductor.checkpoints import assembly, personalise
from imageconductor.checkpoints.published import load_published
from imageconductor.models.adapters import Adapter, adapter_parameters, add_adapter
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet
from imageconductor.models.motion_unet import SD15_ANIMATEDIFF_V3, MotionUNet
from imageconductor.models.weights import unwrap


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


@pytest.fixture(scope="module")
def stable_diffusion():
    """SD-1.5's networks by its sizes: 859.5 M, 83.7 M and 123.1 M parameters."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    return unet, vae, text


def test_animatediffs_files_have_their_places(published, stable_diffusion, tmp_path, monkeypatch):
    """v3's motion module, SparseCtrl and domain adapter in their original names, on SD-1.5's UNet."""
    spatial = stable_diffusion[0].state_dict()
    motion = {f"module.{key}": value for key, value in published["unet"].items() if ".motion_modules." in key}
    sparse = {f"module.{key}": value for key, value in published["image_controlnet"].items()}
    attention = ("to_q", "to_k", "to_v", "to_out")
    adapter = {}
    for key, value in spatial.items():
        path, _, name = key.removesuffix(".weight").removesuffix(".0").rpartition(".")
        if ".attn" in key and key.endswith(".weight") and name in attention:
            adapter[f"{path}.processor.{name}_lora.down.weight"] = torch.empty(128, value.shape[1], device="meta")
            adapter[f"{path}.processor.{name}_lora.up.weight"] = torch.empty(value.shape[0], 128, device="meta")
    files = {"unet": spatial, "mm.ckpt": motion, "sparsectrl.ckpt": sparse, "adapter.ckpt": adapter}
    assert [len(state) for state in files.values()] == [686, 560, 486, 256]
    config = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "attention_head_dim": 8}))
    monkeypatch.setattr(assembly, "_read", lambda path: unwrap(files[path.name]))
    monkeypatch.setattr(assembly, "_source", lambda _, keys: keys)
    monkeypatch.setattr("imageconductor.checkpoints.domain_adapter.read_checkpoint", lambda path: files[path.name])
    paths = {"motion_module": tmp_path / "mm.ckpt", "image_controlnet": tmp_path / "sparsectrl.ckpt"}
    paths["stable_diffusion"] = tmp_path
    with torch.device("meta"):
        lora = assembly.DomainAdapter.read(tmp_path / "adapter.ckpt", 1.0)
        sizes = assembly.unet_sizes(tmp_path / "unet")
        unet, image_controlnet, _, sources = assembly._animatediff(paths, sizes, torch.float16, lora)
    assert {parameter.dtype for parameter in (*unet.parameters(), *image_controlnet.parameters())} == {torch.float16}
    assert millions(unet.parameters()) == 1276.7
    assert millions(image_controlnet.parameters()) == 496.7
    assert sources["unet"] == 686


def test_a_stable_diffusion_single_file_has_its_places(stable_diffusion, monkeypatch):
    """DreamBooth files hold 686 tensors of the UNet, 248 of the VAE and 196 of the text encoder."""
    unet, vae, text = stable_diffusion
    assert [millions(network.parameters()) for network in stable_diffusion] == [859.5, 83.7, 123.1]
    place = {0: 1, 1: 2, 2: 2}
    state = {f"model.diffusion_model.{ldm_unet_key(k, 2, place)}": v for k, v in unet.state_dict().items()}
    for key, value in vae.state_dict().items():
        name = ldm_vae_key(key, 4)
        value = value[..., None, None] if ".attn_1." in name and value.dim() == 2 else value
        state[f"first_stage_model.{name}"] = value
    for key, value in text.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    assert len(state) == 686 + 248 + 196
    monkeypatch.setattr(personalise, "read_names", lambda _: list(state))
    monkeypatch.setattr(personalise, "read_checkpoint", lambda *_: state)
    with torch.device("meta"):
        motion_unet = MotionUNet(**SD15_ANIMATEDIFF_V3)
        pipe = SimpleNamespace(unet=motion_unet, vae=vae, text_encoder=text, domain_adapter=None, provenance={})
        personalise.load_base(pipe, "dreambooth.safetensors")
        state.pop("model.diffusion_model.input_blocks.7.0.in_layers.2.weight")
        with pytest.raises(ValueError, match="1 missing"):
            personalise.load_base(pipe, "dreambooth.safetensors")


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
