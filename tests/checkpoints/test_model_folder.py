"""Model folders read without loading a weight."""

import json

import pytest
import torch

from imageconductor.checkpoints.model_folder import (
    adapter_names,
    check_adapters,
    check_shape,
    locate_model,
    read_dtype,
    read_sampling_defaults,
)


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
    import shutil

    from imageconductor.models.adapters import attached_adapters
    from imageconductor.sampling.pipeline import ImageConductorPipeline

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    shutil.copytree(folder / "camera_lora", folder / "crane_lora")
    pipe = ImageConductorPipeline.from_pretrained(folder)
    assert attached_adapters(pipe.motion_controlnet) == ("camera", "crane", "object")
