"""The plain training loop takes the same step as the package's, and the benchmark times what it says."""

import argparse

import pytest
import torch
from plain_training import PlainLoop
from random_networks import SIZES
from training import EnoughSteps, Turns, build_config, build_stage

from imageconductor.data.batches import collate, scale_pixels
from imageconductor.training.loop import draw_noise

CPU = torch.device("cpu")


def generators():
    """One of them drops a clip's text, the other its first frame; in another order of draws, neither or both."""
    return [torch.Generator().manual_seed(seed) for seed in (3, 5)]


def test_a_plain_step_has_the_loss_and_the_gradients_of_ours(tmp_path):
    dropped = ["batch_size=2", "text_dropout=0.5", "image_dropout=0.5"]
    args = argparse.Namespace(config=None, stage="object_lora", dtype=None, overrides=dropped, compile=False, repeats=1)
    config = build_config(args, SIZES["tiny"], tmp_path, torch.device("cpu"))
    stage = build_stage(config, SIZES["tiny"], CPU)
    samples, draws = stage.build_samples(config), generators()
    batch = collate([samples[0], samples[1]])
    x_0, condition = stage.encode(batch, draws)
    t, eps = draw_noise(x_0, stage.scheduler.config["num_train_timesteps"], config.timestep_shift, draws)
    loss = torch.stack(list(stage(x_0, t, eps, condition).values())).sum()
    loss.backward()
    ours = [p.grad for group in stage.trainable().values() for p in group.parameters.values()]

    plain = PlainLoop(build_stage(config, SIZES["tiny"], CPU), samples, config, CPU, freezes=True)
    encoders = [*plain.stage.vae.encoder.parameters(), *plain.stage.unet.down_blocks.parameters()]
    for freezes in (True, False):
        if not freezes:
            plain = PlainLoop(plain.stage, samples, config, CPU, freezes)
        plain_loss = plain.loss(batch | {"pixel_values": scale_pixels(batch["pixel_values"])}, generators())
        plain_loss.backward()
        torch.testing.assert_close(plain_loss, loss, rtol=1e-5, atol=0)
        for gradient, parameter in zip(ours, plain.learning, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
        assert all((parameter.grad is None) == freezes for parameter in encoders)
        plain.stage.zero_grad()


def test_turns_leave_the_first_step_of_each_loop_out():
    taken = []
    turns = Turns({"plain": taken.append}, 2, CPU)
    turns(1, None)
    turns(2, None)
    with pytest.raises(EnoughSteps):
        turns(3, None)
    assert taken == [1, 2, 3]
    assert {name: len(times) for name, times in turns.times.items()} == {"ours": 2, "plain": 2}
