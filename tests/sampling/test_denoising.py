"""Schedulers and callbacks in the denoising loop behave as in diffusers' own pipelines."""

import importlib
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from PIL import Image

from imageconductor.conditioning import camera_preset
from imageconductor.sampling.pipeline import ImageConductorPipeline


@pytest.fixture
def pipe(shared_pipe):
    scheduler = shared_pipe.scheduler
    yield shared_pipe
    shared_pipe.scheduler = scheduler


@pytest.fixture(scope="module")
def shared_pipe(tiny_model):
    pipe = ImageConductorPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, *seeds, **arguments):
    """(B, C, 2, 16, 16) after two steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    arguments = {"prompt": "a red circle", "num_inference_steps": 2, "generator": generators, **arguments}
    return pipe(image, num_frames=2, output_type="latent", **arguments).frames


def keep_latents(into):
    return lambda _pipe, _step, _t, tensors: into.append(tensors["latents"]) or tensors


def start_from(first):
    """A callback that puts other latents in place of those after the first step."""
    return lambda _pipe, step, _t, tensors: {"latents": first} if step == 0 else tensors


STOCHASTIC = {
    "EulerAncestralDiscreteScheduler": ({}, {}),
    "DPMSolverMultistepScheduler": ({"algorithm_type": "sde-dpmsolver++"}, {}),
    "LCMScheduler": ({}, {}),
    "DDIMScheduler": ({}, {"eta": 1.0}),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_within_steps_is_that_of_each_videos_generator(pipe, name):
    settings, arguments = STOCHASTIC[name]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    torch.manual_seed(1)
    both = latents(pipe, 1, 2, num_videos_per_prompt=2, **arguments)
    torch.manual_seed(2)
    torch.testing.assert_close(latents(pipe, 2, **arguments)[0], both[1], atol=1e-4, rtol=1e-4)


def test_videos_that_share_a_generator_draw_from_it_in_turn(pipe):
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    one, _ = latents(pipe, generator=torch.Generator().manual_seed(1), num_videos_per_prompt=2)
    again, other = latents(pipe, generator=torch.Generator().manual_seed(1), num_videos_per_prompt=2)
    assert torch.equal(one, again)
    assert (again - other).abs().max() > 0.1


def test_brownian_paths_take_a_seed_of_each_generator(pipe, monkeypatch):
    """DPMSolverSDEScheduler's seeds are what the loop gives it; it draws its paths with torchsde, here with a stub."""
    seeds = []

    def draw_path(size, entropy, **_):
        seeds.append(entropy)
        generator = torch.Generator().manual_seed(entropy)
        return lambda _start, _stop: torch.randn(size, generator=generator)

    name = "diffusers.schedulers.scheduling_dpmsolver_sde"
    monkeypatch.setitem(sys.modules, "torchsde", SimpleNamespace(BrownianInterval=draw_path))
    monkeypatch.setitem(sys.modules, name, None)  # afterwards it is as if never imported
    del sys.modules[name]
    sde = importlib.import_module(name)
    pipe.scheduler = sde.DPMSolverSDEScheduler.from_config(pipe.scheduler.config)
    both = latents(pipe, 1, 2, num_videos_per_prompt=2)
    torch.testing.assert_close(latents(pipe, 2)[0], both[1], atol=1e-4, rtol=1e-4)
    assert len(seeds) == 3
    assert seeds[0] != seeds[1] == seeds[2]


def test_given_latents_are_scaled_as_drawn_ones_are(pipe):
    """By the scale of the call's own timesteps, which `set_timesteps` changes for leading spacing."""
    pipe.scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading")
    noise = torch.randn(1, 4, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    drawn = latents(pipe, 1)
    assert torch.equal(latents(pipe, 1, latents=noise), drawn)
    assert torch.equal(latents(pipe, 1), drawn), "a second call"


def test_an_interrupted_call_ends_with_the_latents_it_has(pipe):
    steps, kept = [], []

    def stop(pipeline, step, t, tensors):
        steps.append(step)
        kept.append(tensors["latents"])
        pipeline._interrupt = True

    assert torch.equal(latents(pipe, 1, num_inference_steps=5, callback_on_step_end=stop), kept[0])
    assert steps == [0]
    assert pipe.num_timesteps == 5
    assert not torch.equal(latents(pipe, 1, num_inference_steps=5), kept[0]), "the next call runs through"


@pytest.mark.parametrize("several", [False, True])
def test_diffusers_own_cutoff_turns_guidance_off(pipe, several):
    """By its ratio of `num_timesteps`; two videos of one prompt share the row that it leaves."""
    first = []
    latents(pipe, 1, 2, num_videos_per_prompt=2, callback_on_step_end=keep_latents(first))
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.0)
    cutoff = MultiPipelineCallbacks([cutoff]) if several else cutoff
    found = latents(pipe, 1, 2, num_videos_per_prompt=2, callback_on_step_end=cutoff)
    off = {"num_videos_per_prompt": 2, "callback_on_step_end": start_from(first[0])}
    assert torch.equal(found, latents(pipe, 1, 2, guidance_scale=1.0, **off))
    assert not torch.equal(found, latents(pipe, 1, 2, **off))


@pytest.mark.parametrize(("changed", "camera_free_scale"), [("prompt_embeds", 1.5), ("negative_prompt_embeds", None)])
def test_returned_embeddings_are_used(pipe, changed, camera_free_scale):
    """Camera-free guidance evaluates its texts in another order; the negative rows come first all the same."""
    other = pipe.encode_prompt(["a blue star"])
    common = {"trajectories": camera_preset("pan-left", (32, 32), 2), "camera_free_scale": camera_free_scale}

    def replace_text(pipeline, step, t, tensors):
        if changed == "prompt_embeds":
            tensors["prompt_embeds"] = torch.cat([tensors["prompt_embeds"][:1], other])
        else:
            tensors["negative_prompt_embeds"] = other
        return tensors

    first = []
    latents(pipe, 1, callback_on_step_end=keep_latents(first), **common)
    names = {"callback_on_step_end_tensor_inputs": [changed]}
    found = latents(pipe, 1, callback_on_step_end=replace_text, **names, **common)
    text = {changed.removesuffix("_embeds"): "a blue star"}
    expected = latents(pipe, 1, callback_on_step_end=start_from(first[0]), **{**common, **text})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("returns", [True, False])
def test_embeddings_changed_in_place_are_used_and_the_callers_stay(pipe, guidance_scale, returns):
    """Without guidance too, where one text alone is evaluated."""
    ours, other = pipe.encode_prompt(["a red circle"]), pipe.encode_prompt(["a blue star"])
    before, first = ours.clone(), []

    def change(pipeline, step, t, tensors):
        tensors["prompt_embeds"][-1:] = other
        return tensors if returns else {}

    common = {"guidance_scale": guidance_scale}
    given = {**common, "prompt": "", "prompt_embeds": ours}
    latents(pipe, 1, callback_on_step_end=keep_latents(first), **given)
    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    found = latents(pipe, 1, callback_on_step_end=change, **names, **given)
    expected = latents(pipe, 1, callback_on_step_end=start_from(first[0]), prompt="a blue star", **common)
    torch.testing.assert_close(found, expected)
    assert torch.equal(ours, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latent"]}, "got latent$"),
        ({"callback_on_step_end": SDXLCFGCutoffCallback()}, "got add_text_embeds, add_time_ids"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, r"latents must be \(2, 4, 2, 16, 16\)"),
        ({"callback_on_step_end": SDCFGCutoffCallback(0.0)}, r"prompt_embeds must be \(2, .* got \(1, "),
    ],
)
def test_what_does_not_fit_is_refused(pipe, arguments, message):
    """One row for two different prompts is the last: diffusers fails there too, inside the UNet."""
    with pytest.raises(ValueError, match=message):
        latents(pipe, 1, 2, prompt=["a red circle", "a blue star"], **arguments)
