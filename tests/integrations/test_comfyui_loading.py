"""The node that loads a model: what it finds, asks for and loads anew, and what saves memory."""

from pathlib import Path

import numpy as np
import pytest
from comfyui_host import picture, run_node, sample

from imageconductor.sampling.pipeline import ImageConductorPipeline


def test_models_and_weights_of_comfyui_are_found_by_name(package, host, tiny_model, tmp_path):
    (tmp_path / "models" / "image_conductor").mkdir(parents=True)
    (tmp_path / "models" / "image_conductor" / "mine").symlink_to(tiny_model)
    (tmp_path / "more" / "no_model").mkdir(parents=True)
    load = package.NODE_CLASS_MAPPINGS["ImageConductorLoadModel"]
    assert load.INPUT_TYPES()["required"]["installed"][0] == ["as named above", "mine"]
    (pipe,) = run_node(package, "LoadModel", installed="mine", model="nowhere/at/all")
    assert pipe.device.type == "cpu"
    assert "'absent.safetensors'" not in load.VALIDATE_INPUTS(base="absent.safetensors")
    assert load.VALIDATE_INPUTS(loras="\nabsent.safetensors:0.5\n") == (
        "no file at absent.safetensors, nor among ComfyUI's loras"
    )
    assert "is no number" in load.VALIDATE_INPUTS(loras="style.safetensors:much")
    assert "no file at absent" in load.VALIDATE_INPUTS(motion_loras="absent")
    style = tmp_path / "style.safetensors"
    style.touch()
    host.files["loras", "style"] = str(style)
    assert load.VALIDATE_INPUTS(loras="style:0.5") is True
    with pytest.raises(FileNotFoundError, match="no model folder at nowhere"):
        run_node(package, "LoadModel", model="nowhere")


def test_what_the_loading_node_asks_for(package, host, monkeypatch, tmp_path):
    for kind, name in (("checkpoints", "base"), ("loras", "style")):
        (tmp_path / name).touch()
        host.files[kind, name] = str(tmp_path / name)
    monkeypatch.setattr(package.model_nodes, "load_pipeline", lambda job: job)
    (job,) = run_node(package, "LoadModel", base=" base ", loras="style:0.5\n\nstyle\n")
    assert (job.base, job.lora) == (f"{tmp_path}/base", [f"{tmp_path}/style:0.5", f"{tmp_path}/style:1.0"])
    assert (job.device, job.dtype) == ("cpu", "float32")
    assert host.freed == [8e9]  # by ComfyUI's own models, before ours is loaded
    assert Path(job.model).name == "sprites"
    (half,) = run_node(package, "LoadModel", dtype="bfloat16", motion_loras="style:2")
    assert (half.base, half.lora, half.dtype) == (None, [], "bfloat16")
    assert half.motion_lora == [f"{tmp_path}/style:2.0"]


def test_inputs_that_save_memory_reach_the_pipeline(package, host, monkeypatch, tiny_model):
    given = {"model": str(tiny_model), "motion_loras": ""}
    (plain,) = run_node(package, "LoadModel", **given)
    expected, _ = sample(package, plain, image=picture())
    with pytest.raises(ValueError, match="offload 'model' keeps networks off the GPU, and the device is cpu"):
        run_node(package, "LoadModel", offload="model", **given)
    monkeypatch.setattr(package.model_nodes.host, "choose_device", lambda: "cpu:0")  # in place of a GPU
    chunks = []
    decode = ImageConductorPipeline.decode_latents
    monkeypatch.setattr(
        ImageConductorPipeline, "decode_latents", lambda *given: chunks.append(given[2]) or decode(*given)
    )
    host.freed.clear()
    (pipe,) = run_node(package, "LoadModel", offload="model", vae_tiling=True, **given)
    assert pipe.vae.use_tiling
    assert pipe.unet._hf_hook
    frames, _ = sample(package, pipe, image=picture(), decode_chunk_size=1)
    assert host.freed == [3e4 * 32 * 32 + 4e9]  # when it samples: the weights come only then
    assert chunks == [1]
    np.testing.assert_allclose(frames, expected, atol=1e-5)
    monkeypatch.setattr(package.model_nodes, "load_pipeline", lambda job: job)
    (job,) = run_node(package, "LoadModel", offload="sequential", **given)
    assert (job.offload, job.vae_tiling, job.motion_lora) == ("sequential", False, [])


def test_new_weights_under_an_old_name_are_loaded_anew(package, tmp_path):
    changed = package.NODE_CLASS_MAPPINGS["ImageConductorLoadModel"].IS_CHANGED
    (tmp_path / "model_index.json").write_text("{}")
    weights = tmp_path / "camera_lora" / "weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"old")
    style = tmp_path.parent / f"{tmp_path.name}-style.safetensors"
    style.write_bytes(b"old")
    asked = {
        "model": str(tmp_path),
        "installed": "as named above",
        "base": "",
        "loras": f"{style}:0.5",
        "dtype": "auto",
    }
    first = changed(**asked)
    assert changed(**asked) == first
    weights.write_bytes(b"newer")
    second = changed(**asked)
    style.write_bytes(b"newer")
    assert len({first, second, changed(**asked)}) == 3
    motion = {**asked, "loras": "", "motion_loras": str(style)}
    first = changed(**motion)
    style.write_bytes(b"newest")
    assert changed(**motion) != first
