"""The bundled model is whole, and the no-argument run finds everything it names."""

from pathlib import Path

import torch

from imageconductor.checkpoints.personalise import load_style_lora
from imageconductor.commands import sample
from imageconductor.models.adapters import attached_adapters
from imageconductor.sampling.job import load_job, prepare
from imageconductor.sampling.pipeline import ImageConductorPipeline


def test_it_loads_and_makes_a_video():
    inputs = prepare(load_job(sample.DEFAULT_CONFIG))
    assert inputs.trajectories.num_tracks == 2
    assert inputs.image.size == (64, 64)
    pipe = ImageConductorPipeline.from_pretrained(inputs.job.model)
    assert attached_adapters(pipe.motion_controlnet) == ("camera", "object")
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(inputs.image, inputs.trajectories, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 16, 3, 64, 64)
    assert frames.std() > 0.05


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
    folder = Path(sample.__file__).parent / "models" / "sprites"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 50e6
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".ckpt", ".pt")]
