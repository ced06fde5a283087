"""What `assemble --export published` writes of a model, and what it says that it does not."""

import shutil

import torch
from conftest import tiny_pipeline
from safetensors.torch import load_file, save_file

from imageconductor.checkpoints.domain_adapter import DomainAdapter
from imageconductor.checkpoints.model_folder import UNET_LORA_FOLDERS
from imageconductor.checkpoints.published import from_published
from imageconductor.commands import assemble
from imageconductor.models.adapters import DIFFUSERS_WEIGHTS_NAME, adapter_parameters, add_adapter
from imageconductor.models.controlnets import MotionControlNet
from imageconductor.models.lora_files import pair_up
from imageconductor.sampling.pipeline import ImageConductorPipeline


def export(model, output):
    return assemble.main(["--export", "published", "--model", str(model), "--output", str(output)])


def test_the_strength_of_a_lora_is_in_its_matrices(tmp_path):
    """The authors' code knows no alpha."""
    full = tiny_pipeline()
    plain = MotionControlNet.from_config(full.motion_controlnet.config)
    pipe = ImageConductorPipeline(**{**full.components, "motion_controlnet": plain})
    add_adapter(pipe.motion_controlnet, "camera", rank=2, alpha=8)
    for parameter in adapter_parameters(pipe.motion_controlnet, "camera").values():
        parameter.data.normal_(0, 0.1)
    pipe.save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "out") == 0
    layer = "down_blocks.0.resnets.0.conv1"
    delta = pipe.motion_controlnet.get_submodule(layer).get_delta_weight("camera")  # alpha / rank = 4 included
    published = from_published(load_file(tmp_path / "out" / "flow_controlnet.safetensors"))[1]["camera"]
    for state in (published, load_file(tmp_path / "out" / "camera_lora.safetensors")):
        pair = pair_up(state, "exported")[layer]
        assert pair.alpha == pair.rank
        product = torch.einsum("orxy,rihw->oihw", pair.up, pair.down)
        torch.testing.assert_close(product, delta)


def test_what_is_not_in_the_files_is_said(gated_model, tmp_path, caplog):
    model = tmp_path / "model"
    shutil.copytree(gated_model, model)
    shutil.copytree(model / "camera_lora", model / "crane_lora")
    for name in UNET_LORA_FOLDERS:
        (model / name).mkdir()
        save_file({name: torch.ones(1)}, model / name / DIFFUSERS_WEIGHTS_NAME)
    DomainAdapter({"unet.a.lora_A.weight": torch.ones(1, 1)}, 0.5, "adapter.ckpt").save(model)
    with caplog.at_level("INFO"):
        assert export(model, tmp_path / "out") == 0
    said = "\n".join(record.getMessage() for record in caplog.records)
    for name in ("LoRA crane", "object_gates", "scene_gates", *UNET_LORA_FOLDERS):
        assert f"not in these files: {name}" in said.replace("the motion ControlNet's ", "")
    assert "the domain adapter by itself; the UNet holds it with scale 0.5" in said
