"""A model folder as diffusers' own loader reads it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.model_folder import PIPELINE_CODE
from imageconductor.conditioning import camera_preset
from imageconductor.models.adapters import attached_adapters
from imageconductor.sampling.pipeline import ImageConductorPipeline


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    """diffusers copies the code that it runs into a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def half(tiny_model, tmp_path_factory):
    """A model folder in half precision with a domain adapter and sources."""
    folder = tmp_path_factory.mktemp("half") / "model"
    pipe = ImageConductorPipeline.from_pretrained(tiny_model, dtype=torch.float16)
    pair = {f"unet.layer.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    pipe.domain_adapter = DomainAdapter(pair, 0.5, "test")
    pipe.provenance["training/camera_lora.yaml"] = "max_steps: 3\n"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(half):
    return ImageConductorPipeline.from_pretrained(half)


@pytest.fixture(scope="module")
def theirs(half):
    return DiffusionPipeline.from_pretrained(half, trust_remote_code=True)


def latents(pipe, control):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"control": control, "num_inference_steps": 1, "output_type": "latent"}
    track, generator = camera_preset("pan-left", (32, 32), 4), torch.Generator().manual_seed(0)
    return pipe(Image.new("RGB", (32, 32), "red"), track, "a red circle", generator=generator, **arguments).frames


def test_it_gives_the_same_pipeline_as_the_package(ours, theirs):
    assert type(theirs) is ImageConductorPipeline
    assert attached_adapters(theirs.motion_controlnet) == ("camera", "object")
    assert not any(parameter.requires_grad for parameter in theirs.motion_controlnet.parameters())
    assert theirs.text_encoder.dtype == ours.text_encoder.dtype == torch.float32
    assert theirs.sampling_defaults == ours.sampling_defaults
    assert theirs.domain_adapter.merged_scale == 0.5
    assert theirs.provenance == ours.provenance == {"training/camera_lora.yaml": "max_steps: 3\n"}
    with_camera = latents(ours, "camera")
    assert not torch.equal(with_camera, latents(ours, "base"))
    assert torch.equal(latents(theirs, "camera"), with_camera)


def test_what_it_loaded_can_be_saved_and_shared(theirs, tmp_path):
    assert attached_adapters(type(theirs).from_pipe(theirs).motion_controlnet) == ("camera", "object")
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "pipeline.py").read_text() == PIPELINE_CODE
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(latents(again, "camera"), latents(theirs, "camera"))


def test_it_loads_in_the_precision_that_is_asked_for(half):
    pipe = DiffusionPipeline.from_pretrained(half, trust_remote_code=True, dtype=torch.bfloat16)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for network in networks for parameter in network.parameters()} == {torch.bfloat16}


def test_it_asks_for_trust(half):
    with pytest.raises(ValueError, match=r"custom code in pipeline\.py.*(?s:.*)Pass `trust_remote_code=True`"):
        DiffusionPipeline.from_pretrained(half)


def test_it_says_what_to_install(half, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.split(".")[0] == "imageconductor"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "imageconductor", None)
    with pytest.raises(ImportError, match=r"needs the Python package imageconductor.*pip install \."):
        DiffusionPipeline.from_pretrained(half, trust_remote_code=True)
    assert "pip install imageconductor" not in caplog.text


def test_a_damaged_lora_is_named(half, tmp_path):
    shutil.copytree(half, tmp_path / "model")
    (tmp_path / "model" / "camera_lora" / "adapter_model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ValueError, match=r"camera_lora/adapter_model\.safetensors"):
        DiffusionPipeline.from_pretrained(tmp_path / "model", trust_remote_code=True)


def test_the_package_does_not_run_the_code_in_a_folder(half, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(half, folder)
    (folder / "pipeline.py").write_text("raise RuntimeError('code in the folder was run')\n")
    assert attached_adapters(ImageConductorPipeline.from_pretrained(folder).motion_controlnet) == ("camera", "object")


def test_a_folder_without_the_code_loads_as_ever(half, ours, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(half, folder)
    (folder / "pipeline.py").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "ImageConductorPipeline"}))
    assert torch.equal(latents(ImageConductorPipeline.from_pretrained(folder), "mixed"), latents(ours, "mixed"))


def test_the_bundled_model_has_the_code():
    folder = Path(__file__).parents[2] / "models" / "sprites"
    assert (folder / "pipeline.py").read_text() == PIPELINE_CODE
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == [
        "pipeline",
        "ImageConductorPipeline",
    ]
