"""SSIM and CLIP's cosines."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from imageconductor.evaluation.appearance import ClipScorer, ssim
from imageconductor.models.small_model import build_tokenizer


@pytest.fixture(scope="module", params=[torch.float32, torch.float16])
def clip(request, tmp_path_factory):
    """A CLIP of random weights, saved in float32 or float16."""
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    tokenizer = build_tokenizer(["a red circle"], 12)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).to(request.param).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
