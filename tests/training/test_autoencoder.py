"""The autoencoder's own training."""

import copy
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from imageconductor.data.batches import Batches, SpriteSamples, sample_generators, scale_pixels
from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.models.networks import Networks
from imageconductor.training.autoencoder import (
    AutoencoderConfig,
    _crop,
    carrying_error,
    settle_latents_,
    shift,
    train_autoencoder,
)

WORLD = SpriteWorldConfig(size=(32, 32), num_frames=4)


@pytest.mark.parametrize(("decoder_only", "optimizer"), [(False, "adamw"), (True, "adamw"), (True, "muon")])
def test_who_learns(decoder_only, optimizer, tiny_model, tmp_path):
    """Under `decoder_only` the latents stay what they are, to the bit, and so does their scale."""
    vae = Networks.load(tiny_model).vae
    before, factor = copy.deepcopy(vae.state_dict()), vae.config["scaling_factor"]
    data = Batches(SpriteSamples(SpriteWorldConfig(size=(32, 32), num_frames=4), [SpriteSet.MIXED]), 4)
    settings = {"max_steps": 4, "batch_size": 4, "crop": 16, "learning_rate": 1e-2, "optimizer": optimizer}
    config = AutoencoderConfig(decoder_only=decoder_only, **settings)
    train_autoencoder(vae, data, config, tmp_path)
    learned = {key.split(".")[0] for key, value in vae.state_dict().items() if not torch.equal(value, before[key])}
    assert learned == ({"decoder"} if decoder_only else {"encoder", "quant_conv", "post_quant_conv", "decoder"})
    assert (vae.config["scaling_factor"] == factor) == decoder_only
    if not decoder_only:
        frames = scale_pixels(torch.cat([data[4 + i]["pixel_values"].transpose(1, 2).flatten(0, 1) for i in range(8)]))
        with torch.no_grad():
            latents = vae.encode(frames).latent_dist.mean * vae.config["scaling_factor"]
            assert vae.encode(frames).latent_dist.std.max() < 1e-6
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
        assert latents.std() == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_settled_latents_have_no_constant_no_noise_and_no_idle_channel(tiny_model):
    vae, frames = Networks.load(tiny_model).vae, torch.rand(2, 3, 32, 32) * 2 - 1
    vae.quant_conv.bias[:4] += torch.tensor([0.5, -2.0, 0.0, 3.0])
    vae.quant_conv.bias[4:] = torch.tensor([-12.0, 4.0, -12.0, -12.0])  # The second channel is noise,
    vae.post_quant_conv.weight[:, 1] = 0  # and its decoder does not look at it.
    before = vae.encode(frames).latent_dist.mean
    decoded = vae.decode(before).sample
    settle_latents_(vae, frames)
    after = vae.encode(frames).latent_dist
    expected = before - before.mean((0, 2, 3), keepdim=True)
    expected[:, 1] = 0
    torch.testing.assert_close(after.mean, expected, rtol=1e-4, atol=1e-5)
    assert after.std.max() < 1e-6
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, rtol=1e-4, atol=1e-4)


def test_of_several_crops_the_one_with_the_most_detail_is_taken():
    frames = torch.zeros(2, 3, 32, 32)
    frames[0, :, 20:24, 20:24] = frames[1, :, 4:8, 4:8] = 1.0
    found = [_crop(frames, 8, count, sample_generators(1, 0, 2)) for count in (1, 200)]
    assert found[1].shape == (2, 3, 8, 8)
    assert found[0].sum() < found[1].sum() == 2 * 3 * 16, "each frame has its own crop, and the best holds the square"
    with pytest.raises(ValueError, match="crop_candidates must be at least 1, got 0"):
        AutoencoderConfig(crop_candidates=0)


def test_shifted_latents_belong_to_the_pixels_they_are_paired_with():
    """The mean of each 4 x 4 patch as a latent pixel: exact between them wherever brightness is linear."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    frames = torch.stack([x, y, x + 2 * y])[None]
    means = torch.nn.functional.avg_pool2d(frames, 4)
    seen = set()
    for seed in range(20):
        latents, pixels = shift(means, frames, torch.Generator().manual_seed(seed))
        assert latents.shape == (1, 3, 5, 7)
        assert pixels.shape == (1, 3, 20, 28)
        torch.testing.assert_close(latents, torch.nn.functional.avg_pool2d(pixels, 4))
        seen.add(tuple(pixels[0, :2, 0, 0].tolist()))
    assert len(seen) > 8
    assert {offset for pair in seen for offset in pair} == {0.0, 1.0, 2.0, 3.0}


def test_latents_that_move_with_the_pixels_have_no_carrying_error():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")
    ramps, noise = torch.stack([x, y, x + 2 * y])[None], torch.randn(1, 3, 32, 40, generator=torch.manual_seed(0))
    errors = []
    for frames in (ramps, noise):
        means = torch.nn.functional.avg_pool2d(frames, 4)
        shifted, pixels = shift(means, frames, torch.Generator().manual_seed(2))
        again = torch.nn.functional.avg_pool2d(pixels, 4)
        again[..., 0] = 9.0  # of the border, which has seen other pixels
        errors.append(carrying_error(shifted, again))
        torch.testing.assert_close(carrying_error(3 * shifted, 3 * again), errors[-1])
    assert errors[0] < 1e-10
    assert errors[1] > 0.1


@pytest.mark.slow
def test_the_encoder_learns_latents_that_move_with_the_pixels(tiny_model, tmp_path):
    samples = SpriteSamples(SpriteWorldConfig(size=(32, 32), num_frames=1), [SpriteSet.MIXED])
    left = []
    for weight in (0.0, 30.0):
        vae = Networks.load(tiny_model).vae
        config = AutoencoderConfig(
            max_steps=40, batch_size=4, crop=32, learning_rate=3e-3, equivariance=1.0, latent_equivariance=weight
        )
        train_autoencoder(vae, Batches(samples, 4), config, tmp_path / str(weight))
        frames = scale_pixels(torch.cat([samples[900 + i]["pixel_values"].transpose(0, 1) for i in range(8)]))
        with torch.no_grad():
            shifted, pixels = shift(vae.encode(frames).latent_dist.mean, frames, torch.Generator().manual_seed(1))
            left.append(carrying_error(shifted, vae.encode(pixels).latent_dist.mean))
    assert left[1] < 0.8 * left[0]


class Interrupted(Batches):
    """Batches that end before the fourth."""

    def __getitem__(self, index):
        if index == 3:
            raise InterruptedError
        return super().__getitem__(index)


def test_a_run_that_is_continued_repeats(tiny_model, tmp_path):
    samples = SpriteSamples(SpriteWorldConfig(size=(32, 32), num_frames=4), [SpriteSet.MIXED])
    config = AutoencoderConfig(
        max_steps=4,
        batch_size=4,
        crop=16,
        save_every=2,
        equivariance=0.5,
        latent_equivariance=0.3,
        mixed_precision="bf16",
    )

    def train(kind, folder):
        vae = Networks.load(tiny_model).vae
        train_autoencoder(vae, kind(samples, 4), config, tmp_path / folder)
        return vae.state_dict()

    with pytest.raises(InterruptedError):
        train(Interrupted, "twice")
    once, twice = train(Batches, "once"), train(Batches, "twice")
    finished = Networks.load(tiny_model).vae
    assert train_autoencoder(finished, Batches(samples, 4), config, tmp_path / "once") == 4  # killed before "done"
    assert torch.equal(finished.decoder.conv_out.weight, once["decoder.conv_out.weight"])
    assert all(torch.equal(value, twice[key]) for key, value in once.items())


def test_gradients_that_are_not_finite_stop_it_before_weights_change(tiny_model, tmp_path, monkeypatch):
    vae, samples = Networks.load(tiny_model).vae, SpriteSamples(WORLD, [SpriteSet.MIXED])
    error = torch.nn.functional.mse_loss
    # 0 more, and an infinite gradient
    monkeypatch.setattr("torch.nn.functional.mse_loss", lambda a, b: (e := error(a, b)) + (e - e.detach()).sqrt())
    before = copy.deepcopy(vae.state_dict())
    config = AutoencoderConfig(max_steps=2, batch_size=4, crop=16)
    with pytest.raises(
        FloatingPointError, match=r"^autoencoder loss is \d.* at step 0, the length of its gradients nan"
    ):
        train_autoencoder(vae, Batches(samples, 4), config, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())
    assert not list(tmp_path.glob("checkpoint-*"))


class Signalling(Batches):
    """Batches at whose second the process is asked to end."""

    def __getitem__(self, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_a_signal_ends_it_with_a_checkpoint(tiny_model, tmp_path):
    vae, samples = Networks.load(tiny_model).vae, SpriteSamples(WORLD, [SpriteSet.MIXED])
    config = AutoencoderConfig(max_steps=9, batch_size=4, crop=16, decoder_only=True)
    assert train_autoencoder(vae, Signalling(samples, 4), config, tmp_path) == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000002"]


_SHARING = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from imageconductor.data.batches import Batches, SpriteSamples
from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.models.networks import Networks
from imageconductor.training.autoencoder import AutoencoderConfig, train_autoencoder

model, output, kind = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
settings = {"decoder_only": True} if kind == "decoder" else {}
config = AutoencoderConfig(
    max_steps=4, batch_size=8, frames_per_clip=2, crop=16, crop_candidates=2, whole_frames_from=0.5, equivariance=0.5,
    save_every=2, learning_rate=1e-3, **settings
)
processes = PartialState(cpu=True)
samples = SpriteSamples(SpriteWorldConfig(size=(32, 32), num_frames=4), list(SpriteSet), 2)
data = Batches(samples, 4 // processes.num_processes)
vae = Networks.load(model).vae
for max_steps in (2, 4):  # the second goes on from the first's checkpoint
    config.max_steps = max_steps
    train_autoencoder(vae, data, config, output / "runs")
vae.save_pretrained(output / str(processes.process_index))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "decoder"])
def test_two_processes_that_share_the_crops_train_the_autoencoder_as_one(kind, tiny_model, tmp_path, run_forked):
    (tmp_path / "share.py").write_text(_SHARING)
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        script = [str(tmp_path / "share.py"), str(tiny_model), str(tmp_path / str(count)), kind]
        run_forked([f"--nproc_per_node={count}", *script])
    folders = [tmp_path / name for name in ("1/0", "2/0", "2/1")]
    one, first, second = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in folders)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    start = load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors")
    way, apart = (torch.cat([(one[key] - other[key]).flatten() for key in one]).norm() for other in (start, first))
    assert apart < 0.1 * way
    factors = [json.loads((folder / "config.json").read_text())["scaling_factor"] for folder in folders]
    assert factors[1] == factors[2] == pytest.approx(factors[0], rel=1e-3)
