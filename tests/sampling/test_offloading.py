"""Weights that diffusers moves or casts while the networks run."""

import pytest
import torch
from conftest import tiny_gates, tiny_pipeline
from PIL import Image

from imageconductor.conditioning import Boxes, Trajectories


def gated_pipeline():
    pipe = tiny_pipeline()
    pipe.object_gates, pipe.scene_gates = tiny_gates(pipe.unet)
    return pipe


def make(pipe):
    """One video whose steps evaluate both ControlNets, all branches of Eq. 5 and the gates."""
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    track = Trajectories.from_tracks([[[8, 8], [20, 16]]], (32, 32), 4)
    drawn = {"trajectories": track, "boxes": Boxes.from_tracks(track, (10, 8), ["star"]), "control": "object"}
    common = {"camera_free_scale": 1.5, "seed": 3, "num_inference_steps": 2, "output_type": "pt"}
    return pipe(image, prompt="a star", **drawn, **common).frames


@pytest.fixture(scope="module")
def expected():
    return make(gated_pipeline())


@pytest.fixture
def uninitialized_is_nan():
    """`torch.empty` gives nan, so that no weight that was sent to a file is taken for what it was."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.usefixtures("uninitialized_is_nan")
def test_group_offloading_brings_every_weight_before_it_is_read(kind, expected, tmp_path):
    """Files stand for a second device: what is offloaded holds nan."""
    pipe, cpu = gated_pipeline(), torch.device("cpu")
    networks = pipe.unet, pipe.image_controlnet, pipe.motion_controlnet
    for number, network in enumerate(networks):
        where = {"offload_to_disk_path": str(tmp_path / str(number))}
        network.enable_group_offload(cpu, cpu, kind, num_blocks_per_group=1, **where)
    assert all(network.conv_in.bias.isnan().all() for network in networks)
    torch.testing.assert_close(make(pipe), expected)
    assert all(network.conv_in.bias.isnan().all() for network in networks), "it is sent away again"


def test_layerwise_casting_computes_in_the_dtype_asked_for(expected):
    pipe = gated_pipeline()
    for network in (pipe.unet, pipe.image_controlnet, pipe.motion_controlnet):
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert network.conv_in.bias.dtype == torch.float8_e4m3fn
    found = make(pipe)
    assert found.isfinite().all()
    assert 0 < (found - expected).abs().mean() < 0.1
