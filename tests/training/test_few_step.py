"""The stage `few_step`: its loss by diffusers' own schedulers and the sampler's guidance, and a run that learns."""

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import TINY_WORLD
from diffusers import DDIMScheduler
from PIL import Image

from imageconductor.checkpoints.few_step import few_step_scheduler, find_few_step_lora
from imageconductor.commands import assemble, sample
from imageconductor.diffusion.clean_estimate import prediction_of_x_0
from imageconductor.diffusion.losses import pseudo_huber_loss
from imageconductor.evaluation.boxes.config import BoxEvaluateConfig, BoxMethod
from imageconductor.evaluation.boxes.protocol import BoxEvaluation
from imageconductor.evaluation.drawn_motion import protocol
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method, Task
from imageconductor.evaluation.drawn_motion.protocol import Evaluation
from imageconductor.evaluation.learned_motion.config import (
    LearnedMethod,
    LearnedMotion,
    LearnedMotionConfig,
    VideoRequest,
)
from imageconductor.evaluation.learned_motion.protocol import LearnedMotionEvaluation
from imageconductor.models.adapters import active
from imageconductor.sampling.branches import Control, GuidedDenoiser, plan
from imageconductor.sampling.job import SampleJob, load_pipeline, prepare, render
from imageconductor.sampling.job_files import change_job
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.training.run import run_stage
from imageconductor.training.stage_configs import FewStepConfig

NEWEST = 999  # the last of the grid's timesteps, the one before it, and the end of their segment
EARLIER = 974
END = 749


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
def test_the_loss_is_between_ends_of_a_segment_with_and_without_a_guided_step(
    control, settings, scales, configure, filled
):
    stage, data = filled(configure("few_step", controls=[control], **settings))
    x_0, condition = stage.encode(data[0], generators())
    eps, t = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor(NEWEST)
    x_t = stage.scheduler.add_noise(x_0, eps, t[None])
    with torch.no_grad():
        guided = guided_by_the_sampler(stage, x_t, t, condition, control, scales)
        ddim = DDIMScheduler.from_config(stage.scheduler.config)
        ddim.num_inference_steps = 40
        x_s = ddim.step(guided, NEWEST, x_t).prev_sample
        with active(stage.motion_controlnet, *stage.acting):
            before = stage.denoiser(x_t, t, condition)
            after = stage.denoiser(x_s, torch.tensor(EARLIER), condition)
    # No number of steps goes from EARLIER to END.
    clean, alpha = ddim.step(after, EARLIER, x_s).pred_original_sample, ddim.alphas_cumprod[EARLIER]
    at_end = ddim.add_noise(clean, (x_s - alpha**0.5 * clean) / (1 - alpha) ** 0.5, torch.tensor([END]))
    ddim.num_inference_steps = 4  # from NEWEST to END; x_0 acts linearly
    ends = [
        ddim.step(
            prediction_of_x_0(x, x_t, float(ddim.alphas_cumprod[NEWEST]), "v_prediction"), NEWEST, x_t
        ).prev_sample
        for x in (torch.zeros_like(x_t), torch.ones_like(x_t))
    ]
    difference = ddim.step(before, NEWEST, x_t).pred_original_sample - (at_end - ends[0]) / (ends[1] - ends[0])
    c = stage.huber_width
    expected = ((difference**2 + c**2).sqrt() - c).mean()
    found = stage.loss_terms(x_0, torch.tensor([991]), eps, condition)  # 991 stands for 999 on the grid
    torch.testing.assert_close(found, {"consistency": expected}, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("t", [24, 774])
def test_one_step_above_the_end_the_guided_model_itself_is_the_target(t, configure, filled):
    stage, data = filled(configure("few_step", controls=["camera"]))
    x_0, condition = stage.encode(data[0], generators())
    eps, time = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor(t)
    x_t = stage.scheduler.add_noise(x_0, eps, time[None])
    with torch.no_grad(), active(stage.motion_controlnet, *stage.acting):
        guided = guided_by_the_sampler(stage, x_t, time, condition, "camera", (3.0, None, 1.0))
        without = stage.denoiser(x_t, time, condition)
    clean = [stage._clean(x_t, time[None], prediction) for prediction in (without, guided)]
    expected = pseudo_huber_loss(*clean, stage.huber_width)
    found = stage.loss_terms(x_0, time[None], eps, condition)
    torch.testing.assert_close(found, {"consistency": expected}, atol=1e-5, rtol=1e-3)


def test_the_grid_is_that_of_the_sampler_whose_steps_are_the_segments(configure, build):
    stage, _ = build(configure("few_step"))
    t, earlier, end = stage._on_grid(torch.arange(1000))
    stage.sampler.set_timesteps(40)
    assert sorted(set(t.tolist()), reverse=True) == stage.sampler.timesteps.tolist()
    assert (t - earlier == 25).all()
    stage.sampler.set_timesteps(4)
    starts = stage.sampler.timesteps.tolist()
    assert [end[start].item() for start in starts] == [*starts[1:], -1]
    assert (end <= earlier).all()


@pytest.mark.parametrize(("stated", "guidance"), [({}, 1.0), ({"preview_guidance_scale": 2.0}, 2.0)])
def test_previews_have_the_guidance_that_is_stated_or_none(stated, guidance, configure):
    made = []
    run_stage(configure("few_step", max_steps=1, preview_every=2, **stated), lambda *given: made.append(given[-1]))
    assert made == [{"num_inference_steps": 4, "guidance_scale": guidance, "trajectory_guidance_scale": 1.0}]


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
    made = put_together(folder / "model", model=tiny_model, few_step_lora=folder / "run" / "few_step_lora")
    written = made / "scheduler" / "scheduler_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"timestep_spacing": "leading"}))
    return made


def test_its_sampler_goes_from_the_noisiest_timestep_to_the_clean_latents():
    published = {"num_train_timesteps": 1000, "beta_schedule": "linear", "steps_offset": 1, "clip_sample": False}
    usual = DDIMScheduler(timestep_spacing="leading", set_alpha_to_one=False, **published)
    sampler = few_step_scheduler(usual)
    assert sampler.alphas_cumprod.tolist() == usual.alphas_cumprod.tolist()
    sampler.set_timesteps(4)
    assert sampler.timesteps.tolist() == [999, 749, 499, 249]
    x_0, eps = torch.randn(2, 1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t = sampler.add_noise(x_0, eps, sampler.timesteps[:1])
    for t in sampler.timesteps:
        x_t = sampler.step(eps, t, x_t).prev_sample
    torch.testing.assert_close(x_t, x_0, atol=1e-4, rtol=0)


def test_few_steps_take_the_lora_and_its_sampler_without_guidance(model, tiny_model, tmp_path):
    job = SampleJob(prompt="a star", model=str(model), device="cpu")
    chosen = prepare(job).job  # three steps are the model's default
    assert (chosen.few_step, chosen.steps, chosen.guidance_scale) == (True, 3, 1.0)
    pipe = load_pipeline(chosen)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert not pipe.get_list_adapters(), "folded into the weights"
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    asked = prepare(SampleJob(prompt="a star", model=str(model), device="cpu", few_step=True, guidance_scale=2.0)).job
    assert asked.guidance_scale == 2.0
    many = prepare(SampleJob(prompt="a star", model=str(model), device="cpu", steps=9)).job
    assert (many.few_step, many.guidance_scale) == (False, 3.0)
    assert not prepare(SampleJob(prompt="a star", model=str(tiny_model), device="cpu")).job.few_step
    with pytest.raises(FileNotFoundError, match="no few-step LoRA"):
        prepare(SampleJob(prompt="a star", model=str(tiny_model), device="cpu", few_step=True))


@pytest.mark.parametrize(
    ("recorded", "changes", "expected"),
    [  # The model's defaults are 3 steps and a guidance of 3.
        ({}, {"steps": 9}, (False, 9, 3.0)),
        ({}, {"steps": 2}, (True, 2, 1.0)),
        ({}, {"steps": 9, "guidance_scale": 5.0}, (False, 9, 5.0)),
        ({"steps": 9}, {"steps": 4}, (True, 4, 1.0)),
        ({"steps": 9, "guidance_scale": 5.0}, {"steps": 12}, (False, 12, 5.0)),
        ({"guidance_scale": 2.0}, {"steps": 8}, (True, 8, 2.0)),
        ({"guidance_scale": 2.0}, {"steps": 9}, (False, 9, 2.0)),  # a visitor's own
        ({"steps": 9, "guidance_scale": 5.0}, {"few_step": True}, (True, 3, 5.0)),
        ({"steps": 9, "few_step": True}, {"steps": 12}, (True, 12, 1.0)),
        ({"few_step": False}, {"steps": 2}, (False, 2, 3.0)),
        ({}, {"few_step": False}, (False, 3, 3.0)),
        ({}, {"seed": [4]}, (True, 3, 1.0)),
    ],
)
def test_a_record_with_other_steps_takes_the_guidance_that_goes_with_them(model, recorded, changes, expected):
    record = prepare(SampleJob(prompt="a star", model=str(model), device="cpu", **recorded)).job
    job = prepare(change_job(record, changes)).job
    assert (job.few_step, job.steps, job.guidance_scale) == expected


def test_a_pipeline_with_it_in_its_weights_is_not_saved(model, tmp_path):
    pipe = load_pipeline(prepare(SampleJob(prompt="a star", model=str(model), device="cpu")).job)
    with pytest.raises(ValueError, match=r"loaded for a job, whose LoRAs \(style0\) are in its weights"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    load_pipeline(prepare(SampleJob(prompt="a star", model=str(model), steps=9, device="cpu")).job).save_pretrained(
        tmp_path / "saved"
    )


@pytest.mark.slow
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
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    given = {"image": image, "prompt": "a star", "seed": 7, "guidance_scale": 1.0, "output_type": "np"}
    assert np.allclose(ours(**given).frames, theirs(**given).frames, atol=1e-5)


@pytest.mark.slow
def test_an_evaluation_has_lines_with_and_without_it(model, tmp_path, monkeypatch):
    lines = {"teacher": Method(str(model)), "two": Method(str(model), few_step=True, num_inference_steps=2)}
    lines["default"] = Method(str(model), few_step=True)
    lines["own"] = Method(str(model), few_step=True, guidance_scale=2.5)
    tasks, of_the_teacher = {"camera": Task("camera", "camera")}, {"num_inference_steps": 5, "guidance_scale": 8.5}
    config = EvaluateConfig(methods=lines, tasks=tasks, num_scenes=1, device="cpu", **of_the_teacher)
    made = []
    monkeypatch.setattr(
        protocol, "render", lambda pipe, inputs: made.append((pipe, inputs[0].job)) or render(pipe, inputs)
    )
    config.camera_presets = ["pan-left"]
    Evaluation(config, tmp_path / "out").run()
    (pipe, teacher), (_, two), (few, default), (_, own) = made
    assert (teacher.few_step, teacher.steps, teacher.guidance_scale) == (False, 5, 8.5)
    assert (two.steps, two.guidance_scale, two.trajectory_guidance_scale) == (2, 1.0, 1.0)
    assert (default.steps, default.guidance_scale, default.trajectory_guidance_scale) == (3, 1.0, 1.0)
    assert (own.steps, own.guidance_scale) == (3, 2.5)
    assert few.scheduler.config.timestep_spacing == "trailing"
    assert pipe.scheduler.config.timestep_spacing == "leading"
    for name in lines:
        made_with = json.loads((tmp_path / "out" / "videos" / name / "made_with.json").read_text())
        assert any("few_step_lora" in path for path in made_with["weights"]) == (name != "teacher")
        assert made_with["guidance_scale"] == (8.5 if name == "teacher" else None), "another teacher's changes no other"
        assert made_with["method"].get("guidance_scale") == (2.5 if name == "own" else None)


def test_evaluations_whose_methods_do_not_name_it_leave_it_out(model):
    folder = str(model)
    boxes = BoxEvaluateConfig(methods={"a": BoxMethod()}, model=folder, dataset="sprites", num_inference_steps=2)
    asked = SimpleNamespace(config=boxes, device="cpu")
    of_boxes = BoxEvaluation._prepare(cast(Any, asked), "a")
    motions = LearnedMotionConfig(
        methods={"a": LearnedMethod()}, motions={"m": LearnedMotion(["c"], prompts=["a star"])}, model=folder
    )
    asked = SimpleNamespace(config=motions, device="cpu", requests={"m": [VideoRequest("m", "a star", 0)]})
    learned = LearnedMotionEvaluation._prepare(cast(Any, asked), "a", "m").job
    for job in (of_boxes, learned):
        assert (job.few_step, job.guidance_scale) == (False, 3.0)


def test_a_lora_of_another_model_is_not_carried_along(model, tmp_path):
    same = put_together(tmp_path / "same", model=model)
    assert find_few_step_lora(same) is not None
    other = put_together(tmp_path / "other", model=model, camera_lora=model / "camera_lora")
    assert find_few_step_lora(other) is None


@pytest.mark.slow
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


@pytest.mark.parametrize("segments", [0, 3])
def test_segments_that_end_between_steps_are_refused(segments):
    with pytest.raises(ValueError, match=f"segments must divide the solver_steps, 40, .* got {segments}"):
        FewStepConfig(segments=segments)
