"""How a run ends before its last step: by a signal, by its time, and by numbers that are not finite."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from imageconductor.training import checkpointing, loop, stopping
from imageconductor.training.engines import build_engine
from imageconductor.training.loop import train
from imageconductor.training.optimizers import build_optimizer
from imageconductor.training.stages.base import ParameterGroup
from imageconductor.training.stopping import Stop, spare_worker
from imageconductor.training.train_config import LoopConfig


def call_before(stage, number, action):
    """Lets `action` happen before the stage's losses are computed for the n-th time."""
    terms, calls = stage.loss_terms, iter(range(10**6))

    def act_and_compute(*arguments):
        if next(calls) == number:
            action()
        return terms(*arguments)

    stage.loss_terms = act_and_compute


def test_a_signal_ends_a_run_with_a_checkpoint_and_it_goes_on(configure, build, tmp_path, caplog):
    config = configure("camera_lora", max_steps=3, save_every=100, gradient_accumulation_steps=3)
    whole, data = build(config)
    train(whole, data, config)

    def signal_all():  # as a queue does, and then a launcher
        for process in 2 * (*multiprocessing.active_children(), multiprocessing.process.current_process()):
            os.kill(process.pid, signal.SIGTERM)

    parts = replace(config, output=str(tmp_path / "parts"), num_workers=1)
    stopped, data = build(parts)
    call_before(stopped, 3, signal_all)  # in the second step, which is given up and whose clips are not all there
    assert train(stopped, data, parts).step == 1
    assert "SIGTERM: the run ends after step 1" in caplog.text
    assert [path.name for path in Path(parts.output).glob("checkpoint-*")] == ["checkpoint-00000001"]
    assert (Path(parts.output) / "camera_lora").is_dir()

    resumed, data = build(parts)
    assert train(resumed, data, parts).step == 3
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def wait_for_clips(connection):
    """A worker that answers each message, as one that prepares batches does."""
    spare_worker(0)
    while True:
        connection.send(connection.recv())


def test_a_worker_outlives_a_signal_that_comes_twice_and_ends_with_a_later_one(monkeypatch):
    monkeypatch.setattr(stopping, "_PATIENCE_S", 0.5)
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=wait_for_clips, args=(theirs,), daemon=True)
    worker.start()
    for _ in range(3):
        ours.send("clip")
        assert ours.recv() == "clip"
        os.kill(worker.pid, signal.SIGTERM)
    ours.send("clip")
    assert ours.recv() == "clip"
    time.sleep(0.6)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == -signal.SIGTERM


def test_minutes_begin_where_the_command_did():
    with Stop(1.0, start=time.monotonic() - 61, begun=3) as over, Stop(1.0) as fresh:
        assert not over.is_due(3), "loading alone would never get ahead"
        assert over.is_due(4)
        assert not fresh.is_due(1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_asks_only_while_a_run_lasts(name):
    number, got = getattr(signal, name), []
    before = signal.signal(number, lambda *_: got.append(number))
    try:
        with Stop(None) as stop:
            assert not stop.is_due(1)
            os.kill(os.getpid(), number)
            assert stop.is_due(1)
        assert not got
        os.kill(os.getpid(), number)
        assert got == [number]
    finally:
        signal.signal(number, before)


def test_a_run_outside_the_main_thread_leaves_signals_alone():
    def enter():
        with Stop(None) as stop:
            found.append(stop.is_due(1))

    found, thread = [], threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


class _Unbounded(torch.autograd.Function):
    """A number whose gradient is infinite."""

    @staticmethod
    def forward(_, value):
        return value.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient * torch.inf


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize(
    ("save_every", "words"),
    [(1, "weights or gradients are not finite after step 2, "), (3, "the gradients of step 1 are not finite, ")],
)
def test_gradients_that_are_not_finite_stop_the_run_and_are_never_saved(
    save_every, words, max_grad_norm, configure, build
):
    config = configure("camera_lora", max_steps=3, save_every=save_every, max_grad_norm=max_grad_norm)
    stage, data = build(config)
    terms, calls = stage.loss_terms, iter(range(10))

    def compute(*arguments):
        losses = terms(*arguments)
        return {name: _Unbounded.apply(value) for name, value in losses.items()} if next(calls) == 1 else losses

    stage.loss_terms = compute
    with pytest.raises(FloatingPointError, match=f"^{words}and are not saved; go on from the last checkpoint with a"):
        train(stage, data, config)
    found = checkpointing.latest(Path(config.output))
    assert (found and found.step) == (1 if save_every == 1 else None)
    assert not (Path(config.output) / "camera_lora").exists()


def test_a_loss_that_overflows_under_fp16_is_a_skipped_step(configure, build, monkeypatch):
    def build_scaled(config):
        engine = build_engine(config)
        engine.accelerator.scaler = torch.amp.GradScaler("cpu")
        engines.append(engine)
        return engine

    engines = []
    monkeypatch.setattr(loop, "build_engine", build_scaled)
    config = configure("camera_lora", max_steps=3, save_every=100)
    stage, data = build(config)
    terms, calls = stage.loss_terms, iter(range(10))

    def compute(*arguments):
        losses = terms(*arguments)
        return {name: value * torch.inf for name, value in losses.items()} if next(calls) == 1 else losses

    stage.loss_terms = compute
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    assert train(stage, data, config).step == 3
    after = stage.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[key], value) for key, value in after.items())
    assert engines[0].skipped == 1


@pytest.fixture
def scaled():
    """A step of the default optimiser whose losses are scaled as under fp16, by the gradient that it is given."""
    config = LoopConfig(output="runs/none", learning_rate=1.0)
    engine = build_engine(config)
    weight = torch.nn.Parameter(torch.zeros(2))
    engine.groups = {"all": ParameterGroup({"weight": weight})}
    engine.accelerator.scaler = torch.amp.GradScaler("cpu")
    optimizer = build_optimizer(engine.groups.values(), config, torch.device("cpu"))
    engine.optimizer = engine.accelerator.prepare_optimizer(optimizer)

    def step(gradient):
        engine.backward((weight * gradient).sum())
        engine.step()

    yield engine, weight, step
    AcceleratorState._reset_state()


def test_steps_that_fp16_skips_are_counted_and_only_many_in_a_row_stop_the_run(scaled):
    engine, weight, step = scaled
    for gradient in [torch.inf] * 49 + [1.0] + [torch.inf] * 49:
        step(gradient)
    assert engine.skipped == 98
    assert engine.norm is None
    assert weight.isfinite().all()
    assert weight.abs().max() > 0
    with pytest.raises(FloatingPointError, match="the last 50 steps had no finite gradients under fp16"):
        step(torch.inf)
