"""Small files in the layouts that people download, with the real key names."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.unets.unet_motion_model import MotionAdapter
from parity import CONFIG, model_config, weights
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from imageconductor.checkpoints.published import from_published
from imageconductor.data.sprites import caption_words
from imageconductor.models.small_model import build_tokenizer


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory):
    """A Stable Diffusion folder of the parity set's sizes."""
    folder = tmp_path_factory.mktemp("sd") / "v1-5"
    sizes = model_config()
    torch.manual_seed(0)
    UNet2DConditionModel(
        block_out_channels=sizes["block_out_channels"],
        layers_per_block=sizes["layers_per_block"],
        cross_attention_dim=sizes["cross_attention_dim"],
        attention_head_dim=sizes["num_attention_heads"],
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    tokenizer = build_tokenizer([" ".join(caption_words())], 16)
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes["cross_attention_dim"],
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    ).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The three files, as the authors save them."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("unet", "image_controlnet", "flow_controlnet"):
        torch.save({"state_dict": weights(name), "global_step": 81_000}, folder / f"{name}.ckpt")
    return folder


@pytest.fixture(scope="session")
def animatediff(stable_diffusion, tmp_path_factory):
    """Motion module, SparseCtrl and domain adapter in their original layouts; the module in diffusers' as well."""
    folder = tmp_path_factory.mktemp("animatediff")
    unet, image = weights("unet"), weights("image_controlnet")
    motion = {f"module.{key}": value for key, value in unet.items() if ".motion_modules." in key}
    torch.save({"state_dict": motion, "animatediff_config": {"unet": 1}}, folder / "v3_sd15_mm.ckpt")
    torch.save({"controlnet": {f"module.{k}": v for k, v in image.items()}}, folder / "sparsectrl_rgb.ckpt")
    adapter = {}
    for key, value in load_file(stable_diffusion / "unet" / "diffusion_pytorch_model.safetensors").items():
        layer, _, kind = key.rpartition(".")
        if ".attn" in key and kind == "weight" and layer.split(".")[-1] in ("to_q", "to_k", "to_v", "0"):
            path, _, name = layer.removesuffix(".0").rpartition(".")
            adapter[f"{path}.processor.{name}_lora.down.weight"] = 0.1 * torch.randn(3, value.shape[1])
            adapter[f"{path}.processor.{name}_lora.up.weight"] = 0.1 * torch.randn(value.shape[0], 3)
    torch.save({"state_dict": adapter}, folder / "v3_sd15_adapter.ckpt")
    torch.save({"state_dict": {**motion, "module.conv_in.weight": torch.zeros(1)}}, folder / "too_much.ckpt")

    sizes = model_config()
    module = MotionAdapter(
        block_out_channels=sizes["block_out_channels"],
        motion_layers_per_block=sizes["layers_per_block"],
        motion_num_attention_heads=CONFIG["motion_heads"],
        motion_norm_num_groups=32,
        use_motion_mid_block=False,
    )
    base, _ = from_published({key.removeprefix("module."): value for key, value in motion.items()})
    module.load_state_dict({**module.state_dict(), **base})
    module.save_pretrained(folder / "diffusers_module")
    return folder
