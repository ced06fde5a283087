"""Who learns, what is active, and that a run which was stopped is the run that was not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_WORLD
from safetensors.torch import load_file

from imageconductor import config as config_file
from imageconductor.checkpoints.personalise import load_style_lora
from imageconductor.data.batches import Batches
from imageconductor.data.clips import CorruptClipError
from imageconductor.models.adapters import Adapter, active, adapter_parameters
from imageconductor.models.networks import Networks
from imageconductor.sampling.pipeline import ImageConductorPipeline
from imageconductor.sampling.preview import VideoPreview
from imageconductor.training import checkpointing
from imageconductor.training.command import main
from imageconductor.training.loop import train
from imageconductor.training.run import run_stage, samples
from imageconductor.training.stages import STAGES
from imageconductor.training.train_config import StageName, TrainConfig

LEARNS = {
    StageName.FOUNDATION: ("text_encoder.", "unet.", "image_controlnet."),
    StageName.MOTION_CONTROLNET: ("motion_controlnet.",),
    StageName.CAMERA_LORA: (".camera.",),
    StageName.OBJECT_LORA: (".object.",),
    StageName.STYLE_LORA: (".lora_",),
}
NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")


@pytest.fixture
def settings(tiny_model, tmp_path):
    return TrainConfig(
        model=str(tiny_model),
        output=str(tmp_path / "run"),
        world=TINY_WORLD,
        max_steps=2,
        batch_size=1,
        learning_rate=1e-2,
        lora_rank=2,
        save_every=1,
        keep_checkpoints=5,
        log_every=1,
    )


def build(name, config):
    stage = STAGES[name](Networks.load(config.model), config)
    return stage, Batches(samples(config), config.batch_size)


def snapshot(stage):
    return {key: value.detach().clone() for key, value in stage.state_dict().items()}


@pytest.mark.parametrize("name", StageName)
def test_only_the_expected_parameters_change(name, settings):
    stage, data = build(name, settings)
    before = snapshot(stage)
    train(stage, data, settings)
    changed = {key for key, value in stage.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= set(stage.trainable())
    if name in (StageName.CAMERA_LORA, StageName.OBJECT_LORA, StageName.STYLE_LORA):
        assert all(LEARNS[name][0] in key for key in changed)
    else:
        assert all(key.startswith(LEARNS[name]) for key in changed)
    assert len(changed) > 0.8 * len(stage.trainable())


def test_a_style_lora_is_a_file_that_a_pipeline_takes(settings):
    run_stage(StageName.STYLE_LORA, settings)
    file = Path(settings.output) / "style_lora" / "pytorch_lora_weights.safetensors"
    names = {key.partition(".lora_")[0] for key in load_file(file)}
    assert all(".attn" in name and ".motion_modules." not in name for name in names)
    pipe = ImageConductorPipeline.from_pretrained(settings.model)
    load_style_lora(pipe, file, "ink")
    layer = sorted(names)[0].removeprefix("unet.")
    x = torch.randn(1, 3, pipe.unet.get_submodule(layer).in_features)
    acting = pipe.unet.get_submodule(layer)(x)
    pipe.unload_lora_weights()
    stage, _ = build(StageName.STYLE_LORA, settings)
    stage.load_state_dict(checkpointing.latest(Path(settings.output)).tensors["parameters"], strict=False)
    torch.testing.assert_close(acting, stage.unet.get_submodule(layer)(x), atol=2e-3, rtol=2e-3)
    assert (acting - pipe.unet.get_submodule(layer)(x)).abs().max() > 1e-3


def test_a_steered_foundation_learns_with_a_motion_controlnet_that_is_sometimes_absent(settings):
    config = replace(settings, train_motion_controlnet=True, motion_dropout=0.0, batch_size=2)
    stage, data = build(StageName.FOUNDATION, config)
    before = snapshot(stage)
    x_0, condition = stage.encode(data[0], [torch.Generator().manual_seed(i) for i in range(2)])
    t = torch.tensor([500, 500])
    half = replace(condition, flow=condition.flow * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1))
    plain, _ = build(StageName.FOUNDATION, replace(config, train_motion_controlnet=False))
    steered, without = stage(x_0, t, half), plain(x_0, t, condition)
    assert (steered[0] - without[0]).abs().max() > 1e-4
    torch.testing.assert_close(steered[1], without[1])
    train(stage, data, config)
    changed = {
        key.partition(".")[0] for key, value in stage.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {"text_encoder", "unet", "image_controlnet", "motion_controlnet"}
    assert (Path(config.output) / "motion_controlnet").is_dir()
    nothing, _ = build(StageName.FOUNDATION, replace(config, motion_dropout=1.0))
    assert not nothing.encode(data[0], [torch.Generator().manual_seed(i) for i in range(2)])[1].flow.any()


def test_the_camera_lora_acts_in_stage_three_and_does_not_learn(settings):
    stage, data = build(StageName.OBJECT_LORA, settings)
    x_0, condition = stage.encode(data[0], [torch.Generator().manual_seed(0)])
    t = torch.tensor([500])
    with_camera = stage(x_0, t, condition)
    sum(stage.loss_terms(with_camera, torch.randn_like(x_0)).values()).backward()
    camera = adapter_parameters(stage.motion_controlnet, Adapter.CAMERA)
    assert all(parameter.grad is None for parameter in camera.values())
    assert all(parameter.grad is not None for parameter in stage.trainable().values())
    with active(stage.motion_controlnet, Adapter.OBJECT):
        assert (stage(x_0, t, condition) - with_camera).abs().max() > 1e-4
    terms = stage.loss_terms(with_camera, with_camera)
    assert set(terms) == {"denoising", "orthogonal"}
    assert terms["denoising"] == 0


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"ema_decay": 0.9},
        {"gradient_accumulation_steps": 2, "lr_schedule": "cosine"},
        pytest.param({"optimizer": "muon", "weight_decay": 0.1}, marks=NEEDS_MUON),
    ],
)
def test_two_and_two_steps_are_four(settings, tmp_path, extra):
    config = replace(settings, max_steps=4, warmup_steps=2, trajectories="sparse", **extra)
    whole, data = build(StageName.MOTION_CONTROLNET, config)
    train(whole, data, config)

    parts = replace(config, output=str(tmp_path / "parts"))
    shutil.copytree(config.output, parts.output)
    for step in (3, 4):  # as if the run had been killed after step 2
        shutil.rmtree(Path(parts.output) / f"checkpoint-{step:08d}")
    resumed, data = build(StageName.MOTION_CONTROLNET, parts)
    train(resumed, data, parts)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    rates = {}
    for line in (Path(parts.output) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert rates.setdefault(record["step"], record["learning_rate"]) == record["learning_rate"]


def test_a_continued_run_learns_at_the_rate_that_it_is_given(settings):
    first, data = build(StageName.CAMERA_LORA, settings)
    train(first, data, settings)
    still = replace(settings, max_steps=3, learning_rate=1e-30)
    second, data = build(StageName.CAMERA_LORA, still)
    train(second, data, still)
    for key, value in first.trainable().items():
        assert torch.equal(value, second.trainable()[key]), key


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line["denoising"] for line in lines]


def test_two_batches_of_one_are_a_batch_of_two(settings, tmp_path):
    whole = replace(settings, batch_size=2, max_steps=3, trajectories="sparse", sets=["mixed", "camera"])
    halves = replace(whole, batch_size=1, gradient_accumulation_steps=2, output=str(tmp_path / "halves"))
    for config in (whole, halves):
        train(*build(StageName.MOTION_CONTROLNET, config), config)
    torch.testing.assert_close(
        torch.tensor(losses(whole.output)), torch.tensor(losses(halves.output)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow
def test_compiled_stages_learn_the_same(settings, tmp_path):
    plain = replace(settings, trajectories="sparse")
    compiled = replace(plain, torch_compile=True, output=str(tmp_path / "compiled"))
    stages = []
    for config in (plain, compiled):
        stage, data = build(StageName.CAMERA_LORA, config)
        train(stage, data, config)
        stages.append(stage)
    torch.compiler.reset()
    torch.testing.assert_close(
        torch.tensor(losses(plain.output)), torch.tensor(losses(compiled.output)), rtol=1e-4, atol=0
    )
    for key, value in stages[0].trainable().items():
        torch.testing.assert_close(stages[1].trainable()[key], value, rtol=0, atol=5e-3, msg=key)


def test_checkpointed_blocks_give_the_same_gradients(settings):
    found = []
    for checkpointed in (False, True):
        stage, data = build(StageName.OBJECT_LORA, settings)
        stage.unet.checkpoint_blocks = stage.motion_controlnet.checkpoint_blocks = checkpointed
        x_0, condition = stage.encode(data[0], [torch.Generator().manual_seed(0)])
        stage(x_0, torch.tensor([500]), condition).square().sum().backward()
        found.append([parameter.grad for parameter in stage.trainable().values()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_learns_nothing_keeps_no_activation(settings, checkpointed):
    """Bytes kept for the backward pass, by the part of the model whose forward pass made them."""
    stage, data = build(StageName.MOTION_CONTROLNET, settings)
    stage.unet.checkpoint_blocks = stage.motion_controlnet.checkpoint_blocks = checkpointed
    parameters = {parameter.data_ptr() for parameter in stage.parameters()}
    inside, kept = (
        ["outside"],
        dict.fromkeys(["outside", "text_encoder", "vae", "image", "down", "mid", "up", "motion"], 0),
    )
    parts = {
        "text_encoder": stage.text_encoder,
        "vae": stage.vae.encoder,
        "image": stage.image_controlnet,
        "motion": stage.motion_controlnet,
        "mid": stage.unet.mid_block,
        **{f"down {i}": block for i, block in enumerate(stage.unet.down_blocks)},
        **{f"up {i}": block for i, block in enumerate(stage.unet.up_blocks)},
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: inside.append(name.split()[0]))
        part.register_forward_hook(lambda *_: inside.pop() and None)

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[inside[-1]] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x_0, condition = stage.encode(data[0], [torch.Generator().manual_seed(0)])
        stage(x_0, torch.tensor([500]), condition)
    assert [kept[name] for name in ("text_encoder", "vae", "image", "down", "mid")] == [0] * 5
    if checkpointed:
        assert kept["up"] + kept["motion"] < 0.25 * test_what_learns_nothing_keeps_no_activation.plain
    else:
        test_what_learns_nothing_keeps_no_activation.plain = kept["up"] + kept["motion"]
        assert min(kept["up"], kept["motion"]) > 0


def test_half_precision_holds_what_does_not_learn_in_half(settings):
    config = replace(settings, mixed_precision="bf16")
    stage, data = build(StageName.CAMERA_LORA, config)
    train(stage, data, config)
    assert stage.unet.dtype == stage.vae.dtype == stage.image_controlnet.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in stage.trainable().values()} == {torch.float32}
    full = replace(settings, output=settings.output + "-full")
    train(*build(StageName.CAMERA_LORA, full), full)
    for half, whole in zip(losses(config.output), losses(full.output), strict=True):
        assert half == pytest.approx(whole, rel=0.02)


class Damaged:
    """Batches whose clip 0 always had to be replaced."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        return self.data[index] | {"skipped": [["bad: ends inside a file"] if index == 0 else []]}


def test_corrupt_clips_are_counted_and_too_many_stop_the_run(settings, caplog):
    stage, data = build(StageName.CAMERA_LORA, settings)
    train(stage, Damaged(data), settings)
    lines = [json.loads(line) for line in (Path(settings.output) / "metrics.jsonl").read_text().splitlines()]
    assert [line["corrupt_clips"] for line in lines] == [1, 1]
    assert "skipped a clip: bad: ends inside a file" in caplog.text
    strict = replace(settings, max_corrupt_fraction=0.0, output=settings.output + "-strict")
    with pytest.raises(CorruptClipError, match=r"1 of 1 clips cannot be read, more than max_corrupt_fraction=0\.0"):
        train(*build(StageName.CAMERA_LORA, strict)[:1], Damaged(data), strict)


def test_what_a_run_folder_holds(settings):
    config = replace(settings, preview_every=2, preview_steps=2, max_steps=3, ema_decay=0.5)
    run_stage(StageName.CAMERA_LORA, config, VideoPreview)
    folder = Path(config.output)
    assert {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")} == {
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
    assert config_file.load(TrainConfig, folder / "config.yaml") == config
    environment = json.loads((folder / "environment.jsonl").read_text())
    assert environment["start"] == 0
    assert environment["torch"] == torch.__version__.partition("+")[0] or environment["torch"] == torch.__version__


def test_previews_change_nothing(settings):
    shown = replace(settings, preview_every=1, preview_steps=2, ema_decay=0.5, mixed_precision="bf16")
    hidden = replace(shown, preview_every=0, output=settings.output + "-hidden")
    for config in (shown, hidden):
        run_stage(StageName.MOTION_CONTROLNET, config, VideoPreview)
    saved = [load_file(next(Path(c.output).glob("motion_controlnet/*.safetensors"))) for c in (shown, hidden)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_clips_on_disk_need_clips_to_preview():
    with pytest.raises(ValueError, match="set preview_data"):
        TrainConfig(data=["somewhere"], preview_every=10)


def test_a_truncated_checkpoint_is_passed_over(settings, caplog):
    run_stage(StageName.CAMERA_LORA, settings)
    newest = Path(settings.output) / "checkpoint-00000002" / "parameters.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    found = checkpointing.latest(Path(settings.output))
    assert found is not None
    assert found.step == 1
    assert "cannot be read" in caplog.text


def test_another_stages_run_folder_is_refused(settings):
    run_stage(StageName.CAMERA_LORA, settings)
    with pytest.raises(ValueError, match="choose another output"):
        run_stage(StageName.OBJECT_LORA, settings)


def test_a_loss_that_is_not_finite_stops_the_run(settings):
    stage, data = build(StageName.CAMERA_LORA, settings)
    stage.unet.conv_out.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 0 .* clips: mixed-0-00000000"):
        train(stage, data, settings)
    assert checkpointing.latest(Path(settings.output)) is None


def test_what_a_condition_holds(settings):
    dense, data = build(StageName.MOTION_CONTROLNET, replace(settings, trajectories="dense", text_dropout=1.0))
    sparse, _ = build(StageName.MOTION_CONTROLNET, replace(settings, max_tracks=1, text_dropout=0.0))
    batch = data[0]
    _, everything = dense.encode(batch, [torch.Generator().manual_seed(0)])
    _, few = sparse.encode(batch, [torch.Generator().manual_seed(0)])
    assert (everything.flow != 0).sum() > (few.flow != 0).sum() > 0
    embed = dense.text_encoder
    assert torch.equal(everything.text, embed(dense.networks.tokenize([""])).last_hidden_state)
    assert torch.equal(few.text, embed(dense.networks.tokenize(batch["caption"])).last_hidden_state)
    assert everything.first_frame[:, :, 0].any()
    assert not everything.first_frame[:, :, 1:].any()
    assert everything.mask.sum() == everything.mask[:, :, 0].numel()


SHIPPED = sorted(set(Path("configs/train").rglob("*.yaml")) - {Path("configs/train/sprites.yaml")})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_settings_load_and_refuse_typing_errors(path):
    config = config_file.load(TrainConfig, path)
    assert config.output == f"runs/{path.relative_to('configs/train').with_suffix('')}"
    if config.data:  # the paper's, on eight GPUs or on one
        assert config.batch_size * config.gradient_accumulation_steps in (64, 64 // 8)
        assert (config.learning_rate, config.size, config.num_frames, config.lora_rank) == (1e-4, (384, 256), 16, 64)
    with pytest.raises(ValueError, match="learning_rate"):
        config_file.load(TrainConfig, path, ["learning_rat=1"])


@pytest.mark.parametrize(
    ("stage", "yaml"),
    [
        (StageName.MOTION_CONTROLNET, "motion_controlnet_dense"),
        (StageName.MOTION_CONTROLNET, "motion_controlnet_sparse"),
        (StageName.CAMERA_LORA, "camera_lora"),
        (StageName.OBJECT_LORA, "object_lora"),
    ],
)
def test_entry_points_train_a_part(stage, yaml, tiny_model, tmp_path, capsys):
    overrides = [
        f"model={tiny_model}",
        f"output={tmp_path}",
        "motion_controlnet=null",
        "max_steps=1",
        "batch_size=1",
        "world.size=[32,32]",
        "world.num_frames=4",
        "mixed_precision=no",
        "lora_rank=2",
    ]
    assert main(stage, "", VideoPreview, ["--config", f"configs/train/sprites/{yaml}.yaml", *overrides]) == 0
    assert (tmp_path / stage.value).is_dir()
    assert capsys.readouterr().out.strip() == f"{tmp_path}/{stage.value}"
    assert main(stage, "", VideoPreview, [*overrides, "model=nowhere"]) == 2
