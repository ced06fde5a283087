"""SSIM and CLIP's cosines."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from imageconductor.evaluation.metrics.appearance import ClipScorer, PickScorer, frame_consistency, ssim


@pytest.fixture(scope="module", params=[torch.float32, torch.float16])
def clip(request, save_clip, tmp_path_factory):
    """A CLIP of random weights, saved in float32 or float16."""
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny", request.param)


def test_clip_scores_are_the_models_own(clip):
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), dtype=np.uint8)
    scorer = ClipScorer(str(clip))
    text, consistency = scorer(frames, "a red circle")
    model = CLIPModel.from_pretrained(clip, dtype=torch.float32)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4814, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    pixels = torch.from_numpy(frames[:, :, 8:40]).permute(0, 3, 1, 2) / 255
    tokens = scorer.tokenizer(["a red circle"], padding="max_length", max_length=12, return_tensors="pt")
    output = model(**tokens, pixel_values=(pixels - mean) / std)
    assert text == pytest.approx((output.logits_per_image / model.logit_scale.exp()).mean().item(), abs=2e-3)
    images = output.image_embeds
    assert consistency == pytest.approx((images[1:] * images[:-1]).sum(-1).mean().item(), abs=2e-3)
    assert scorer(np.repeat(frames[:1], 3, axis=0), "a red circle")[1] == pytest.approx(1, abs=1e-5)
    assert consistency < 0.999


def test_frame_consistency_of_neighbours_and_of_all_pairs(clip):
    angles = torch.deg2rad(torch.tensor([0.0, 60.0, 120.0]))
    images = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert frame_consistency(images) == pytest.approx(0.5)
    assert frame_consistency(images, "all") == pytest.approx((0.5 + 0.5 - 0.5) / 3)
    assert np.isnan(frame_consistency(images[:1]))
    assert np.isnan(frame_consistency(images[:1], "all"))
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    scorer = ClipScorer(str(clip), pairs="all")
    assert scorer(frames, "a")[1] == pytest.approx(frame_consistency(scorer.embed_frames(frames), "all"))


def test_pick_score_is_that_of_the_model_card(clip):
    """`logit_scale.exp() * (text_embs @ image_embs.T)` of the processor's pixels, as a mean over frames."""
    frames = np.random.default_rng(0).integers(0, 255, (3, 48, 40, 3), dtype=np.uint8)
    model = CLIPModel.from_pretrained(clip, dtype=torch.float32)
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    scorer = PickScorer(str(clip))
    assert next(scorer.model.parameters()).dtype == torch.float32
    pixels = processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")["pixel_values"]
    tokens = scorer.tokenizer("a red circle", return_tensors="pt")
    expected = model(**tokens, pixel_values=pixels).logits_per_image
    assert scorer(frames, "a red circle") == pytest.approx(expected.mean().item(), abs=0.05)
    assert abs(expected).max() > 1, "not a bare cosine"
    assert scorer(frames[:1], "a red circle") == pytest.approx(expected[0, 0].item(), abs=0.05)


def test_the_published_settings_of_the_text_encoder_end_at_the_last_word(clip):
    """Published CLIPs name 2 as the end of a text, which is none of their tokenizer's ids but the mark of old files."""
    frames = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    scores = ClipScorer(str(clip))(frames, "a red circle")
    scorer = ClipScorer(str(clip))
    scorer.model.text_model.eos_token_id = 2
    assert scorer(frames, "a red circle") == pytest.approx(scores, abs=1e-6)
    assert scorer(frames, "a") != pytest.approx(scores, abs=1e-6)


def test_a_clip_that_lacks_weights_is_refused(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "clip")
    settings = json.loads((clip / "config.json").read_text())
    settings["vision_config"]["num_hidden_layers"] = 2
    (tmp_path / "clip" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        FileNotFoundError, match=r"^clip: no CLIP model .*: it lacks \d+ weights, such as vision_model\."
    ):
        ClipScorer(str(tmp_path / "clip"))


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert ssim(image, image) == pytest.approx(1)
    noisy = np.clip(image + np.random.default_rng(1).normal(0, 40, image.shape), 0, 255).astype(np.uint8)
    assert 0.2 < ssim(noisy, image) < 0.95
