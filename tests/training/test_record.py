"""The record of a run: which settings a run may be continued with, and what its folder says of every start."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from clip_files import SIZE, record, write_folder

from imageconductor.commands.train import main
from imageconductor.training import checkpointing
from imageconductor.training.loop import train
from imageconductor.training.record import RunRecord, check_continuation, check_num_clips
from imageconductor.training.run import check_inputs, run_stage
from imageconductor.training.stage_configs import load_config


def leave_record(config):
    """What a run of two steps leaves for the decision whether it may go on."""
    folder = Path(config.output)
    folder.mkdir()
    RunRecord(folder, config, 0).close()
    checkpointing.save(folder, 2, {"parameters": {}}, {}, keep=1)


@pytest.fixture
def begun(configure):
    """Settings of a camera LoRA's run, whose record is in its folder."""
    config = configure("camera_lora")
    leave_record(config)
    return config


@pytest.fixture
def trained(configure, build):
    """Settings of a camera LoRA's run that was trained for two steps."""
    config = configure("camera_lora")
    train(*build(config), config)
    return config


REFUSED = {
    "seed": ({"seed": 5}, "seed=0, now 5"),
    "learning rate": ({"learning_rate": 1e-3}, "learning_rate=0.01, now 0.001"),
    "clips per step": ({"batch_size": 3}, "clips_per_step=1, now 3"),
    "data": ({"sets": ["camera"]}, 'sets=["mixed"], now ["camera"]'),
    "world": ({"still": 0.5}, "world.still_prob=0.4, now 0.5"),
    "precision": ({"mixed_precision": "bf16"}, "mixed_precision=no, now bf16"),
    "length of a cosine": ({"lr_schedule": "cosine", "max_steps": 9}, "max_steps=2, now 9"),
    "model": ({"model": "elsewhere"}, "now elsewhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_change_what_is_trained_need_permission(begun, name, caplog):
    changes, words = REFUSED[name]
    if "still" in changes:
        changes = {"world": replace(begun.world, still_prob=changes["still"])}
    changed = replace(begun, **changes)
    with pytest.raises(ValueError, match="set allow_changes=true") as refusal:
        check_continuation(changed)
    assert words in str(refusal.value)
    check_continuation(replace(changed, allow_changes=True))
    assert words in caplog.text


def test_settings_that_change_nothing_of_the_result_are_free(begun, monkeypatch):
    check_continuation(begun)
    free = {"max_steps": 9, "num_workers": 2, "save_every": 7, "preview_steps": 3, "gradient_checkpointing": True}
    check_continuation(replace(begun, **free))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="clips_per_step=1, now 2"):
        check_continuation(begun)


def test_the_same_clips_may_be_split_differently(configure, monkeypatch):
    config = configure("camera_lora", batch_size=4)
    leave_record(config)
    check_continuation(replace(config, batch_size=2, gradient_accumulation_steps=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_continuation(replace(config, batch_size=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 4}, "lora_rank=2, now 4"),
        ({"lora_targets": "linear"}, "lora_targets=all, now linear"),
        ({"optimizer": "muon"}, "optimizer=adamw, now muon"),
    ],
)
def test_what_the_learned_weights_do_not_fit_is_refused_in_any_case(begun, changes, words):
    with pytest.raises(ValueError, match="choose another output") as refusal:
        check_continuation(replace(begun, allow_changes=True, **changes))
    assert words in str(refusal.value)


def test_a_run_of_another_stage_or_of_more_steps_is_refused(begun, configure):
    with pytest.raises(ValueError, match="holds a run with stage=camera_lora, now object_lora, which cannot change"):
        check_continuation(configure("object_lora"))
    with pytest.raises(ValueError, match="has 2 steps behind it, more than max_steps=1"):
        check_continuation(replace(begun, max_steps=1))


def test_a_rise_of_the_learning_rate_that_would_not_come_is_refused_but_not_in_records(configure):
    config = configure("camera_lora", lr_schedule="constant", warmup_steps=10)
    with pytest.raises(ValueError, match="warmup_steps=10 does nothing under lr_schedule=constant; set") as refusal:
        check_inputs(config)
    assert "warmup_steps=0" in str(refusal.value)
    leave_record(config)
    check_inputs(replace(config, warmup_steps=0))
    with pytest.raises(ValueError, match="lr_schedule=constant, now constant_with_warmup, warmup_steps=0, now 10;"):
        check_inputs(replace(config, lr_schedule="constant_with_warmup"))


def test_what_did_nothing_for_sprites_is_refused_but_not_in_records(configure):
    config = configure("camera_lora", horizontal_flip=0.5, size=(64, 64))
    with pytest.raises(ValueError, match=r"size=\[64, 64\] does nothing on the sprite world; set world.size, or size="):
        check_inputs(config)
    leave_record(config)
    check_inputs(configure("camera_lora"))


def test_a_model_of_other_sizes_is_refused_by_the_parameter(trained, build):
    wider = replace(trained, lora_rank=4, max_steps=3)
    with pytest.raises(ValueError, match=r"checkpoint has .*lora_A.* of shape .*; choose another output"):
        train(*build(wider), wider)


def test_a_refused_run_leaves_its_folder_as_it_was(trained, capsys):
    folder = Path(trained.output)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    command = ["--config", f"{folder}/config.yaml", "max_steps=3"]
    assert main([*command, "lora_rank=4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder} holds a run with lora_rank=2, now 4")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.fixture
def clips(tmp_path):
    """A folder of three clips."""
    return write_folder(tmp_path / "clips", {f"clip-{index}": record(index) for index in range(3)})


def test_a_run_does_not_go_on_with_other_clips(configure, clips, caplog):
    config = configure("camera_lora", data=[str(clips)], size=SIZE, num_frames=4)
    run_stage(config)
    more = replace(config, max_steps=3)
    check_num_clips(more, 3)
    for part in ("mp4", "tracks.npz", "json"):
        shutil.copy(clips / f"clip-2.{part}", clips / f"clip-3.{part}")
    with pytest.raises(ValueError, match="was trained for 2 steps on 3 clips; there are 4 now; choose another output"):
        run_stage(more)
    assert run_stage(replace(more, allow_changes=True)).step == 3
    assert "on 3 clips; there are 4 now" in caplog.text
    check_num_clips(more, 4)  # those of the newest start


def test_clips_that_are_not_known_are_not_compared(begun):
    check_num_clips(begun, 5)  # The folder is of an earlier version, or of the sprite world.
    check_num_clips(replace(begun, output=f"{begun.output}/none"), 5)


def test_every_start_is_on_record_with_its_settings(trained):
    run_stage(replace(trained, max_steps=3, seed=1, allow_changes=True))
    starts = [json.loads(line) for line in (Path(trained.output) / "environment.jsonl").read_text().splitlines()]
    assert [(start["start"], start["settings"]["seed"], start["clips_per_step"]) for start in starts] == [
        (0, 0, 1),
        (2, 1, 1),
    ]
    assert load_config(Path(trained.output) / "config.yaml").allow_changes is False  # permitted for that start alone
