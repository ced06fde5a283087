"""The bundled model is whole, and the no-argument run finds everything it names."""

from pathlib import Path

import sample
from imageconductor.models.lora import Adapter, attached_adapters
from imageconductor.sampling.job import load_job, prepare
from imageconductor.sampling.pipeline import ImageConductorPipeline


def test_it_loads_and_makes_a_video():
    inputs = prepare(load_job(sample.DEFAULT_CONFIG))
    assert inputs.trajectories.num_tracks == 2
    assert inputs.image.size == (64, 64)
    pipe = ImageConductorPipeline.from_pretrained(inputs.job.model)
    assert attached_adapters(pipe.motion_controlnet) == set(Adapter)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(inputs.image, inputs.trajectories, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 16, 3, 64, 64)
    assert frames.std() > 0.05


def test_it_stays_small():
    folder = Path(sample.__file__).parent / "models" / "sprites"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 50e6
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".ckpt", ".pt")]
