"""The error of x_0 predicted from pure noise, and the rows that it is compared with."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, TINY_WORLD, tiny_networks

from imageconductor.data.scenes import render
from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import caption_words, sample_scene
from imageconductor.evaluation.metrics.one_step_error import format_errors, measure_one_step_errors, warp
from imageconductor.models.small_model import build_small_model

WORLD = SpriteWorldConfig(size=(96, 64), num_frames=6, max_sprites=3, patterns=("dotted",))


@pytest.mark.parametrize("kind", list(SpriteSet))
def test_sources_are_the_inverse_of_tracks(kind):
    for index in range(6):
        scene = sample_scene(replace(WORLD, kind=kind), index)
        for cell in (1, 8):
            points, owner = scene.sources(cell)
            assert points.shape == (6, 64 // cell, 96 // cell, 2)
            y, x = torch.meshgrid(*[(torch.arange(n // cell) + 0.5) * cell - 0.5 for n in (64, 96)], indexing="ij")
            for t in range(6):
                tracked, _ = scene.track(points[t].reshape(-1, 2))
                same = scene.on_sprite(points[t].reshape(-1, 2)) == owner[t].reshape(-1)
                error = (tracked[:, t] - torch.stack([x, y], dim=-1).reshape(-1, 2)).norm(dim=-1)
                assert error[same].max() < 1e-3
                assert same.float().mean() > 0.6  # the rest is covered in frame 0
                foremost = owner[t].reshape(-1) == len(scene.sprites) - 1
                assert (~same & foremost).sum() <= 0.02 * foremost.sum()


def test_a_warped_first_frame_shows_what_the_later_frames_show():
    for index in range(4):
        plain = {"patterns": (), "min_sprites": 1, "max_sprites": 2, "keep_clear": False, "background_contrast": 1.0}
        scene = sample_scene(replace(WORLD, kind=SpriteSet.CAMERA, sprite_radius=(0.2, 0.25), **plain), index)
        frames = render([scene])[0].float()
        sources, _ = scene.sources()
        inside = ((sources >= 0) & (sources <= torch.tensor([95.0, 63.0]))).all(-1)
        error = (warp(frames[:, 0], sources) - frames).abs().mean(0)
        assert error[inside].mean() < 1.5
        assert (warp(frames[:, 0], sources + 1) - frames).abs().mean(0)[inside].mean() > 2 * error[inside].mean()


def test_errors_are_by_frame_and_repeat():
    networks = tiny_networks()
    errors, again = (measure_one_step_errors(networks, replace(TINY_WORLD, seed=7), num_clips=2) for _ in range(2))
    for region, rows in errors.items():
        assert list(rows) == [
            "frame 0 copied",
            "frame 0 warped",
            "latents of frame 0 warped",
            "model, no tracks",
            "model, 1..8 tracks",
            "model, dense",
        ]
        assert all(error.shape == (4,) and torch.equal(error, again[region][row]) for row, error in rows.items())
        assert rows["frame 0 copied"][0] == 0
        assert rows["frame 0 warped"][0] < 1e-8
        assert rows["frame 0 warped"][3] < 0.5 * rows["frame 0 copied"][3]
        assert rows["model, no tracks"][3] != rows["model, dense"][3] != rows["model, 1..8 tracks"][3]
    table = format_errors(errors)
    assert "| everywhere, frame | 1 | 2 | 3 |" in table
    assert f"| model, dense | {errors['on sprites']['model, dense'][1]:.4f} |" in table


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_model_that_knows_the_clip_has_no_error(kind, monkeypatch):
    networks = build_small_model(replace(TINY, prediction_type=kind), [" ".join(caption_words())])
    scheduler, given = networks.scheduler, {}
    add_noise = scheduler.add_noise

    def remember(x_0, eps, t):
        given["answer"] = eps if kind == "epsilon" else scheduler.get_velocity(x_0, eps, t)
        return add_noise(x_0, eps, t)

    monkeypatch.setattr(scheduler, "add_noise", remember)
    monkeypatch.setattr(networks.unet, "decode", lambda *_: given["answer"])
    rows = measure_one_step_errors(networks, TINY_WORLD, num_clips=2)["everywhere"]
    assert rows["model, dense"].max() < 1e-3 * rows["frame 0 copied"][1:].min()
