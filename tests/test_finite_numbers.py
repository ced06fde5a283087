"""Numbers that are nan or infinite are refused where they come in, or named where they arise."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imageconductor import config as config_file
from imageconductor.checkpoints.assembly import AssemblyConfig
from imageconductor.checkpoints.model_folder import read_sampling_defaults
from imageconductor.commands import sample
from imageconductor.conditioning import Trajectories
from imageconductor.config import list_fields, required_type
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.models.small_model import SmallModelConfig
from imageconductor.models.weights import read_checkpoint
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.training.autoencoder import AutoencoderConfig
from imageconductor.training.stage_configs import MotionDirectorConfig
from imageconductor.training.stages.registry import STAGES

NEEDED = {CurateConfig: ["input=in", "output=out"], AssemblyConfig: ["recipe=trained", "model=there"]}
NEEDED[EvaluateConfig] = ["model=there"]
NEEDED[MotionDirectorConfig] = ["data=[clip.mp4]"]
SCHEMAS = [CurateConfig, EvaluateConfig, AssemblyConfig, SampleJob, SmallModelConfig, AutoencoderConfig]
SCHEMAS += [stage.Config for stage in STAGES.values()]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_setting_that_is_a_number_refuses_nan(schema):
    names = [field.key for field in list_fields(schema) if required_type(field.hint) is float]
    for name in names:
        with pytest.raises(ValueError, match=rf"{name.rpartition('.')[2]}.*got.*nan"):
            config_file.load(schema, None, [*NEEDED.get(schema, []), f"{name}=nan"])


def test_numbers_inside_lists_and_mappings_are_checked():
    with pytest.raises(ValueError, match=r"start must be a finite number, got nan"):
        config_file.load(SampleJob, None, ["start=[1.0, .nan]"])
    with pytest.raises(ValueError, match=r"sampling.guidance_scale must be a finite number, got inf"):
        config_file.load(AssemblyConfig, None, [*NEEDED[AssemblyConfig], "sampling={guidance_scale: .inf}"])


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def damage(path, key_part):
    """Puts a nan into the first tensor of a file whose name has `key_part`."""
    state = load_file(path)
    next(value for key, value in state.items() if key_part in key).view(-1)[0] = torch.nan
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("case", ["strength", "scale", "lora", "adapter", "decoder"])
def test_the_command_names_the_number_or_the_file_and_writes_nothing(case, tiny_model, picture, tmp_path, capsys):
    model, output, lora = tmp_path / "model", tmp_path / "out", tmp_path / "style.safetensors"
    shutil.copytree(tiny_model, model)
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}, lora)
    options, message = {
        "strength": (["--preset", "pan-left", "--strength", "inf"], "strength must be a finite number, got inf"),
        "scale": (["--lora", f"{lora}:nan"], "the scale must be a finite number, got nan"),
        "lora": (["--lora", str(lora)], f"{lora} is damaged: {layer}.lora_A.weight"),
        "adapter": (["--preset", "pan-left"], "camera_lora/adapter_model.safetensors is damaged"),
        "decoder": ([], f"decoding of the latents gave nan or infinite values: weights of vae of {model} are damaged"),
    }[case]
    damaged = {
        "lora": (lora, "lora_A"),
        "adapter": (model / "camera_lora" / "adapter_model.safetensors", "lora_A"),
        "decoder": (model / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_out"),
    }
    if case in damaged:
        damage(*damaged[case])
    common = ["--model", str(model), "--image", picture, "--steps", "1", "--num-frames", "2", "--output", str(output)]
    assert sample.main([*common, *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not output.exists()


def test_a_step_that_overflows_is_named(tiny_model):
    pipe = ImageConductorPipeline.from_pretrained(tiny_model)
    image = Image.new("RGB", (32, 32))
    pipe.unet.conv_out.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match=r"denoising step 1 of 1 gave nan .*all weights are finite"):
        pipe(image, num_frames=2, num_inference_steps=1)
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"denoising step 1 of 1 .*weights of unet .*conv_in.weight"):
        pipe(image, num_frames=2, num_inference_steps=1)
    points = torch.full((1, 2, 2), torch.nan)
    tracks = Trajectories(points, torch.ones(1, 2, dtype=torch.bool), (32, 32))
    arguments: list[tuple[dict[str, Any], str]] = [
        ({"guidance_scale": np.nan}, "guidance_scale must be a finite number"),
        ({"eta": np.inf}, r"eta must lie in \[0, 1\], got inf"),
        ({"latents": torch.full((1, 4, 2, 16, 16), torch.nan)}, "the given latents"),
        ({"trajectories": tracks}, "a visible point is not finite"),
    ]
    for wrong, message in arguments:
        with pytest.raises(ValueError, match=message):
            pipe(image, num_frames=2, num_inference_steps=1, **wrong)


def test_files_with_numbers_that_are_not_finite_are_refused(tmp_path, tiny_model):
    torch.save({"state_dict": {"a": torch.ones(2), "b": torch.tensor([1, torch.inf])}}, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=r"file.ckpt is damaged: b holds nan"):
        read_checkpoint(tmp_path / "file.ckpt")
    index = (tiny_model / "model_index.json").read_text().replace('"guidance_scale": 3.0', '"guidance_scale": NaN')
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model_index.json .*sampling_defaults.guidance_scale must be a finite"):
        read_sampling_defaults(tmp_path)
