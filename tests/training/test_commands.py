"""The training commands: whose YAML they take, and what they say of a wrong one."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from imageconductor.commands.train import main
from imageconductor.config import load
from imageconductor.training import run
from imageconductor.training.ignored_settings import check_ignored
from imageconductor.training.stage_configs import STAGE_CONFIGS, BoxStageConfig, load_config
from imageconductor.training.stages.registry import STAGES
from imageconductor.training.train_config import TrainConfig
from scripts import smoke_training

SPRITES = Path("configs/train/sprites")
RECIPES = {Path("configs/train") / f"{name}.yaml" for name in ("sprites", "sprites_text", "smoke", "24gb/smoke")}
SHIPPED = sorted(set(Path("configs/train").rglob("*.yaml")) - RECIPES)
DOORS = ("motion_controlnet", "camera_lora", "object_lora")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_settings_name_their_stage_and_refuse_typing_errors(path):
    config = load_config(path)
    stem = path.stem.removeprefix("smcd_").removeprefix("text_")
    named = (path.parent.name, stem[: len(config.stage)], {"joint": "scene_gates"}.get(stem))
    assert config.stage in named
    assert type(config) is STAGES[config.stage].Config
    assert config.output == f"runs/{path.relative_to('configs/train').with_suffix('')}"
    if config.stage == "motion_director":  # the published settings, and the small model's own
        assert (config.batch_size, config.lora_rank) == (1, 32)
        assert config.learning_rate == 5e-4 or path.parent == SPRITES
    elif isinstance(config, BoxStageConfig):  # SMCD's published ones, on eight GPUs, and the small model's own
        is_first = config.stage == "object_gates"
        if config.data:
            assert config.batch_size * config.gradient_accumulation_steps * 8 == (64 if is_first else 16)
            assert config.learning_rate == (3e-5 if is_first else 5e-5)
            assert (config.lr_schedule, config.weight_decay, config.max_grad_norm) == ("constant", 1e-2, 1.0)
        assert config.boxes_dropout == 0.1
        assert is_first or (config.scene_dropout, config.input_dropout) == (0.1, 0.25)
    elif config.data:  # the paper's, on eight GPUs or on one
        assert config.batch_size * config.gradient_accumulation_steps in (64, 64 // 8)
        assert (config.learning_rate, config.size, config.num_frames) == (1e-4, (384, 256), 16)
        assert getattr(config, "lora_rank", 64) == 64
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        load_config(path, ["learning_rat=1"])


def test_clips_on_disk_need_clips_to_preview():
    with pytest.raises(ValueError, match="set held_out_clips"):
        TrainConfig(data=["somewhere"], preview_every=10)


@pytest.mark.parametrize("name", [*DOORS, "style_lora"])
def test_a_command_trains_a_part(name, tiny_model, tmp_path, capsys):
    overrides = [f"model={tiny_model}", f"output={tmp_path}", "max_steps=1", "batch_size=1", "mixed_precision=no"]
    overrides += ["world.size=[32,32]", "world.num_frames=4", "num_frames=null"]
    overrides += ["lora_rank=2"] if name.endswith("_lora") else []
    config = ["--config", f"{SPRITES}/{'motion_controlnet_dense' if name == 'motion_controlnet' else name}.yaml"]
    door = name if name in DOORS else None
    assert main([*config, *overrides], door) == 0
    assert (tmp_path / name).is_dir()
    assert capsys.readouterr().out.strip() == f"{tmp_path}/{name}"
    assert main([*config, *overrides, "model=nowhere"], door) == 2
    assert "no model folder at nowhere" in capsys.readouterr().err


REFUSED = {
    "another stage's YAML": (
        "object_lora",
        ["--config", f"{SPRITES}/camera_lora.yaml"],
        ["camera_lora.yaml is for stage camera_lora, this command trains object_lora"],
    ),
    "another stage by name": ("object_lora", ["stage=camera_lora"], ["is for stage camera_lora"]),
    "a YAML and another name": (
        None,
        ["--config", f"{SPRITES}/camera_lora.yaml", "stage=object_lora"],
        ["camera_lora.yaml is for stage camera_lora, which stage=object_lora cannot change"],
    ),
    "an empty stage": (None, ["stage="], ["unknown stage ''"]),
    "a misplaced setting": (
        "camera_lora",
        ["--config", f"{SPRITES}/camera_lora.yaml", "orthogonal_weight=0.1"],
        ["unknown key 'orthogonal_weight'; it is a setting of stage object_lora"],
    ),
    "an old name": (
        None,
        ["--config", f"{SPRITES}/foundation_whole.yaml", "steered=true"],
        ["unknown key 'steered'; it is called 'train_motion_controlnet' now"],
    ),
    "no stage": (None, ["max_steps=3"], ["does not say its stage; add stage=one of foundation, motion_controlnet"]),
    "a mistyped stage": (None, ["stage=camera_lra"], ["unknown stage 'camera_lra'; did you mean 'camera_lora'"]),
    "a wrong value": ("camera_lora", ["max_steps=0"], ["max_steps must be at least 1, got 0"]),
    "an unknown schedule": (
        "camera_lora",
        ["lr_schedule=piecewise_constant"],
        ["lr_schedule must be one of 'constant', 'constant_with_warmup',", "got 'piecewise_constant'"],
    ),
    "a setting of clips on disk": (
        "camera_lora",
        ["horizontal_flip=0.5"],
        ["horizontal_flip=0.5 does nothing on the sprite world; set data, or horizontal_flip=0.0"],
    ),
    "the size of clips on disk": (
        "camera_lora",
        ["size=[64,64]"],
        ["size=[64, 64] does nothing on the sprite world; set world.size, or size=[384, 256]"],
    ),
    "the crops of clips on disk": (
        None,
        ["stage=object_gates", "random_crop=0.9"],
        ["random_crop=0.9 does nothing on"],
    ),
    "no file": (None, ["--config", "nowhere.yaml"], ["nowhere.yaml: no such config file"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_told_in_one_line(name, capsys):
    stage, arguments, words = REFUSED[name]
    assert main(arguments, stage) == 2
    said = capsys.readouterr()
    assert not said.out
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_memory_that_runs_out_is_one_line_with_settings_that_exist(monkeypatch, capsys):
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def fail(*_):
        raise error

    monkeypatch.setattr(run, "run_stage", fail)
    given = ["--config", f"{SPRITES}/camera_lora.yaml"]
    assert main(given) == 1  # at which a launcher stops the other processes
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory ran out (CUDA out of memory.); ")
    settings = re.findall(r"\w+_\w+=\w+|\w+=\w+_\w+", line)
    assert settings == ["gradient_checkpointing=true", "optimizer=adamw_8bit"]
    load_config(Path(given[1]), [*settings, "batch_size=1", "gradient_accumulation_steps=8"])
    assert "smaller batch_size with more gradient_accumulation_steps" in line
    (folder,) = re.findall(r"configs/\S+", line)
    assert Path(folder, "camera_lora.yaml").is_file()
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        main(given)


def test_a_yaml_without_its_stage_is_refused_by_a_door_too(tmp_path, capsys):
    path = tmp_path / "old.yaml"
    path.write_text("max_steps: 3\n")
    assert main(["--config", str(path)], "camera_lora") == 2
    assert "old.yaml does not say its stage; add stage: camera_lora" in capsys.readouterr().err


def test_every_stage_has_its_settings():
    assert {name: stage.Config for name, stage in STAGES.items()} == STAGE_CONFIGS


def test_help_lists_the_stages_or_the_settings_of_one(capsys):
    for arguments, shown, hidden in (
        (["--help"], ["style_lora", "learning_rate"], ["orthogonal_weight"]),
        (["--config", f"{SPRITES}/object_lora.yaml", "--help"], ["orthogonal_weight", "learning_rate"], []),
        (["stage=style_lora", "--help"], ["lora_rank"], ["max_tracks"]),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in shown)
        assert not any(word in text for word in hidden)


@pytest.mark.slow
def test_the_smoke_run_trains_the_shipped_stages_and_tells_their_time(tiny_model, tmp_path, monkeypatch, capsys):
    small = ["batch_size=1", "gradient_accumulation_steps=1", "num_workers=0", "mixed_precision=no", "num_frames=4"]
    small = json.dumps([*small, "size=[32,32]"])
    arguments = ["--config", "configs/train/smoke.yaml", f"model={tiny_model}", f"output={tmp_path}/smoke"]
    monkeypatch.setattr("sys.argv", ["smoke_training.py", *arguments, "max_steps=2", f"settings={small}"])
    assert smoke_training.main() == 0
    said = capsys.readouterr().out
    shown = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("|")][2:]
    assert shown == ["motion_controlnet_dense", "motion_controlnet_sparse", "camera_lora", "object_lora", "all"]
    assert (tmp_path / "smoke" / "results.md").read_text() == said
    remedy = "a step has 1 clips here and 64 in the real run; set 'settings=[gradient_accumulation_steps=64]'"
    assert [line for line in said.splitlines() if "real run;" in line] == [f"{name}: {remedy}" for name in shown[:-1]]
    measured = json.loads((tmp_path / "smoke" / "object_lora" / "measured.json").read_text())
    assert measured["real_steps"] == load_config(Path("configs/train/object_lora.yaml")).max_steps
    assert measured["clips_per_step"] == 1

    monkeypatch.setattr("sys.argv", ["smoke_training.py", *arguments, "max_steps=2", f"settings={small}"])
    monkeypatch.setattr(smoke_training, "run_stage", None)  # A finished stage is not repeated.
    assert smoke_training.main() == 0
    assert capsys.readouterr().out == said
    monkeypatch.setattr("sys.argv", ["smoke_training.py", *arguments, "max_steps=3", f"settings={small}"])
    assert smoke_training.main() == 2
    assert "max_steps was 2 and now 3" in capsys.readouterr().err


@pytest.mark.parametrize(("recipe", "processes"), [("smoke", 8), ("24gb/smoke", 1)])
def test_a_smoke_run_on_the_gpus_of_its_recipe_times_the_steps_of_the_real_runs(recipe, processes, monkeypatch):
    monkeypatch.setattr(smoke_training, "start_processes", lambda: SimpleNamespace(num_processes=processes))
    config = load(smoke_training.SmokeConfig, Path(f"configs/train/{recipe}.yaml"))
    assert config.clips_per_step == 64
    for path in config.stages:
        real = load_config(Path(path))
        for setting in ("shuffle_shards=3", "max_tracks=4"):  # of clips on disk, which a trial has not; of one stage
            check_ignored(smoke_training.shorten(load_config(Path(path), [setting]), config, "trial", {}))
        assert smoke_training.warn_of_batch(real, config.clips_per_step) is None
        assert "96 in the real run; processes x batch_size" in smoke_training.warn_of_batch(
            replace(real, batch_size=5), 96
        )


def test_a_smoke_run_without_its_model_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv",
        ["smoke_training.py", "--config", "configs/train/smoke.yaml", "model=nowhere", f"output={tmp_path}/smoke"],
    )
    assert smoke_training.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no model folder at nowhere")
