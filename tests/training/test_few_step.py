"""The stage `few_step`: its loss by diffusers' own schedulers and the sampler's guidance, and a run that learns."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_WORLD
from diffusers import DDIMScheduler, LCMScheduler
from PIL import Image

from imageconductor.checkpoints.few_step import find_few_step_lora
from imageconductor.commands import assemble, sample
from imageconductor.evaluation import protocol
from imageconductor.evaluation.evaluate_config import EvaluateConfig, Method, Task
from imageconductor.evaluation.protocol import Evaluation
from imageconductor.models.adapters import active
from imageconductor.sampling.branches import Control, GuidedDenoiser, plan
from imageconductor.sampling.job import SampleJob, load_pipeline, prepare, render
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.training.run import run_stage
from imageconductor.training.stage_configs import FewStepConfig

NEWEST = 999  # the last of the grid's timesteps, and the one before it
EARLIER = 979


def generators():
    return [torch.Generator().manual_seed(1)]


@pytest.fixture
def filled(build):
    """Builds a stage whose LoRA does something."""

    def make(config):
        stage, data = build(config)
        generator = torch.Generator().manual_seed(2)
        for parameter in stage.trainable()["few_step"].parameters.values():
            parameter.data.normal_(0, 0.05, generator=generator)
        return stage, data

    return make


def guided_by_the_sampler(stage, x_t, t, condition, control, scales):
    """What sampling would predict without the LoRA."""
    negative = stage.encode_text({"caption": [stage.negative_prompt]}, [False])
    texts = {"prompt": condition, "uncond": type(condition)(**{**vars(condition), "text": negative})}
    branches = plan(Control(control), *scales)
    with active(stage.unet):
        return GuidedDenoiser(stage.denoiser, branches, texts)(x_t, t)


@pytest.mark.parametrize(
    ("control", "settings", "scales"),
    [
        ("camera", {"guidance_scale": 3.0}, (3.0, None, 1.0)),
        ("object", {"guidance_scale": 3.0, "camera_free_scale": 1.5}, (3.0, 1.5, 1.0)),
        ("mixed", {"guidance_scale": 1.0, "trajectory_guidance_scale": 2.0}, (1.0, None, 2.0)),
        ("object", {"guidance_scale": 1.0, "camera_free_scale": 0.5}, (1.0, 0.5, 1.0)),
        ("base", {}, (3.0, None, 1.0)),  # the model's defaults
    ],
)
def test_the_loss_is_between_estimates_before_and_after_a_guided_step(control, settings, scales, configure, filled):
    stage, data = filled(configure("few_step", controls=[control], **settings))
    x_0, condition = stage.encode(data[0], generators())
    eps, t = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor(NEWEST)
    x_t = stage.scheduler.add_noise(x_0, eps, t[None])
    with torch.no_grad():
        guided = guided_by_the_sampler(stage, x_t, t, condition, control, scales)
        ddim = DDIMScheduler.from_config(stage.scheduler.config)
        ddim.num_inference_steps = 50
        x_s = ddim.step(guided, NEWEST, x_t).prev_sample
        lcm = LCMScheduler.from_config(stage.scheduler.config)
        with active(stage.motion_controlnet, *stage.acting):
            before = stage.denoiser(x_t, t, condition)
            after = stage.denoiser(x_s, torch.tensor(EARLIER), condition)
        lcm.set_timesteps(timesteps=[NEWEST, EARLIER])
        estimates = [lcm.step(before, NEWEST, x_t).denoised, lcm.step(after, EARLIER, x_s).denoised]
    c = stage.huber_width
    expected = (((estimates[0] - estimates[1]) ** 2 + c**2).sqrt() - c).mean()
    found = stage.loss_terms(x_0, torch.tensor([991]), eps, condition)  # 991 stands for 999 on the grid
    torch.testing.assert_close(found, {"consistency": expected}, atol=1e-5, rtol=1e-4)


def test_the_grid_is_that_of_the_sampler_and_ends_at_the_clean_latents(configure, build):
    stage, _ = build(configure("few_step"))
    t, earlier = stage._on_grid(torch.arange(1000))
    lcm = LCMScheduler.from_config(stage.scheduler.config)
    lcm.set_timesteps(50)
    assert sorted(set(t.tolist()), reverse=True) == lcm.timesteps.tolist()
    assert (earlier[:20] == 0).all()
    assert (t[20:] - earlier[20:] == 20).all()
    x = torch.randn(1, 4, 2, 4, 4)
    torch.testing.assert_close(stage._estimate(x, torch.tensor([0]), torch.randn_like(x)), x)


def test_a_clip_draws_the_control(configure, build):
    stage, data = build(configure("few_step", controls=["camera", "object", "base"]))
    drawn = []
    for seed in range(12):
        stage.encode(data[0], [torch.Generator().manual_seed(seed)])
        drawn.append(stage._control)
    assert set(drawn) == {"camera", "object", "base"}


def put_together(output, **parts):
    """Assembles a model folder of a trained model's parts."""
    parts = dict.fromkeys(("motion_controlnet", "camera_lora", "object_lora"), "null") | parts
    named = [f"{name}={value}" for name, value in parts.items()]
    recipe = ["--config", "configs/model/trained.yaml", "dtype=float32", *named, "--output", str(output)]
    assert assemble.main(recipe) == 0
    return output


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """The tiny model with a few-step LoRA of a short run."""
    folder = tmp_path_factory.mktemp("few")
    settings = {"model": str(tiny_model), "output": str(folder / "run"), "lora_rank": 4, "world": TINY_WORLD}
    run_stage(FewStepConfig(max_steps=3, batch_size=1, learning_rate=1e-2, log_every=1, **settings))
    return put_together(folder / "model", model=tiny_model, few_step_lora=folder / "run" / "few_step_lora")


def test_few_steps_take_the_lora_and_its_sampler_without_guidance(model, tiny_model, tmp_path):
    job = SampleJob(prompt="a star", model=str(model), device="cpu")
    chosen = prepare(job).job  # three steps are the model's default
    assert (chosen.few_step, chosen.steps, chosen.guidance_scale) == (True, 3, 1.0)
    pipe = load_pipeline(chosen)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    asked = prepare(SampleJob(prompt="a star", model=str(model), device="cpu", few_step=True, guidance_scale=2.0)).job
    assert asked.guidance_scale == 2.0
    many = prepare(SampleJob(prompt="a star", model=str(model), device="cpu", steps=9)).job
    assert (many.few_step, many.guidance_scale) == (False, 3.0)
    assert not prepare(SampleJob(prompt="a star", model=str(tiny_model), device="cpu")).job.few_step
    with pytest.raises(FileNotFoundError, match="no few-step LoRA"):
        prepare(SampleJob(prompt="a star", model=str(tiny_model), device="cpu", few_step=True))


def test_the_command_makes_what_diffusers_own_loader_makes_of_the_file(model, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    image.save(tmp_path / "image.png")
    common = ["--model", str(model), "--image", str(tmp_path / "image.png"), "--prompt", "a star", "--device", "cpu"]
    assert sample.main([*common, "--seed", "7", "--output", str(tmp_path / "few")]) == 0
    assert "few_step: true" in (tmp_path / "few" / "run.yaml").read_text()
    assert sample.main([*common, "--seed", "7", "--no-few-step", "--output", str(tmp_path / "many")]) == 0
    read = [(tmp_path / name / "video-7.mp4").read_bytes() for name in ("few", "many")]
    assert read[0] != read[1]
    # What a run with the LoRA records of steps and guidance gives way to the model's own, and back.
    again = ["--config", str(tmp_path / "few" / "run.yaml"), "--no-few-step", "--output", str(tmp_path / "back")]
    assert sample.main(again) == 0
    assert (tmp_path / "back" / "video-7.mp4").read_bytes() == read[1]
    again = ["--config", str(tmp_path / "many" / "run.yaml"), "--few-step", "--output", str(tmp_path / "forth")]
    assert sample.main(again) == 0
    assert (tmp_path / "forth" / "video-7.mp4").read_bytes() == read[0]
    inputs = prepare(SampleJob(image=str(tmp_path / "image.png"), prompt="a star", model=str(model), device="cpu"))
    ours = load_pipeline(inputs.job)
    theirs = ImageConductorPipeline.from_pretrained(model)
    theirs.load_lora_weights(str(find_few_step_lora(model).parent))
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    given = {"image": image, "prompt": "a star", "seed": 7, "guidance_scale": 1.0, "output_type": "np"}
    assert np.allclose(ours(**given).frames, theirs(**given).frames, atol=1e-5)


def test_an_evaluation_has_lines_with_and_without_it(model, tmp_path, monkeypatch):
    lines = {"teacher": Method(str(model)), "two": Method(str(model), few_step=True, num_inference_steps=2)}
    lines["default"] = Method(str(model), few_step=True)
    config = EvaluateConfig(methods=lines, tasks={"camera": Task("camera", "camera")}, num_scenes=1, device="cpu")
    made = []
    monkeypatch.setattr(
        protocol, "render", lambda pipe, inputs: made.append((pipe, inputs[0].job)) or render(pipe, inputs)
    )
    config.camera_presets = ["pan-left"]
    Evaluation(config, tmp_path / "out").run()
    (pipe, teacher), (_, two), (few, default) = made
    assert (teacher.few_step, two.steps, default.steps) == (False, 2, 4)
    assert (two.guidance_scale, default.trajectory_guidance_scale) == (1.0, 1.0)
    assert isinstance(few.scheduler, LCMScheduler)
    assert not isinstance(pipe.scheduler, LCMScheduler)
    for name in lines:
        made_with = json.loads((tmp_path / "out" / "videos" / name / "made_with.json").read_text())
        assert any("few_step_lora" in path for path in made_with["weights"]) == (name != "teacher")


def test_a_lora_of_another_model_is_not_carried_along(model, tmp_path):
    same = put_together(tmp_path / "same", model=model)
    assert find_few_step_lora(same) is not None
    other = put_together(tmp_path / "other", model=model, camera_lora=model / "camera_lora")
    assert find_few_step_lora(other) is None


def test_its_gradient_brings_the_estimates_of_a_clip_together(configure, build):
    stage, data = build(configure("few_step", controls=["camera"], lora_rank=8))
    x_0, condition = stage.encode(data[0], generators())
    eps, t = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    optimizer = torch.optim.Adam(stage.trainable()["few_step"].parameters.values(), 1e-3)
    losses = []
    for _ in range(12):
        loss = stage.loss_terms(x_0, t, eps, condition)["consistency"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("steps", [1, 30, 2000])
def test_a_grid_that_leaves_out_the_noisiest_timestep_is_refused(steps):
    with pytest.raises(ValueError, match=f"solver_steps must divide .* got {steps}"):
        FewStepConfig(solver_steps=steps)
