"""The bundled model is whole, and the no-argument run finds everything it names."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from imageconductor.checkpoints.personalise import load_style_lora
from imageconductor.commands import sample
from imageconductor.devices import has_instructions
from imageconductor.evaluation.metrics.motion import psnr
from imageconductor.models.adapters import attached_adapters
from imageconductor.sampling.job import prepare
from imageconductor.sampling.job_files import load_job
from imageconductor.sampling.pipeline import ImageConductorPipeline

FOR_BOXES = ("object_gates", "scene_gates", "scene_lora")


def test_it_loads_and_makes_a_video():
    inputs = prepare(load_job(sample.DEFAULT_CONFIG))
    assert inputs.trajectories.num_tracks == 2
    assert inputs.image.size == (128, 128)
    pipe = ImageConductorPipeline.from_pretrained(inputs.job.model)
    assert attached_adapters(pipe.motion_controlnet) == ("camera", "object")
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(inputs.image, inputs.trajectories, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 16, 3, 128, 128)
    assert frames.std() > 0.05


SCHEDULERS = {  # that take predictions of x_0; ancestral Euler refuses them
    "DDIMScheduler": {},
    "DPMSolverMultistepScheduler": {},  # DPM++ 2M
    "EulerDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {"original_inference_steps": 1000},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_makes_a_sane_video_with_each_usual_scheduler(name):
    inputs = prepare(load_job(sample.DEFAULT_CONFIG))
    dtype = torch.bfloat16 if has_instructions(torch.bfloat16, torch.device("cpu")) else torch.float32
    pipe = ImageConductorPipeline.from_pretrained(inputs.job.model, dtype=dtype)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **SCHEDULERS[name])
    pipe.set_progress_bar_config(disable=True)
    tracks, job = inputs.trajectories, inputs.job
    video = pipe(inputs.image, tracks, job.prompt, seed=1, num_inference_steps=6, output_type="np").frames[0]
    assert psnr(video[0], np.asarray(inputs.image) / 255) > 25
    picture = np.asarray(inputs.image) / 255
    ends = tracks.points[:, [0, -1]].round().int().tolist()
    for (x, y), (to_x, to_y) in ends:  # The purple circle and the green square have come.
        begun = picture[y - 6 : y + 7, x - 6 : x + 7].mean((0, 1))
        come = video[-1, to_y - 6 : to_y + 7, to_x - 6 : to_x + 7].mean((0, 1))
        assert np.abs(come - begun).max() < 0.12 < np.abs(picture[to_y, to_x] - begun).max()


def test_its_style_lora_fits_it_and_acts():
    model = Path(load_job(sample.DEFAULT_CONFIG).model)
    pipe = ImageConductorPipeline.from_pretrained(model)
    latents = torch.randn(1, pipe.unet.config["in_channels"], 4, 16, 16)
    text = pipe.text_encoder(torch.zeros(1, 8, dtype=torch.long)).last_hidden_state
    with torch.no_grad():
        plain = pipe.unet.encode(latents, torch.tensor([500]), text)
        load_style_lora(pipe, model / "style_lora" / "pytorch_lora_weights.safetensors", "ink")
        inked = pipe.unet.encode(latents, torch.tensor([500]), text)
    assert (plain.mid - inked.mid).abs().mean() > 1e-3


def test_it_stays_small():
    folder = Path(__file__).parents[1] / "models" / "sprites"
    for_boxes = [path for part in FOR_BOXES for path in (folder / part).rglob("*") if path.is_file()]
    others = [path for path in folder.rglob("*") if path.is_file() and path not in for_boxes]
    assert sum(path.stat().st_size for path in others) < 50e6
    assert 1e6 < sum(path.stat().st_size for path in for_boxes) < 10e6
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".ckpt", ".pt")]
