"""Kept samples, runs that go on from one of them, and what a callback sees of a step."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image

from imageconductor.conditioning import camera_preset
from imageconductor.diffusion.clean_estimate import estimate_x_0
from imageconductor.models.adapters import add_adapter, merge_copy
from imageconductor.models.controlnets import MotionControlNet
from imageconductor.models.motion_unet import MotionUNet
from imageconductor.sampling.pipeline import ImageConductorPipeline

STEPS = 3


@pytest.fixture(scope="module")
def shared_pipe():
    return tiny_pipeline()


@pytest.fixture
def pipe(shared_pipe):
    scheduler = shared_pipe.scheduler
    yield shared_pipe
    shared_pipe.scheduler = scheduler


def run(pipe, **arguments):
    """A call of three steps, (1, C, 2, 16, 16)."""
    given = {
        "image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)),
        "trajectories": camera_preset("pan-left", (32, 32), 2),
        "prompt": "a red circle",
        "control": "camera",
        "seed": 1,
        "num_inference_steps": STEPS,
        **arguments,
    }
    return pipe(num_frames=2, output_type="latent", **given)


def use(pipe, name, **settings):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "TCDScheduler"])
def test_a_resumed_run_is_the_uninterrupted_one(pipe, name):
    use(pipe, name)
    whole = run(pipe, keep_latents=True)
    assert len(whole.latents) == STEPS + 1
    assert torch.equal(whole.latents[-1], whole.frames)
    noise = torch.randn(whole.frames.shape, generator=torch.Generator().manual_seed(1))
    pipe.scheduler.set_timesteps(STEPS)
    assert torch.equal(whole.latents[0], noise * pipe.scheduler.init_noise_sigma)
    for step in (0, 1, STEPS):
        resumed = run(pipe, keep_latents=True, resume_from=step, latents=whole.latents[step], seed=2)
        assert torch.equal(resumed.frames, whole.frames), step
        assert all(map(torch.equal, resumed.latents, whole.latents[step:]))
        assert len(resumed.latents) == STEPS + 1 - step
    assert torch.equal(run(pipe).frames, whole.frames), "the next whole run begins at the beginning"


def test_an_edit_acts_from_its_step_on(pipe):
    whole = run(pipe, keep_latents=True)
    steps = []
    edited = run(
        pipe,
        resume_from=2,
        latents=whole.latents[2],
        trajectories=camera_preset("zoom-in", (32, 32), 2),
        callback_on_step_end=lambda _pipe, step, _t, _tensors: steps.append(step),
    )
    assert steps == [2]
    assert not torch.equal(edited.frames, whole.frames)
    assert edited.latents is None
    assert len(run(pipe, return_dict=False)) == 1
    frames, kept = run(pipe, return_dict=False, keep_latents=True)
    assert torch.equal(frames, kept[-1])


def test_kept_samples_are_what_callbacks_make_of_them(pipe):
    """And are copies, which a later step or callback cannot change."""

    def clear(pipeline, step, t, tensors):
        tensors["latents"].zero_()
        pipeline._interrupt = step == 1

    kept = run(pipe, keep_latents=True, callback_on_step_end=clear).latents
    assert [bool(x.any()) for x in kept] == [True, False, False]


STATEFUL = {  # one of each kind
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LCMScheduler": {},
}


@pytest.mark.parametrize("name", STATEFUL)
def test_steps_that_depend_on_more_than_their_sample_are_refused(pipe, name):
    use(pipe, name, **STATEFUL[name])
    with pytest.raises(ValueError, match=f"a step of {name} may draw noise or use earlier predictions"):
        run(pipe, resume_from=1, latents=torch.zeros(1, 4, 2, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resume_from": 1}, "resume_from=1 goes with latents"),
        ({"resume_from": 4, "latents": torch.zeros(1, 4, 2, 16, 16)}, "a step from 0 to 3, got 4"),
        ({"resume_from": -1, "latents": torch.zeros(1, 4, 2, 16, 16)}, "got -1"),
        ({"resume_from": 1, "latents": torch.zeros(1, 4, 2, 16, 16), "eta": 0.5}, "eta must be 0, got 0.5"),
        ({"resume_from": 1, "latents": torch.zeros(1, 4, 2, 8, 16)}, "latents must be"),
    ],
)
def test_what_cannot_be_resumed_is_told(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **arguments)


def watch(into, **before):
    """A callback that collects its tensors, and those settings of the pipeline that it changes after step 0."""

    def callback(pipeline, step, t, tensors):
        into.append({**tensors, "t": int(t)})
        if step == 0:
            for name, value in before.items():
                setattr(pipeline, name, value)
        return {name: torch.zeros(1) for name in tensors if name.endswith("x_0")}

    return callback


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x_0_is_the_schedulers_own(pipe, kind, monkeypatch):
    use(pipe, "DDIMScheduler", prediction_type=kind, rescale_betas_zero_snr=False, clip_sample=False)
    seen, expected, step = [], [], pipe.scheduler.step

    def record(*args, **kwargs):
        expected.append(step(*args, **{**kwargs, "return_dict": True}).pred_original_sample)
        return step(*args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", record)
    plain = run(pipe).frames
    expected.clear()
    names = ["x_0", "latents"]
    found = run(pipe, callback_on_step_end=watch(seen), callback_on_step_end_tensor_inputs=names).frames
    assert torch.equal(found, plain), "what comes back as x_0 is not looked at"
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one["x_0"], other, rtol=1e-4, atol=1e-4)


def test_x_0_of_a_scheduler_that_counts_in_sigmas(pipe):
    """Its samples are x_0 + sigma eps, and its timesteps lie between those of the training."""
    settings = {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False}
    use(pipe, "EulerDiscreteScheduler", prediction_type="epsilon", **settings)
    seen, kept = [], run(pipe, keep_latents=True).latents
    run(pipe, callback_on_step_end=watch(seen), callback_on_step_end_tensor_inputs=["x_0"])
    sigmas = pipe.scheduler.sigmas
    assert pipe.scheduler.timesteps[1] % 1 == 0.5
    for step, one in enumerate(seen):  # a step goes from x_0 + sigma eps to x_0 + sigma' eps
        ratio = sigmas[step + 1] / sigmas[step]
        expected = (kept[step + 1] - ratio * kept[step]) / (1 - ratio)
        torch.testing.assert_close(one["x_0"], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_an_unknown_kind_of_prediction_is_told():
    with pytest.raises(ValueError, match="the scheduler has 'flow'"):
        estimate_x_0(torch.zeros(1), torch.zeros(1), 0.5, "flow")


def test_each_branch_is_what_its_control_alone_would_do(pipe):
    """At the same x_t: estimates of calls without guidance, whose first step begins with the same noise."""
    seen = []
    names = {"callback_on_step_end_tensor_inputs": ["x_0", "branch_x_0"]}
    plain = run(pipe).frames
    assert torch.equal(run(pipe, callback_on_step_end=watch(seen), **names).frames, plain), "they change nothing"
    once = {"guidance_scale": 1.0, "num_inference_steps": 1}  # begins with the same noise at the same timestep
    assert list(seen[0]["branch_x_0"]) == ["undrawn", "camera", "object", "mixed"]
    for name, found in seen[0]["branch_x_0"].items():
        alone, given = [], {"control": name} if name != "undrawn" else {"trajectories": None}
        run(pipe, callback_on_step_end=watch(alone), callback_on_step_end_tensor_inputs=["x_0"], **once, **given)
        torch.testing.assert_close(found, alone[0]["x_0"], rtol=1e-4, atol=1e-5)
    without = []
    run(pipe, trajectories=None, callback_on_step_end=watch(without), **names, **once)
    assert list(without[0]["branch_x_0"]) == ["undrawn"]


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 2.0, "callback_on_step_end_tensor_inputs": ["branch_x_0"]},
        {"guidance_scale": 3.0, "control": "object", "camera_free_scale": 1.5, "trajectory_guidance_scale": 2.0},
        {"guidance_scale": 2.0, "mix": {"camera": 1.0, "object": 1.0}},
    ],
    ids=["branches", "Eq. 5", "mix"],
)
def test_a_video_without_a_picture_is_the_same_alone_and_in_company(pipe, settings):
    """Branches with and without trajectories, of which only some have residuals, are decoded together in one video."""
    given = {"image": None, "callback_on_step_end": watch([]), **settings}
    alone = run(pipe, **given)
    together = run(pipe, **{**given, "seed": [1, 2]})
    torch.testing.assert_close(alone.frames[0], together.frames[0], rtol=1e-4, atol=1e-5)


def test_a_run_is_resumed_where_the_controlnets_are_evaluated(pipe):
    whole = run(pipe, keep_latents=True, controlnet_interval=2)
    for step in (0, 2, STEPS):
        resumed = run(pipe, resume_from=step, latents=whole.latents[step], controlnet_interval=2)
        assert torch.equal(resumed.frames, whole.frames), step
    with pytest.raises(ValueError, match="resume at step 0"):
        run(pipe, resume_from=1, latents=whole.latents[1], controlnet_interval=2)


def test_only_adapters_that_exist_have_branches(pipe):
    motion = merge_copy(pipe.motion_controlnet)  # without LoRAs
    add_adapter(motion, "object", rank=2)
    parts = {**pipe.components, "motion_controlnet": motion, "sampling_defaults": pipe.sampling_defaults}
    other, seen = ImageConductorPipeline(**parts), []
    other.set_progress_bar_config(disable=True)
    names = {"callback_on_step_end_tensor_inputs": ["branch_x_0"]}
    run(other, control="object", guidance_scale=2.0, callback_on_step_end=watch(seen), **names)
    assert list(seen[0]["branch_x_0"]) == ["undrawn", "object"]


def test_branches_cost_only_what_the_step_has_not_evaluated(pipe, monkeypatch):
    """Counted in videos for the decoder, which takes several branches in a call."""
    calls = []

    def count(kind, name, rows):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args: calls.extend([name] * rows(args)) or original(*args))

    count(MotionUNet, "encode", lambda _: 1)
    count(MotionUNet, "decode", lambda args: len(args[1].text))
    count(MotionControlNet, "forward", lambda _: 1)
    seen = []
    given = {
        "control": "object",
        "guidance_scale": 3.0,
        "num_inference_steps": 2,
        "callback_on_step_end": watch(seen, _shows_branches=False),
        "callback_on_step_end_tensor_inputs": ["branch_x_0"],
    }
    run(pipe, **given)
    asked = {"encode": 2, "decode": 2 + 3 + 2, "forward": 1 + 2 + 1}  # undrawn, camera and mixed besides, in one step
    assert {name: calls.count(name) for name in asked} == asked
    assert len(seen[0]["branch_x_0"]) == 4
    assert seen[1]["branch_x_0"] == {}
    calls.clear()
    run(pipe, **{**given, "trajectory_guidance_scale": 2.0})
    assert calls.count("decode") == 3 + 2 + 3, "the step itself evaluates the undrawn branch"
    calls.clear()
    run(pipe, **{**given, "callback_on_step_end_tensor_inputs": ["x_0"]})
    assert calls.count("decode") == 4, "two branches, two steps"


def test_schedulers_without_noise_levels_have_no_estimates(pipe):
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="x_0: EDMEulerScheduler has no alphas_cumprod"):
        run(pipe, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["x_0"])
