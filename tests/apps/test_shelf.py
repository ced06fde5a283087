"""What a visitor may choose from, by names that are not paths."""

import pytest
import torch
from safetensors.torch import save_file

from imageconductor.apps.form import Form, build_job
from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.shelf import Shelf
from imageconductor.sampling.job import SampleJob


def put(path, key="unet.down_blocks.0.attentions.0.to_q.lora.down.weight"):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: torch.zeros(1)}, path)
    return path


@pytest.fixture
def folder(tmp_path):
    put(tmp_path / "ink.safetensors")
    put(tmp_path / "anime" / "pytorch_lora_weights.safetensors")
    put(tmp_path / "toon.safetensors", "model.diffusion_model.input_blocks.0.0.weight")
    put(tmp_path / "zoom.safetensors", "down_blocks.0.motion_modules.0.to_q.lora.down.weight")
    put(tmp_path / "runs" / "walk" / "motion_lora" / "pytorch_lora_weights.safetensors")
    put(tmp_path / "runs" / "walk" / "appearance_lora" / "pytorch_lora_weights.safetensors")
    (tmp_path / "runs" / "walk" / "config.yaml").write_text("")
    (tmp_path / "broken.safetensors").write_text("no tensors")
    (tmp_path / "old.ckpt").write_text("pickle")
    return tmp_path


def test_files_are_told_apart_by_their_tensors(folder):
    shelf = Shelf.scan([folder])
    assert set(shelf.bases) == {"toon"}
    assert set(shelf.looks) == {"ink", "anime", "broken", "runs/walk"}
    assert set(shelf.motions) == {"zoom", "runs/walk"}
    assert shelf.motions["runs/walk"] == folder / "runs" / "walk"


def test_names_that_occur_twice_are_numbered_and_a_missing_folder_is_named(folder, tmp_path):
    put(folder / "other" / "ink.safetensors")
    assert {"ink", "ink (2)"} <= set(Shelf.scan([folder, folder / "other"]).looks)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Shelf.scan([tmp_path / "nowhere"])


def test_a_job_gets_files_for_names_and_nothing_for_paths(folder, tmp_path, tiny_model):
    def job(**chosen) -> SampleJob:
        base = SampleJob(model=str(tiny_model), device="cpu")
        return build_job(Form(prompt="a cat", **chosen), base, Shelf.scan([folder]), Limits(), tmp_path)

    chosen = job(base="toon", looks={"ink": 0.5, "runs/walk": 1.0}, motions={"runs/walk": -1})
    assert chosen.base == str(folder / "toon.safetensors")
    assert chosen.lora == [f"{folder / 'ink.safetensors'}:0.5"]
    assert chosen.appearance_lora == [f"{folder / 'runs' / 'walk'}:1"]
    assert chosen.motion_lora == [f"{folder / 'runs' / 'walk'}:-1"]
    for wrong in ({"base": "../toon"}, {"looks": {str(folder / "ink.safetensors"): 1}}, {"motions": {"ink": 1}}):
        with pytest.raises(FieldError, match="not among the files of this page") as caught:
            job(**wrong)
        assert caught.value.field == "loras"
    with pytest.raises(FieldError, match="the scale of ink must be a number"):
        job(looks={"ink": float("nan")})
