"""Model folders read without loading a weight."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_networks
from PIL import Image
from safetensors.torch import save_file

from imageconductor.checkpoints.model_card import read_provenance
from imageconductor.checkpoints.model_folder import (
    adapter_names,
    check_adapters,
    check_shape,
    load_companions,
    locate_model,
    read_dtype,
    read_sampling_defaults,
)
from imageconductor.commands import sample
from imageconductor.models.adapters import attached_adapters
from imageconductor.models.networks import GATES, Networks
from imageconductor.models.weights import find_weights
from imageconductor.sampling.pipeline import ImageConductorPipeline


def test_a_folder_tells_its_defaults_adapters_shape_and_precision(tiny_model):
    assert locate_model(tiny_model) == tiny_model
    assert read_sampling_defaults(tiny_model)["width"] == 32
    assert adapter_names(tiny_model) == ("camera", "object")
    assert read_dtype(tiny_model) == torch.float32
    check_adapters(tiny_model, ["camera", "object"], "control 'mixed'")
    check_shape(tiny_model, (32, 34), 32)


def test_what_a_folder_lacks_is_named(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        read_sampling_defaults(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        locate_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"control 'object' needs the object LoRA.*object_lora"):
        check_adapters(tmp_path, ["object"], "control 'object'")
    with pytest.raises(ValueError, match="multiples of 2, got 33 x 32"):
        check_shape(tiny_model, (33, 32), 4)
    with pytest.raises(ValueError, match=r"1\.\.32"):
        check_shape(tiny_model, (32, 32), 33)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        read_sampling_defaults(tmp_path)


def test_any_adapter_of_a_folder_is_loaded_by_its_name(tiny_model, tmp_path):
    """Nothing counts on two adapters: a third one in the folder is there for the pipeline."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    shutil.copytree(folder / "camera_lora", folder / "crane_lora")
    pipe = ImageConductorPipeline.from_pretrained(folder)
    assert attached_adapters(pipe.motion_controlnet) == ("camera", "crane", "object")


def test_gates_lie_where_the_unet_does(gated_model):
    networks = tiny_networks()
    parts = {"unet": SimpleNamespace(dtype=torch.float32, device=torch.device("meta")), **dict.fromkeys(GATES)}
    controlnets = {name: getattr(networks, name) for name in ("image_controlnet", "motion_controlnet")}
    pipe = SimpleNamespace(**parts, **controlnets)
    load_companions(pipe, gated_model)
    assert pipe.object_gates.device == pipe.scene_gates.device == pipe.unet.device


def test_provenance_is_read_in_any_encoding_of_unicode(tmp_path):
    (tmp_path / "training").mkdir()
    for name, encoding in (("sources.json", "utf-8-sig"), ("training/camera_lora.yaml", "utf-16")):
        (tmp_path / name).write_text("{ü: 1}", encoding=encoding)
    assert read_provenance(tmp_path) == {"sources.json": "{ü: 1}", "training/camera_lora.yaml": "{ü: 1}"}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def put_pointer(path):
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")


DAMAGE = {
    "truncated weights": ("unet/diffusion_pytorch_model.safetensors", truncate, "is truncated or damaged"),
    "pointer": ("motion_controlnet/diffusion_pytorch_model.safetensors", put_pointer, "is a Git LFS pointer"),
    "pointer in place of a LoRA": ("camera_lora/adapter_model.safetensors", put_pointer, "is a Git LFS pointer"),
    "no weights": ("text_encoder/model.safetensors", Path.unlink, "text_encoder holds no weights"),
    "no config": ("vae/config.json", Path.unlink, "there is no vae/config.json"),
    "truncated config": ("scheduler/scheduler_config.json", truncate, "scheduler_config.json is damaged"),
    "no tokenizer": ("tokenizer/tokenizer.json", Path.unlink, "there is no tokenizer/"),
    "no part": ("image_controlnet", shutil.rmtree, "lacks image_controlnet"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_part_is_one_line_before_weights_are_read(name, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    part, spoil, message = DAMAGE[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    spoil(folder / part)
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    arguments = ["--model", str(folder), "--image", str(tmp_path / "picture.png"), "--output", str(tmp_path / "out")]
    assert sample.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert str(folder) in line
    for load in (ImageConductorPipeline.from_pretrained, Networks.load):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load(folder)


def test_the_weights_of_a_variant_are_loaded_where_there_are_no_others(tiny_model, tmp_path):
    """All parts as `save_pretrained(variant="fp16")` writes them, and one part alone."""
    expected = Networks.load(tiny_model).unet.state_dict()
    ImageConductorPipeline.from_pretrained(tiny_model).save_pretrained(tmp_path / "all", variant="fp16")
    shutil.copytree(tiny_model, tmp_path / "one")
    weights = tmp_path / "one" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    for folder in (tmp_path / "all", tmp_path / "one"):
        assert read_dtype(folder) == torch.float32
        for found in (ImageConductorPipeline.from_pretrained(folder).unet, Networks.load(folder).unet):
            assert found.state_dict().keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def test_plain_weights_come_before_a_variants_and_shards_are_counted(tmp_path):
    for name in ("model.fp16.safetensors", "model.safetensors", "pytorch_model.bin"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    assert find_weights(tmp_path) == ([tmp_path / "model.safetensors"], None)
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds 1 of the 2 shards"):
        find_weights(tmp_path)
