"""Steps without guidance, and steps that reuse what the ControlNets gave."""

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image

from imageconductor.conditioning import camera_preset
from imageconductor.evaluation.drawn_motion.config import Method
from imageconductor.models.adapters import merge_copy
from imageconductor.models.controlnets import Control, ImageControlNet, MotionControlNet
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.sampling import branches
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.shortcuts import NO_SHORTCUTS, Shortcuts

SIZE, T = (32, 32), 2


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def run(pipe, **given):
    """Latents of a call with guidance by text, in four steps."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    tracks = camera_preset("pan-left", SIZE, T)
    common = {"prompt": "a red circle", "guidance_scale": 3.0, "num_inference_steps": 4, "num_frames": T, "seed": 1}
    if "mix" not in given:
        common |= {"control": "camera", "trajectory_guidance_scale": 1.0}
    return pipe(picture, tracks, **{**common, **given}, output_type="latent").frames


def count_calls(monkeypatch, **methods):
    """Calls of (class, method) by name, as they are made."""
    calls = dict.fromkeys(methods, 0)

    def count(name, original):
        def counting(self, *args, **kwargs):
            calls[name] += 1
            return original(self, *args, **kwargs)

        return counting

    for name, (owner, method) in methods.items():
        monkeypatch.setattr(owner, method, count(name, getattr(owner, method)))
    return calls


def test_the_steps_of_an_interval():
    steps = range(25)
    assert all(NO_SHORTCUTS.guides(step, 25) and not NO_SHORTCUTS.reuses(step) for step in steps)
    assert [step for step in steps if Shortcuts((0.2, 0.6)).guides(step, 25)] == list(range(5, 15))
    assert not any(Shortcuts((0.5, 0.5)).guides(step, 25) for step in steps)
    assert [step for step in range(7) if not Shortcuts(controlnet_interval=3).reuses(step)] == [0, 3, 6]


def test_guidance_ends_where_a_callback_would_end_it(pipe):
    def end(pipe, step, _, tensors):
        pipe._guidance_scale = 1.0 if step >= 1 else pipe._guidance_scale
        return tensors

    half = run(pipe, guidance_interval=(0.0, 0.5))
    assert torch.equal(half, run(pipe, callback_on_step_end=end))
    assert (half - run(pipe)).abs().max() > 1e-3
    assert torch.equal(run(pipe, guidance_interval=(0.0, 1.0)), run(pipe))


def test_without_guidance_the_prompt_alone_is_evaluated(pipe, monkeypatch):
    guided = {"trajectory_guidance_scale": 2.0}
    assert torch.equal(run(pipe, **guided, guidance_interval=(0.0, 0.0)), run(pipe, guidance_scale=1.0))
    free = {"control": "object", "camera_free_scale": 1.4}
    assert torch.equal(run(pipe, **free, guidance_interval=(1.0, 1.0)), run(pipe, control="object", guidance_scale=1.0))
    mixed = {"mix": {"camera": 1.0, "object": 0.5}}
    assert torch.equal(run(pipe, **mixed, guidance_interval=(0.0, 0.0)), run(pipe, **mixed, guidance_scale=1.0))
    calls = count_calls(monkeypatch, decode=(MotionUNet, "decode"))
    run(pipe, **guided, guidance_interval=(0.25, 0.75))
    assert calls["decode"] == 2 * 2 + 2 * 1, "three branches in two calls, or one branch"


@pytest.mark.parametrize(("interval", "evaluations"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_controlnets_are_evaluated_every_so_many_steps(pipe, interval, evaluations, monkeypatch):
    calls = count_calls(monkeypatch, image=(ImageControlNet, "forward"), motion=(MotionControlNet, "forward"))
    video = run(pipe, controlnet_interval=interval)
    assert calls == {"image": evaluations, "motion": evaluations}
    assert torch.equal(video, run(pipe)) == (interval == 1)


def test_reuse_changes_nothing_where_controlnets_do_not_see_the_timestep(pipe, monkeypatch):
    for owner in (ImageControlNet, MotionControlNet):
        original = owner.forward
        monkeypatch.setattr(owner, "forward", lambda self, t, *a, f=original, **k: f(self, t * 0 + 500, *a, **k))
    torch.testing.assert_close(run(pipe, controlnet_interval=4), run(pipe), rtol=1e-5, atol=1e-5)


def test_loras_are_merged_once_a_call_however_often_its_branches_change(pipe, monkeypatch):
    made = []
    monkeypatch.setattr(branches, "merge_copy", lambda *given: made.append(given[1:]) or merge_copy(*given))
    run(pipe, guidance_interval=(0.25, 0.75))
    assert made == [("camera",)]
    tracks = camera_preset("pan-left", SIZE, 3 * T)
    more = {"num_inference_steps": 2, "control": "camera", "guidance_interval": (0.0, 0.5), "output_type": "latent"}
    pipe(None, tracks, prompt="a star", num_frames=3 * T, window_frames=T, window_overlap=1, seed=1, **more)
    assert made == 2 * [("camera",)]
    mixes = iter([{"camera": 1.0}, {"object": 1.0}, {"object": 0.5}, {"object": 0.5}])
    following = lambda pipe, *_: setattr(pipe, "_mix", {Control(n): w for n, w in next(mixes).items()}) or {}  # noqa: E731
    run(pipe, mix={"camera": 0.5}, callback_on_step_end=following)
    assert made[2:] == [("camera",), ("object",)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance_interval": (0.6, 0.2)}, "two fractions 0 <= START <= STOP <= 1, got \\(0.6, 0.2\\)"),
        ({"guidance_interval": (0.5,)}, "guidance_interval must be two fractions .*, got \\(0.5,\\)"),
        ({"guidance_interval": (0.0, float("nan"))}, "guidance_interval"),
        ({"controlnet_interval": 0}, "controlnet_interval must be a whole number from 1, got 0"),
        ({"controlnet_interval": 1.5}, "controlnet_interval must be a whole number from 1, got 1.5"),
    ],
)
def test_bad_values(pipe, given, message):
    for make in (lambda: run(pipe, **given), lambda: SampleJob(**given), lambda: Method("m", **given)):
        with pytest.raises(ValueError, match=message):
            make()


def test_videos_that_are_made_already_take_no_shortcut():
    with pytest.raises(ValueError, match="intervals need a model"):
        Method(videos="folder", guidance_interval=(0.0, 0.5))
