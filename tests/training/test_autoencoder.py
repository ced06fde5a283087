"""The autoencoder's own training."""

import copy

import pytest
import torch

from imageconductor.data.batches import Batches, SpriteSamples
from imageconductor.data.sprites import SpriteSet, SpriteWorldConfig
from imageconductor.models.networks import Networks
from imageconductor.training.autoencoder import AutoencoderConfig, train_autoencoder


@pytest.mark.parametrize("decoder_only", [False, True])
def test_who_learns(decoder_only, tiny_model, tmp_path):
    """Under `decoder_only` the latents stay what they are, to the bit, and so does their scale."""
    vae = Networks.load(tiny_model).vae
    before, factor = copy.deepcopy(vae.state_dict()), vae.config["scaling_factor"]
    data = Batches(SpriteSamples(SpriteWorldConfig(size=(32, 32), num_frames=4), [SpriteSet.MIXED]), 4)
    config = AutoencoderConfig(decoder_only=decoder_only, max_steps=4, batch_size=4, crop=16, learning_rate=1e-2)
    train_autoencoder(vae, data, config, tmp_path)
    learned = {key.split(".")[0] for key, value in vae.state_dict().items() if not torch.equal(value, before[key])}
    assert learned == ({"decoder"} if decoder_only else {"encoder", "quant_conv", "post_quant_conv", "decoder"})
    assert (vae.config["scaling_factor"] == factor) == decoder_only
