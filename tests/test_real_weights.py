"""On folders assembled from the real files, which cannot be had here: docs/weights.md, "Testing the real files"."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from imageconductor.conditioning import camera_preset
from imageconductor.models.adapters import Adapter, attached_adapters
from imageconductor.models.networks import Networks
from imageconductor.sampling.pipeline import ImageConductorPipeline

pytestmark = pytest.mark.weights


def folder(variable):
    if variable not in os.environ:
        pytest.skip(f"{variable} names no model folder")
    return os.environ[variable]


def picture():
    y, x = np.mgrid[:256, :384]
    waves = [127.5 + 60 * np.sin(x / a) + 60 * np.cos(y / b) for a, b in ((31, 47), (59, 23), (41, 71))]
    return Image.fromarray(np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8))


@pytest.mark.timeout(3600)
def test_the_published_model_keeps_the_first_image():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = ImageConductorPipeline.from_pretrained(folder("IMAGE_CONDUCTOR_MODEL"), dtype=dtype).to(device)
    assert attached_adapters(pipe.motion_controlnet) == set(Adapter)
    assert round(sum(p.numel() for p in pipe.unet.parameters()) / 1e6, 1) == 1276.7
    video = pipe(
        picture(),
        camera_preset("pan-left", (384, 256), 16),
        "soft waves of colour",
        control="camera",
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    statistics = {"mean": video.mean(), "std": video.std(), "step": np.abs(np.diff(video, axis=0)).mean()}
    print({name: round(float(value), 5) for name, value in statistics.items()})
    error = ((video[0] - np.asarray(picture()) / 255) ** 2).mean()
    assert np.isfinite(video).all()
    assert -10 * np.log10(error) > 20, "dB of the first frame"


def test_the_base_to_train_from_is_neutral():
    networks = Networks.load(folder("ANIMATEDIFF_MODEL"))
    assert round(sum(p.numel() for p in networks.motion_controlnet.parameters()) / 1e6, 1) == 497.1
    residuals = networks.motion_controlnet(torch.tensor(500), torch.randn(1, 77, 768), torch.randn(1, 2, 2, 64, 64))
    assert not any(residual.any() for residual in (*residuals.down, residuals.mid))
