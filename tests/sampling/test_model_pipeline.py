"""The networks of a model as a pipeline: how it is loaded, taken apart and saved."""

from dataclasses import fields

import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.models.adapters import attached_adapters
from imageconductor.models.networks import Networks
from imageconductor.sampling.pipeline import ImageConductorPipeline


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ImageConductorPipeline.from_pretrained(tiny_model)


def test_latents_that_are_shifted_are_decoded_as_they_were_encoded(tiny_model):
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, shift_factor=0.25).eval()
    pipe = ImageConductorPipeline.from_pretrained(tiny_model, vae=vae)
    latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents.transpose(1, 2).flatten(0, 1)).sample / 2 + 0.5
    found = pipe.decode_latents((latents - 0.25) * 0.5)
    torch.testing.assert_close(found[0], expected.clamp(0, 1))


def test_what_lies_beside_the_parts_goes_along_with_them(pipe, tmp_path):
    (tmp_path / "few_step_lora").mkdir()
    beside = {
        "lora_folders": {"few_step_lora": tmp_path / "few_step_lora"},
        "domain_adapter": DomainAdapter({"unet.layer.lora_A.weight": torch.ones(2, 2)}, 0.5, "test"),
        "provenance": {"sources.json": "{}"},
        "folded": ["style0"],
    }
    original = ImageConductorPipeline(**(pipe.components | beside))
    for other in (ImageConductorPipeline(**original.components), ImageConductorPipeline.from_pipe(original)):
        assert {name: getattr(other, name) for name in beside} == beside
        assert (
            other.sampling_defaults == pipe.sampling_defaults != ImageConductorPipeline(**parts(pipe)).sampling_defaults
        )
        assert attached_adapters(other.motion_controlnet) == ("camera", "object")
        other.to("cpu").maybe_free_model_hooks()
    with pytest.raises(ValueError, match=r"was loaded for a job, whose LoRAs \(style0\)"):
        other.save_pretrained(tmp_path / "again")


def parts(pipe):
    """The networks, tokenizer and scheduler alone."""
    return {name: getattr(pipe, name) for name in pipe.components if name in {field.name for field in fields(Networks)}}


def test_an_attached_lora_is_saved_as_the_error_says(tiny_model, tmp_path):
    pipe = ImageConductorPipeline.from_pretrained(tiny_model)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    with pytest.raises(ValueError, match=r"style is attached .* unload_lora_weights\(\) first, after fuse_lora\(\)"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "model")
    saved = ImageConductorPipeline.from_pretrained(tmp_path / "model").unet.state_dict()
    assert saved.keys() == before.keys()
    assert {key for key, value in saved.items() if not torch.equal(value, before[key])} == {
        key for key in before if key.endswith("to_q.weight")
    }


def test_networks_of_several_dtypes_are_refused_by_name(tiny_model):
    mixed = {"unet": torch.bfloat16, "default": torch.float32}
    with pytest.raises(
        ValueError, match=r"one dtype, got unet bfloat16, image_controlnet float32, motion_controlnet fl"
    ):
        ImageConductorPipeline.from_pretrained(tiny_model, torch_dtype=mixed)
    apart = ImageConductorPipeline.from_pretrained(tiny_model, dtype={"vae": torch.bfloat16, "default": torch.float32})
    assert (apart.vae.dtype, apart.unet.dtype) == (torch.bfloat16, torch.float32)
