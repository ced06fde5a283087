"""The loop: a run that was stopped is the run that was not, and what a run folder holds."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from imageconductor.data.clip_records import CorruptClipError
from imageconductor.sampling.preview import VideoPreview
from imageconductor.training import checkpointing, loop
from imageconductor.training.engines import build_engine
from imageconductor.training.loop import train
from imageconductor.training.optimizers import build_optimizer
from imageconductor.training.run import run_stage
from imageconductor.training.stage_configs import load_config
from imageconductor.training.stages.base import ParameterGroup
from imageconductor.training.stages.image_conductor import ObjectLoraStage
from imageconductor.training.train_config import LrSchedule

NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"ema_decay": 0.9},
        {"gradient_accumulation_steps": 2, "lr_schedule": "cosine"},
        pytest.param({"optimizer": "muon", "weight_decay": 0.1}, marks=NEEDS_MUON),
    ],
)
def test_two_and_two_steps_are_four(configure, build, tmp_path, extra):
    config = configure("motion_controlnet", max_steps=4, warmup_steps=2, **extra)
    whole, data = build(config)
    train(whole, data, config)

    parts = replace(config, output=str(tmp_path / "parts"))
    shutil.copytree(config.output, parts.output)
    for step in (3, 4):  # as if the run had been killed after step 2
        shutil.rmtree(Path(parts.output) / f"checkpoint-{step:08d}")
    resumed, data = build(parts)
    train(resumed, data, parts)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    rates = {}
    for line in (Path(parts.output) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert rates.setdefault(record["step"], record["learning_rate"]) == record["learning_rate"]


@pytest.mark.parametrize("name", get_args(LrSchedule))
def test_every_schedule_needs_no_more_than_its_name(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=2)
    assert schedule.get_last_lr() == [1.0]


def test_an_average_that_a_run_takes_up_later_begins_at_its_weights(configure, build):
    config = configure("camera_lora", max_steps=2)
    train(*build(config), config)
    result = Path(config.output) / "camera_lora" / "adapter_model.safetensors"
    before, averaged = result.read_bytes(), replace(config, ema_decay=0.5)
    train(*build(averaged), averaged)
    assert result.read_bytes() == before
    further = replace(averaged, max_steps=3)
    train(*build(further), further)
    old, new = (checkpointing.load(Path(config.output), step).tensors for step in (2, 3))
    for key, average in new["ema"].items():
        torch.testing.assert_close(average, (old["parameters"][key] + new["parameters"][key]) / 2)


def test_a_run_whose_time_is_over_stops_with_its_result_and_goes_on(configure, build, tmp_path, monkeypatch):
    config = configure("camera_lora", max_steps=4, save_every=100, ema_decay=0.5)
    whole, data = build(config)
    train(whole, data, config)

    minutes = iter(range(100))
    monkeypatch.setattr("imageconductor.training.stopping.time.monotonic", lambda: 60 * next(minutes))
    parts = replace(config, output=str(tmp_path / "parts"), max_minutes=3)
    stopped, data = build(parts)
    assert train(stopped, data, parts).step == 2
    assert [path.name for path in Path(parts.output).glob("checkpoint-*")] == ["checkpoint-00000002"]
    assert load_config(Path(parts.output) / "config.yaml").max_minutes is None  # it was for that start
    saved = load_file(Path(parts.output) / "camera_lora" / "adapter_model.safetensors")
    average = load_file(Path(parts.output) / "checkpoint-00000002" / "ema.safetensors")
    assert {tuple(value.shape) for value in saved.values()} == {tuple(value.shape) for value in average.values()}
    assert sum(value.double().sum() for value in saved.values()) == sum(v.double().sum() for v in average.values())

    resumed, data = build(parts)
    assert train(resumed, data, replace(parts, max_minutes=None)).step == 4
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_continued_run_learns_at_the_rate_that_it_is_given(configure, build, parameters):
    config = configure("camera_lora")
    first, data = build(config)
    train(first, data, config)
    still = replace(config, max_steps=3, learning_rate=1e-30)
    second, data = build(still)
    train(second, data, still)
    for key, value in parameters(first).items():
        assert torch.equal(value, parameters(second)[key]), key


def test_two_batches_of_one_are_a_batch_of_two(configure, build, losses, tmp_path):
    whole = configure("motion_controlnet", batch_size=2, max_steps=3, sets=["mixed", "camera"])
    halves = replace(whole, batch_size=1, gradient_accumulation_steps=2, output=str(tmp_path / "halves"))
    for config in (whole, halves):
        train(*build(config), config)
    torch.testing.assert_close(
        torch.tensor(losses(whole.output)), torch.tensor(losses(halves.output)), atol=1e-5, rtol=1e-5
    )


class TwoPaths(ObjectLoraStage):
    """The object LoRA in two groups: its down projections stand still, its up projections learn."""

    def trainable(self):
        (group,) = super().trainable().values()
        split = {side: {n: p for n, p in group.parameters.items() if f".lora_{side}." in n} for side in "AB"}
        return {
            "down": ParameterGroup(split["A"], learning_rate=0.0),
            "up": ParameterGroup(split["B"], learning_rate=2e-2, weight_decay=0.5),
        }


def test_groups_have_their_own_learning_rate_and_decay_and_are_clipped_one_by_one(
    configure, build, parameters, monkeypatch
):
    config = configure("object_lora", learning_rate=1e-2, max_grad_norm=1e-3)
    stage, data = build(config)
    stage.__class__ = TwoPaths
    before = {name: p.detach().clone() for name, p in parameters(stage).items()}
    lengths = []
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_measure(group, norm):
        found = clip(group, norm)
        lengths.append((float(found), float(torch.stack([p.grad.norm() for p in group]).norm())))
        return found

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_measure)
    train(stage, data, config)
    assert len(lengths) == 2 * config.max_steps
    assert any(found > 1e-3 for found, _ in lengths)
    assert [left for _, left in lengths] == pytest.approx([min(found, 1e-3) for found, _ in lengths], rel=1e-3)
    for name, value in parameters(stage).items():
        assert torch.equal(value, before[name]) == (".lora_A." in name), name
    saved = checkpointing.latest(Path(config.output))
    groups = saved.optimizer["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.5]
    assert [group["lr"] for group in groups] == [0.0, 2e-2]
    more = replace(config, max_steps=3)
    resumed, data = build(more)
    resumed.__class__ = TwoPaths
    train(resumed, data, more)  # goes on from there


def test_a_parameter_in_two_groups_is_refused(configure, build):
    config = configure("camera_lora")
    stage, _ = build(config)
    (group,) = stage.trainable().values()
    stage.trainable = lambda: {"one": group, "two": group}
    with pytest.raises(ValueError, match="a parameter in two of its groups one, two"):
        build_engine(config).take(stage)
    stage.trainable = lambda: {}
    with pytest.raises(ValueError, match=r"motion_controlnet\..* in none of its groups"):
        build_engine(config).take(stage)


def test_an_optimiser_knows_its_groups(configure, build):
    config = configure("camera_lora", learning_rate=3e-4, weight_decay=0.1)
    (group,) = build(config)[0].trainable().values()
    optimizer = build_optimizer([group], config, torch.device("cpu"))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(3e-4, 0.1)]


@pytest.mark.slow
def test_compiled_stages_learn_the_same(configure, build, losses, parameters, tmp_path, monkeypatch):
    """By all of the compiler but its code generator, which takes minutes on a CPU; the GPU report has that."""
    compile_module, calls = torch.nn.Module.compile, []

    def compile_without_code(module):
        calls.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_code)
    plain = configure("camera_lora")
    compiled = replace(plain, torch_compile=True, output=str(tmp_path / "compiled"))
    stages = []
    for config in (plain, compiled):
        stage, data = build(config)
        train(stage, data, config)
        stages.append(stage)
        assert calls == ([stage] if config.torch_compile else [])
    torch.compiler.reset()
    torch.testing.assert_close(
        torch.tensor(losses(plain.output)), torch.tensor(losses(compiled.output)), rtol=1e-4, atol=0
    )
    # Adam makes a whole step of a gradient that is zero but for rounding, whatever its sign.
    differences = torch.cat([(parameters(stages[1])[k] - v).flatten() for k, v in parameters(stages[0]).items()])
    assert (differences.abs() > 5e-3).float().mean() < 0.01


def test_half_precision_holds_what_does_not_learn_in_half(configure, build, losses, parameters):
    config = configure("camera_lora", mixed_precision="bf16")
    stage, data = build(config)
    train(stage, data, config)
    assert stage.unet.dtype == stage.vae.dtype == stage.image_controlnet.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in parameters(stage).values()} == {torch.float32}
    full = replace(config, mixed_precision="no", output=config.output + "-full")
    train(*build(full), full)
    for half, whole in zip(losses(config.output), losses(full.output), strict=True):
        assert half == pytest.approx(whole, rel=0.02)


def test_the_orthogonal_loss_is_not_rounded_by_half_precision(configure, build):
    """Eq. 4 is a small number between weights in float32; under bf16 autocast its product would be rounded."""
    stage, data = build(configure("object_lora"))
    x_0, condition = stage.encode(data[0], [torch.Generator().manual_seed(0)])
    arguments = (x_0, torch.tensor([500]), torch.randn_like(x_0), condition)
    plain = stage(*arguments)["orthogonal"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stage(*arguments)["orthogonal"], plain)


class Damaged:
    """Batches whose clip 0 always had to be replaced."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        return self.data[index] | {"skipped": [["bad: ends inside a file"] if index == 0 else []]}


def test_corrupt_clips_are_counted_and_too_many_stop_the_run(configure, build, caplog):
    config = configure("camera_lora")
    stage, data = build(config)
    train(stage, Damaged(data), config)
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    assert [line["corrupt_clips"] for line in lines] == [1, 1]
    assert "skipped a clip: bad: ends inside a file" in caplog.text
    strict = replace(config, max_corrupt_fraction=0.0, output=config.output + "-strict")
    with pytest.raises(CorruptClipError, match=r"1 of 1 clips cannot be read, more than max_corrupt_fraction=0\.0"):
        train(build(strict)[0], Damaged(data), strict)


class Slow(Damaged):
    """Batches that take 0.05 s to read."""

    def __getitem__(self, index):
        time.sleep(0.05)
        return self.data[index]


def test_the_time_in_which_a_step_waits_for_its_clips_is_logged(configure, build):
    config = configure("camera_lora", gradient_accumulation_steps=2)
    stage, data = build(config)
    state = train(stage, Slow(data), config)
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    assert all(0.1 <= line["loading_seconds"] <= line["seconds"] for line in lines)
    assert state.loading_s == pytest.approx(sum(line["loading_seconds"] for line in lines), abs=1e-3)


def test_what_a_run_folder_holds(configure):
    config = configure("camera_lora", preview_every=2, preview_steps=2, max_steps=3, ema_decay=0.5)
    run_stage(config, VideoPreview)
    folder = Path(config.output)
    assert {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")} == {
        ".lock",
        "camera_lora",
        "config.yaml",
        "environment.jsonl",
        "metrics.jsonl",
        "previews",
        "tensorboard",
    }
    assert {path.name for path in (folder / "previews").iterdir()} == {
        "step-00000002.png",
        *(f"step-00000002-{i}.mp4" for i in range(3)),
    }
    assert load_config(folder / "config.yaml") == config, "the file says its stage"
    environment = json.loads((folder / "environment.jsonl").read_text())
    assert environment["start"] == 0
    assert environment["torch"] == torch.__version__.partition("+")[0] or environment["torch"] == torch.__version__


@pytest.mark.slow
def test_previews_and_validation_change_nothing(configure, monkeypatch):
    monkeypatch.setattr("imageconductor.training.samples._SPRITE_CLIPS", 1)
    extra = {"preview_every": 2, "preview_steps": 2, "validation_every": 1}
    shown = configure("motion_controlnet", ema_decay=0.5, mixed_precision="bf16", **extra)
    hidden = replace(shown, preview_every=0, validation_every=0, output=shown.output + "-hidden")
    for config in (shown, hidden):
        run_stage(config, VideoPreview)
    saved = [load_file(next(Path(c.output).glob("motion_controlnet/*.safetensors"))) for c in (shown, hidden)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_a_preview_that_fails_costs_a_warning(configure, build, caplog):
    config = configure("camera_lora", preview_every=1, ema_decay=0.5)
    plain = replace(config, output=config.output + "-plain", preview_every=0)
    stages = []
    for given in (config, plain):
        stage, data = build(given)
        shown = []

        def fail(step, networks, shown=shown):
            shown.append(step)
            raise (RuntimeError("CUDA out of memory") if step == 1 else ImportError("cannot import name 'x'"))

        assert train(stage, data, given, fail).step == 2
        stages.append(stage)
        assert shown == ([1, 2] if given is config else [])
    assert "no preview of step 1: CUDA out of memory" in caplog.text
    assert "no preview of step 2: cannot import" in caplog.text
    torch.testing.assert_close(stages[0].state_dict(), stages[1].state_dict(), rtol=0, atol=0)


def test_a_preview_can_be_interrupted(configure, build):
    config = configure("camera_lora", preview_every=1)

    def interrupt(step, networks):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(*build(config), config, interrupt)


def test_another_stages_run_folder_is_refused(configure):
    run_stage(configure("camera_lora"))
    with pytest.raises(ValueError, match="choose another output"):
        run_stage(configure("object_lora"))


def test_a_loss_that_is_not_finite_stops_the_run(configure, build):
    config = configure("camera_lora")
    stage, data = build(config)
    stage.unet.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 0 .* clips: mixed-0-00000000"):
        train(stage, data, config)
    assert checkpointing.latest(Path(config.output)) is None


def test_losses_are_checked_once_a_step_before_weights_change(configure, build, parameters, monkeypatch):
    """Each check waits for the GPU, so that it comes after all micro-steps, whose clips it still tells apart."""
    config = configure("camera_lora", gradient_accumulation_steps=3)
    stage, data = build(config)
    loss_terms, checked, seen = stage.loss_terms, [], []
    check = loop._check_finite

    def spoil(*arguments):
        seen.append({name: p.detach().clone() for name, p in parameters(stage).items()})
        terms = loss_terms(*arguments)
        return {name: value * (torch.inf if len(seen) == 5 else 1) for name, value in terms.items()}  # step 1, second

    monkeypatch.setattr(stage, "loss_terms", spoil)
    monkeypatch.setattr(loop, "_check_finite", lambda *arguments: checked.append(len(seen)) or check(*arguments))
    with pytest.raises(FloatingPointError, match=r"^loss is inf at step 1 .* clips: mixed-0-00000004$"):
        train(stage, data, config)
    assert checked == [3, 6]
    weights = parameters(stage)
    assert all(torch.equal(weights[name], value) for name, value in seen[-1].items())
    assert checkpointing.latest(Path(config.output)).step == 1
