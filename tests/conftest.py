"""A complete tiny model, every class of the real one and fast enough for a test; a browser for tests of pages."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from peft.tuners.tuners_utils import BaseTunerLayer

from imageconductor.data.sprite_world import SpriteWorldConfig
from imageconductor.data.sprites import caption_words
from imageconductor.models.adapters import Adapter, adapter_parameters, add_adapter
from imageconductor.models.gated_attention import ObjectGates, SceneGates
from imageconductor.models.gating import gate_scalars
from imageconductor.models.networks import Networks
from imageconductor.models.small_model import SmallModelConfig, build_small_model
from imageconductor.sampling.pipeline import ImageConductorPipeline

settings.register_profile("shared-machine", deadline=None, derandomize=True)
settings.load_profile("shared-machine")

TINY = SmallModelConfig(
    autoencoder_channels=(8, 16),
    latent_channels=4,
    block_out_channels=(16, 32),
    num_attention_heads=2,
    norm_num_groups=8,
    text_width=16,
    text_layers=1,
)
TINY_WORLD = SpriteWorldConfig(size=(32, 32), num_frames=4)


def tiny_networks(seed: int = 0) -> Networks:
    """Untrained, but with every zero-initialised layer filled, so that each condition has an effect."""
    networks = build_small_model(TINY, [" ".join(caption_words())], seed)
    generator = torch.Generator().manual_seed(seed)
    for network in (networks.unet, networks.image_controlnet, networks.motion_controlnet):
        for parameter in network.parameters():
            if not parameter.any():
                parameter.data.normal_(0, 0.05, generator=generator)
    return networks


def merge_in_place(network: torch.nn.Module, *names: str) -> None:
    """Folds LoRAs into the weights as peft does it, which nothing of ours does."""
    for layer in [module for module in network.modules() if isinstance(module, BaseTunerLayer)]:
        layer.merge(adapter_names=[str(getattr(name, "value", name)) for name in names])


def tiny_pipeline(seed: int = 0) -> ImageConductorPipeline:
    networks = tiny_networks(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for adapter in Adapter:
        add_adapter(networks.motion_controlnet, adapter, rank=2)
        for parameter in adapter_parameters(networks.motion_controlnet, adapter).values():
            parameter.data.normal_(0, 0.1, generator=generator)
    defaults = {"width": 32, "height": 32, "num_frames": 4, "guidance_scale": 3.0, "num_inference_steps": 3}
    pipe = ImageConductorPipeline(**networks.parts, sampling_defaults=defaults)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SMALL_ENCODER = {"channels": (8, 16), "blocks_per_level": 1}


def open_gates(gates, value=0.5):
    """Opens gates, the position network's null features and the input branch included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in gates.named_parameters():
            if "null_" in name or name == "input_branch.weight":
                parameter.normal_(0, 0.5, generator=generator)
        for scalar in gate_scalars(gates).values():
            scalar.fill_(value)
    return gates


def tiny_gates(unet, is_open=True, **settings):
    """Object and scene gates for a UNet, open if asked."""
    gates = ObjectGates.from_unet(unet, max_objects=4), SceneGates.from_unet(unet, **SMALL_ENCODER, **settings)
    return tuple(open_gates(network) for network in gates) if is_open else gates


@pytest.fixture(scope="session")
def gated_model(tmp_path_factory) -> Path:
    """Folder of the tiny model with open gates for boxes and the first frame."""
    folder = tmp_path_factory.mktemp("gated") / "model"
    pipe = tiny_pipeline()
    pipe.object_gates, pipe.scene_gates = tiny_gates(pipe.unet)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a complete tiny model with both LoRAs."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    """Chromium for tests with the mark `web`; skipped, with the reason, where there is none.

    One for each file: an event loop runs in this thread as long as playwright does, and others may need their own.
    """
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-web installs it")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium in PATH: apt-get install chromium, or make test-web as root")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
