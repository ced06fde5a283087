"""The loss on held-out clips: what it is, that it repeats, and that it tells whether trajectories help."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_WORLD

from imageconductor.data.batches import collate
from imageconductor.training.run import run_stage
from imageconductor.training.samples import read_held_out
from imageconductor.training.stage_configs import load_config
from imageconductor.training.train_config import TrainConfig

STILL = 1e-30  # a learning rate that changes nothing


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    """Four held-out clips of the sprite world in place of sixteen."""
    monkeypatch.setattr("imageconductor.training.samples._SPRITE_CLIPS", 4)


def validation(config):
    """Validation losses by step, as the run folder has them."""
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: {k: v for k, v in line.items() if k.startswith("validation/")} for line in lines}
    return {step: values for step, values in found.items() if values}


def test_it_is_the_mean_loss_of_the_held_out_clips(configure, build):
    config = configure("motion_controlnet", learning_rate=STILL, validation_every=1, max_steps=1, batch_size=2)
    run_stage(replace(config, text_dropout=1.0, image_dropout=1.0))  # Nothing is dropped here nevertheless.
    (found,) = validation(config).values()

    stage, _ = build(replace(config, text_dropout=0.0, image_dropout=0.0))
    with_tracks, without = [], []
    for number, clip in enumerate(read_held_out(config)):
        generator = torch.Generator().manual_seed(number)
        x_0, condition = stage.encode(collate([clip]), [generator])
        eps, t = torch.randn(x_0.shape[1:], generator=generator)[None], torch.tensor([500])
        for given, losses in ((condition, with_tracks), (replace(condition, flow=None), without)):
            prediction = stage.denoise(stage.scheduler.add_noise(x_0, eps, t), t, given)
            losses.append((prediction - stage.target(x_0, t, eps)).square().mean().item())
    assert len(with_tracks) == 4
    assert found["validation/t500"] == pytest.approx(sum(with_tracks) / 4, rel=1e-4)
    assert found["validation/t500_without_trajectories"] == pytest.approx(sum(without) / 4, rel=1e-4)
    means = [found[f"validation/t{t}"] for t in (100, 300, 500, 700, 900)]
    assert found["validation/loss"] == pytest.approx(sum(means) / 5, rel=1e-5)


@pytest.mark.parametrize(("stage", "previewed"), [("motion_controlnet", TINY_WORLD.num_frames), ("object_gates", 2)])
def test_sprite_clips_have_the_frames_that_a_run_sees_and_all_in_previews(stage, previewed, configure, monkeypatch):
    seen, shown = [], []
    monkeypatch.setattr("imageconductor.training.run.train", lambda *given: seen.extend(given[4]))
    config = configure(stage, num_frames=2, max_frame_spacing=1, validation_every=1, preview_every=1)
    run_stage(config, lambda clips, *_: shown.extend(clips))
    assert {clip["pixel_values"].shape[1] for clip in shown} == {previewed}
    for clip, whole in zip(seen, read_held_out(config, 4), strict=True):
        neighbours = [whole["pixel_values"][:, first : first + 2] for first in range(TINY_WORLD.num_frames - 1)]
        assert any(torch.equal(clip["pixel_values"], pair) for pair in neighbours)


@pytest.mark.slow
def test_it_repeats_while_the_weights_stand_still_and_changes_with_them(configure):
    config = configure("motion_controlnet", learning_rate=STILL, validation_every=2, max_steps=4, log_every=100)
    run_stage(config)
    still = validation(config)
    assert list(still) == [2, 4]
    assert still[2] == still[4]
    learning = replace(config, learning_rate=1e-3, output=f"{config.output}-learning")
    run_stage(learning)
    moved = validation(learning)
    assert moved[2]["validation/loss"] != moved[4]["validation/loss"]
    without = "validation/loss_without_trajectories"
    assert moved[2][without] == moved[4][without] == still[2][without]  # Only the motion ControlNet learns.


def test_a_stage_without_trajectories_has_one_loss(configure):
    config = configure("style_lora", validation_every=2)
    run_stage(config)
    assert not any(key.endswith("without_trajectories") for key in validation(config)[2])


@pytest.mark.slow
def test_the_bundled_model_follows_trajectories(tmp_path, monkeypatch):
    monkeypatch.setattr("imageconductor.training.samples._SPRITE_CLIPS", 2)
    overrides = ["model=models/sprites", f"output={tmp_path}", "max_steps=1", "batch_size=2", "learning_rate=1e-30"]
    config = load_config(
        Path("configs/train/sprites/motion_controlnet_sparse.yaml"), [*overrides, "validation_every=1"]
    )
    run_stage(replace(config, motion_controlnet=None, torch_compile=False, warmup_steps=0))
    (found,) = validation(config).values()
    assert found["validation/t900"] < 0.8 * found["validation/t900_without_trajectories"]


def test_it_needs_clips_that_are_not_trained_on():
    with pytest.raises(ValueError, match="validation_every needs clips that are not trained on: set held_out_clips"):
        TrainConfig(data=["somewhere"], validation_every=10)
