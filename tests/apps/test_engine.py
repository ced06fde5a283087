"""The queue in front of the model: order, stopping, failures, and what a step reports."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from imageconductor.apps import engine as engine_module
from imageconductor.apps.engine import Engine, Made, Request, Resume, Stopped
from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.progress import BRANCHES, Mix, Step, Waiting
from imageconductor.conditioning import Trajectories
from imageconductor.sampling.job import SampleJob, load_pipeline, prepare, render


@pytest.fixture(scope="module")
def engine(tiny_model):
    running = Engine(SampleJob(model=str(tiny_model), device="cpu"), Limits(waiting=3))
    yield running
    running.close()


@pytest.fixture
def job(tiny_model, tmp_path) -> SampleJob:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    Trajectories.from_tracks([[[4, 4], [20, 24]]], (32, 32), 4).save(tmp_path / "tracks.json")
    return SampleJob(
        model=str(tiny_model),
        device="cpu",
        image=str(tmp_path / "picture.png"),
        trajectories=str(tmp_path / "tracks.json"),
        control="object",
        prompt="a cat",
        seed=[5],
    )


def run(engine, request) -> list:
    return list(engine.submit(request).events())


def made(engine, request) -> Made:
    last = run(engine, request)[-1]
    assert isinstance(last, Made)
    return last


class Gate:
    """Holds the worker at its first step until it is opened."""

    def __init__(self, monkeypatch):
        self.reached, self.opened = threading.Event(), threading.Event()
        monkeypatch.setattr(engine_module, "StepReport", self.wrap(engine_module.StepReport))

    def wrap(self, report_class):
        gate = self

        class HeldReport(report_class):
            def __call__(self, *arguments):
                gate.reached.set()
                assert gate.opened.wait(60)
                return super().__call__(*arguments)

        return HeldReport


def test_a_request_makes_what_sample_py_makes(engine, job):
    inputs = prepare(job)
    (expected,) = render(load_pipeline(inputs.job), [inputs])[0]
    first, second = made(engine, Request(job)), made(engine, Request(job))  # the second from cached residuals
    for one in (first, second):
        assert np.array_equal(one.videos[0], expected)
        assert one.is_repeatable
    assert len(first.latents) == 4


def test_steps_are_reported_with_time_left_and_estimates_of_each_video(engine, job):
    events = run(engine, Request(SampleJob(**{**vars(job), "seed": [5, 6]}), estimates_every=1))
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.done, step.total) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert [list(step.estimates) for step in steps] == [[5, 6], [5, 6], []]  # the last estimate is the result itself
    assert steps[0].estimates[5].shape == (4, 32, 32, 3)
    assert steps[-1].seconds_left == 0
    assert steps[0].seconds_left > steps[1].seconds_left > 0
    assert isinstance(events[-1], Made)
    assert not any(step.branches for step in steps)


def test_estimates_only_at_every_nth_step(engine, job):
    steps = [event for event in run(engine, Request(job, estimates_every=2)) if isinstance(event, Step)]
    assert [len(step.estimates) for step in steps] == [0, 1, 0]
    assert not any(step.estimates for step in run(engine, Request(job, estimates_every=0)) if isinstance(step, Step))


def test_stop_acts_at_the_next_step_and_the_next_request_is_whole(engine, job, monkeypatch):
    expected = made(engine, Request(job)).videos[0]
    gate = Gate(monkeypatch)
    ticket = engine.submit(Request(job))
    assert gate.reached.wait(60)
    ticket.stop()
    gate.opened.set()
    events = list(ticket.events())
    assert isinstance(events[-1], Stopped)
    assert not any(isinstance(event, Step) for event in events)
    assert np.array_equal(made(engine, Request(job)).videos[0], expected)


def test_a_request_that_begins_says_so_before_its_first_step(engine, job, monkeypatch):
    gate = Gate(monkeypatch)
    first, second = engine.submit(Request(job)), engine.submit(Request(job))
    following = second.events()
    assert gate.reached.wait(60)
    assert next(following) == Waiting(1)
    gate.opened.set()
    assert next(following) == Waiting(0)
    assert isinstance(next(following), Step)
    assert isinstance(list(first.events())[-1], Made)
    following.close()


def test_stop_while_videos_are_decoded_drops_them(engine, job, monkeypatch):
    made(engine, Request(job))  # the pipeline is loaded
    decode, tickets = engine._pipe.decode_latents, []

    def stop_then_decode(*arguments):
        tickets[0].stop()
        return decode(*arguments)

    gate = Gate(monkeypatch)
    tickets.append(engine.submit(Request(job, estimates_every=0)))
    monkeypatch.setattr(engine._pipe, "decode_latents", stop_then_decode)
    gate.opened.set()
    *events, last = tickets[0].events()
    assert isinstance(last, Stopped)
    assert len([event for event in events if isinstance(event, Step)]) == 3


def test_waiting_requests_know_their_place_and_can_be_stopped(engine, job, monkeypatch):
    gate = Gate(monkeypatch)
    first = engine.submit(Request(job))
    assert gate.reached.wait(60)
    others = [engine.submit(Request(job)) for _ in range(3)]
    assert [engine.count_ahead(ticket) for ticket in (first, *others)] == [None, 1, 2, 3]
    with pytest.raises(FieldError, match="3 requests wait already") as caught:
        engine.submit(Request(job))
    assert caught.value.field == "generate"
    others[0].stop()
    assert engine.count_ahead(others[1]) == 1
    assert list(others[0].events()) == [Stopped()]
    following = others[1].events()
    assert next(following) == Waiting(1)
    following.close()  # the visitor has left
    assert engine.count_ahead(others[2]) == 1
    gate.opened.set()
    assert isinstance(list(others[2].events())[-1], Made)


def test_a_request_that_fails_leaves_the_next_unharmed(engine, job, monkeypatch):
    expected = made(engine, Request(job)).videos[0]
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "to_uint8", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(engine, Request(job))
    resume = Resume(1, {1: torch.zeros(1, 4, 4, 9, 9)})
    with pytest.raises(ValueError, match="latents must be"):
        run(engine, Request(job, resume=resume))

    def refuse(_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "call_arguments", refuse)
        with pytest.raises(FieldError, match="memory ran out; ask for fewer videos"):
            run(engine, Request(job))
    assert np.array_equal(made(engine, Request(job)).videos[0], expected)


def test_what_needs_no_weights_is_refused_at_once(engine, job):
    with pytest.raises(ValueError, match="camera_free_scale goes with control 'object'"):
        engine.submit(Request(SampleJob(**{**vars(job), "control": "camera", "camera_free_scale": 1.5})))


def test_a_video_taken_up_again_is_the_same_if_nothing_was_changed(engine, job):
    whole = made(engine, Request(job))
    kept = {step: whole.latents[step] for step in range(3)}
    again = made(engine, Request(job, resume=Resume(2, kept)))
    assert np.array_equal(again.videos[0], whole.videos[0])
    assert again.latents.keys() == whole.latents.keys() == {0, 1, 2, 3}
    assert all(torch.equal(again.latents[step], sample) for step, sample in whole.latents.items())
    assert not again.is_repeatable
    other = made(engine, Request(SampleJob(**{**vars(job), "prompt": "a dog"}), resume=Resume(2, kept)))
    assert not np.array_equal(other.videos[0], whole.videos[0])


def test_the_mixing_board_shows_branches_and_acts_from_the_next_step(engine, job):
    job = SampleJob(**{**vars(job), "steps": 8})
    still, moved = Mix(object=1.0), Mix(object=1.0)
    events = run(engine, Request(job, mix=still))
    steps = [event for event in events if isinstance(event, Step)]
    assert all(tuple(step.branches) == BRANCHES for step in steps)
    assert events[-1].is_repeatable
    assert events[-1].inputs.job.mix == (0.0, 1.0, 0.0)
    last = None
    for last in engine.submit(Request(job, mix=moved)).events():
        if isinstance(last, Step):
            moved.set(object=0.0, camera=1.0)
    assert isinstance(last, Made)
    assert not last.is_repeatable
    assert not np.array_equal(last.videos[0], events[-1].videos[0])


def test_weights_of_the_board():
    mix = Mix(object=1.0)
    mix.set(camera=0.5)
    assert mix.read() == {"camera": 0.5, "object": 1.0, "mixed": 0.0}
    assert mix.as_tuple() == (0.5, 1.0, 0.0)
    with pytest.raises(ValueError, match="camera, object, mixed"):
        mix.set(objects=1.0)


def test_another_base_or_lora_takes_the_place_of_the_loaded_model(engine, job, tiny_model, monkeypatch):
    made(engine, Request(job))
    loaded = []
    monkeypatch.setattr(engine_module, "load_pipeline", lambda job: loaded.append(job.vae_tiling) or load_pipeline(job))
    made(engine, Request(job))
    assert loaded == []
    made(engine, Request(SampleJob(**{**vars(job), "vae_tiling": True})))
    made(engine, Request(job))
    assert loaded == [True, False]
