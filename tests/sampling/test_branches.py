"""The plan of a guided step, and the published sampling loops."""

import copy
from dataclasses import replace

import pytest
import torch
from parity import (
    REFERENCE,
    TOLERANCE,
    expected,
    inputs,
    model_config,
    published_scheduler,
    relative_error,
    weights,
)
from published_schedule import published_step

from imageconductor.checkpoints.published import load_published
from imageconductor.diffusion.guidance import camera_free_guidance, classifier_free_guidance
from imageconductor.models.adapters import Adapter
from imageconductor.models.denoiser import Condition, Denoiser
from imageconductor.sampling.branches import ADAPTERS, Control, GuidedDenoiser, plan


@pytest.fixture(scope="module")
def networks():
    return load_published(weights("unet"), weights("image_controlnet"), weights("flow_controlnet"), **model_config())


def conditions_of(x):
    """The stored inputs as the condition of each text."""
    texts = {"uncond": x["text"][:1], "prompt": x["text"][1:]}
    return {name: Condition(text, x["condition"], x["mask"], x["flow"]) for name, text in texts.items()}


def guided(networks, branches):
    """The guided denoiser of the stored inputs."""
    return GuidedDenoiser(Denoiser(*networks), branches, conditions_of(inputs()))


@torch.no_grad()
def run_loop(networks, branches):
    denoise = guided(networks, branches)
    scheduler, latents = published_scheduler(), inputs()["loop_latents"]
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == REFERENCE["scheduler_timesteps_5"]
    for t in scheduler.timesteps:
        latents = scheduler.step(denoise(latents, t), t, latents).prev_sample
    return latents


@pytest.mark.parametrize("control", ["camera", "object"])
def test_published_loop(networks, control):
    latents = run_loop(networks, plan(Control(control), 7.5))
    assert relative_error(latents, expected()[f"loop/{control}_5steps_cfg7.5"]) <= TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_camera_free_loop(networks, scale):
    latents = run_loop(networks, plan(Control.OBJECT, 7.5, scale))
    assert relative_error(latents, expected()[f"eq5_loop/lcfg7.5_ltrajs{scale}_5steps"]) <= TOLERANCE


@pytest.mark.parametrize("control", Control)
@pytest.mark.parametrize("scale", [1.0, 2.5, 8.5])
def test_plan_is_classifier_free_guidance_under_the_controls_adapters(control, scale):
    uncond, text = torch.randn(2, 1, 4, 2, 3, 3, dtype=torch.float64)
    values = {"uncond": uncond, "prompt": text}
    branches = plan(control, scale)
    assert all(branch.adapters == ADAPTERS[control] for branch in branches)
    total = sum(branch.weight * values[branch.text] for branch in branches)
    torch.testing.assert_close(total, classifier_free_guidance(uncond, text, scale))


@pytest.mark.parametrize(("text", "camera_free"), [(8.5, 1.0), (2.0, 1.5), (1.0, 1.4), (3.0, 3.0), (4.0, 0.0)])
def test_plan_is_equation_5(text, camera_free):
    uncond, base, obj = torch.randn(3, 1, 4, 2, 3, 3, dtype=torch.float64)
    values = {("uncond", ()): uncond, ("prompt", ()): base, ("prompt", (Adapter.OBJECT,)): obj}
    total = sum(b.weight * values[b.text, b.adapters] for b in plan(Control.OBJECT, text, camera_free))
    torch.testing.assert_close(total, camera_free_guidance(uncond, base, obj, text, camera_free))


@pytest.mark.parametrize(("control", "camera_free"), [*((control, None) for control in Control), (Control.OBJECT, 1.5)])
def test_plan_is_trajectory_guidance(control, camera_free):
    """guided + (s - 1) (eps with the trajectories - eps without), for the prompt."""
    adapters = ADAPTERS[control]
    total = {(b.text, b.adapters): b.weight for b in plan(control, 4.0, camera_free, 2.5)}
    before = {(b.text, b.adapters): b.weight for b in plan(control, 4.0, camera_free)}
    assert total.pop(("prompt", None)) == pytest.approx(-1.5)
    assert total.pop(("prompt", adapters)) == pytest.approx(before.pop(("prompt", adapters)) + 1.5)
    assert total == pytest.approx(before)


def test_trajectory_guidance_costs_a_decoder_pass(networks, monkeypatch):
    """The branch without trajectories has the image ControlNet alone, and shares the encoder with the others."""
    unet, image, _ = networks
    x = inputs()
    with torch.no_grad():
        strong = guided(networks, plan(Control.CAMERA, 1.0, None, 3.0))(x["loop_latents"], x["timestep"])
        drawn = guided(networks, plan(Control.CAMERA, 1.0))(x["loop_latents"], x["timestep"])
        features = unet.encode(x["loop_latents"], x["timestep"], x["text"][1:])
        undrawn = unet.decode(features, image(x["timestep"], x["text"][1:], x["condition"], x["mask"]))
        assert relative_error(strong, 3 * drawn - 2 * undrawn) < 1e-5
        passes = []
        encode = unet.encode
        monkeypatch.setattr(unet, "encode", lambda *args: passes.append(len(args[0])) or encode(*args))
        guided(networks, plan(Control.CAMERA, 1.0, None, 3.0))(x["loop_latents"], x["timestep"])
    assert passes == [1]


def test_without_trajectories_there_is_nothing_to_guide_by():
    assert plan(Control.OBJECT, 4.0, 1.5, 3.0, has_trajectories=False) == plan(
        Control.OBJECT, 4.0, has_trajectories=False
    )


def test_branches_without_weight_are_not_run():
    assert [b.text for b in plan(Control.CAMERA, 1.0)] == ["prompt"]
    assert len(plan(Control.OBJECT, 8.5, 1.5)) == 3
    assert len(plan(Control.OBJECT, 1.0, 1.5)) == 2, "no text guidance: no unconditional branch"
    assert len(plan(Control.OBJECT, 3.0, 3.0)) == 2, "equal scales: the base branch cancels"
    assert [b.adapters for b in plan(Control.OBJECT, 4.0, 0.0)] == [(), ()]


def test_camera_free_guidance_is_for_objects():
    with pytest.raises(ValueError, match="camera_free_scale"):
        plan(Control.CAMERA, 8.5, 1.2)


def test_work_is_shared(networks, monkeypatch):
    """Eq. 5 on three seeds: one encoder pass of 2 x 3 videos, ControlNets at batch 1 a text, a decoder per branch."""
    calls = {"encode": [], "decode": [], "image": [], "motion": []}

    def record(name, owner, method, size):
        original = getattr(type(owner), method)

        def wrapper(self, *args, **kwargs):
            calls[name].append(size(args))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(type(owner), method, wrapper)  # of the class, so that a merged copy is counted too

    unet, image, motion = networks
    record("encode", unet, "encode", lambda a: len(a[0]))
    record("decode", unet, "decode", lambda a: len(a[0].mid) // a[0].num_frames)
    record("image", image, "forward", lambda a: len(a[1]))
    record("motion", motion, "forward", lambda a: len(a[1]))
    x = inputs()
    noise = torch.randn(3, *x["loop_latents"].shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = guided(networks, plan(Control.OBJECT, 7.5, 1.4))(noise, x["timestep"])
        assert calls == {"encode": [6], "decode": [3, 3, 3], "image": [2], "motion": [1, 2]}
        for row in range(3):
            alone = guided(networks, plan(Control.OBJECT, 7.5, 1.4))(noise[row : row + 1], x["timestep"])
            assert relative_error(together[row : row + 1], alone) < 1e-5


def halved(networks):
    return [copy.deepcopy(network).bfloat16() for network in networks]


def half_conditions():
    x = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs().items()}
    return conditions_of(x)


@torch.no_grad()
def test_a_lora_that_stays_active_is_merged(networks):
    """Into a copy, once a call, in place of two more products a layer and step."""
    half, x = halved(networks), inputs()
    merged = GuidedDenoiser(Denoiser(*half), plan(Control.CAMERA, 7.5), half_conditions())
    copied = merged.merged_denoiser.motion_controlnet
    assert copied is not half[2]
    assert not [key for key in copied.state_dict() if ".lora_" in key]
    assert merged.merged_denoiser.motion_controlnet is copied, "once a call"
    plain = GuidedDenoiser(Denoiser(*networks), plan(Control.CAMERA, 7.5), conditions_of(x))
    expected = plain(x["loop_latents"], x["timestep"])
    found = merged(x["loop_latents"].bfloat16(), x["timestep"]).float()
    base = GuidedDenoiser(Denoiser(*networks), plan(Control.BASE, 7.5), conditions_of(x))
    assert relative_error(found, expected) < 0.3 * relative_error(base(x["loop_latents"], x["timestep"]), expected)


def test_what_a_copy_cannot_stand_for_is_not_merged(networks):
    half = halved(networks)

    def merges(branches=None):
        return GuidedDenoiser(Denoiser(*half), branches or plan(Control.CAMERA, 7.5), half_conditions()).merges

    assert merges()
    assert merges(plan(Control.OBJECT, 7.5, 1.4)), "theta_0 beside it needs no LoRA"
    mix = {Control.CAMERA: 1.0, Control.OBJECT: 1.0}
    assert not merges(plan(Control.CAMERA, 7.5, mix=mix)), "two sets would be two copies"
    assert not merges(plan(Control.BASE, 7.5))
    half[2]._hf_hook = None  # as accelerate's offloading leaves it
    assert not merges()
    del half[2]._hf_hook
    half[2].compile(backend="eager")
    assert not merges()


@torch.no_grad()
@pytest.mark.parametrize("camera_free", [None, 1.4])
def test_the_shared_schedule_is_the_published_one(networks, camera_free, monkeypatch):
    """Text once a video, LoRAs merged, branches decoded together, and the start of each network once for both texts."""

    def count(layer):
        original, seen = layer.forward, []

        def forward(*args, **kwargs):
            seen.append(len([*args, *kwargs.values()][0]))
            return original(*args, **kwargs)

        monkeypatch.setattr(layer, "forward", forward)
        return seen

    x, conditions, unet = inputs(), conditions_of(inputs()), networks[0]
    denoiser, frames = Denoiser(*networks), x["loop_latents"].shape[2]
    arguments = conditions, Control.OBJECT, 7.5, camera_free
    expected = published_step(denoiser, x["loop_latents"], x["timestep"], *arguments)
    denoise = guided(networks, plan(Control.OBJECT, 7.5, camera_free))
    keys = count(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k)
    first = count(unet.down_blocks[0].resnets[0])
    second = count(unet.down_blocks[0].resnets[1])
    found = denoise(x["loop_latents"], x["timestep"])
    assert relative_error(found, expected) < 1e-5
    assert (keys, first, second) == ([2], [frames], [2 * frames])
    other = {**conditions, "uncond": replace(conditions["uncond"], flow=-x["flow"])}
    differing = GuidedDenoiser(denoiser, plan(Control.OBJECT, 7.5), other)(x["loop_latents"], x["timestep"])
    reference = published_step(denoiser, x["loop_latents"], x["timestep"], other, Control.OBJECT, 7.5)
    assert relative_error(differing, reference) < 1e-5, "flow maps that differ are not taken for one"
