"""Growing a small model."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, tiny_networks

from imageconductor.data.sprites import caption_words
from imageconductor.diffusion.clean_estimate import estimate_x_0
from imageconductor.models.small_model import (
    add_full_resolution_attention,
    build_small_model,
    build_tokenizer,
    predict_v,
)


def test_attention_that_is_added_changes_nothing_until_it_learns():
    networks = tiny_networks()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 3, 8, 8, generator=generator)
    t, text = torch.tensor([500]), torch.randn(1, 5, 16, generator=generator)
    flow, first, mask = torch.randn(1, 2, 3, 16, 16), torch.randn(1, 4, 3, 8, 8), torch.ones(1, 1, 3, 8, 8)

    def run():
        residuals = networks.image_controlnet(t, text, first, mask) + networks.motion_controlnet(t, text, flow)
        return networks.unet.decode(networks.unet.encode(x, t, text), residuals)

    before = run()
    count = sum(p.numel() for p in networks.unet.parameters())
    add_full_resolution_attention(networks)
    torch.testing.assert_close(run(), before)
    assert sum(p.numel() for p in networks.unet.parameters()) > count
    networks.unet.up_blocks[-1].attentions[0].proj_out.weight.data.normal_()
    assert (run() - before).abs().max() > 1e-3

    whole = build_small_model(replace(TINY, attention_at_full_resolution=True), ["a"])
    for name in ("unet", "image_controlnet", "motion_controlnet"):
        grown, built = getattr(networks, name), getattr(whole, name)
        assert {k: v.shape for k, v in grown.state_dict().items()} == {
            k: v.shape for k, v in built.state_dict().items()
        }
    with pytest.raises(ValueError, match="has spatial attention in its first level"):
        add_full_resolution_attention(networks)


def test_a_model_of_v_says_at_the_noisiest_step_what_one_of_x_0_said():
    reads = replace(TINY, prediction_type="sample", first_frame_warp=True, first_frame_skips=True)
    networks = build_small_model(reads, ["a"])
    x, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 16)

    def estimate():
        t, alphas = torch.tensor([999]), networks.scheduler.alphas_cumprod
        prediction = networks.unet.decode(networks.unet.encode(x, t, text), None)
        return estimate_x_0(prediction, x, float(alphas[999]), networks.scheduler.config["prediction_type"])

    before = estimate()
    predict_v(networks)
    assert networks.scheduler.config["prediction_type"] == "v_prediction"
    assert not hasattr(networks.unet, "warped_out")
    assert not hasattr(networks.unet, "warped_skips")
    assert any("first_frame_warp" in name for name in networks.unet.state_dict())
    assert not any(p.requires_grad for p in networks.unet.parameters())
    torch.testing.assert_close(estimate(), before)
    with pytest.raises(ValueError, match='a model that predicts "sample" is needed'):
        predict_v(networks)


def test_every_word_of_a_caption_is_one_token():
    words = caption_words()
    tokenizer = build_tokenizer([" ".join(words) + " ,"], length=48)
    assert [word for word in words if len(tokenizer.tokenize(word)) != 1] == []
    assert len(tokenizer.tokenize("words that are new, in bytes")) > 6


def test_a_tokenizer_is_the_same_each_time():
    """Many merges are equally frequent, so that their order must not come from a hash table."""
    vocabularies = [build_tokenizer(caption_words(), 16).get_vocab() for _ in range(12)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
