"""Checkpoints: which one a run goes on from, what is deleted, and who may write."""

import errno
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from imageconductor.files import lock
from imageconductor.training import checkpointing, run
from imageconductor.training.loop import train
from imageconductor.training.run import run_stage


def save(folder, step, keep=5):
    checkpointing.save(folder, step, {"parameters": {"w": torch.full((1000,), step)}}, {"step": torch.ones(1000)}, keep)


def steps(folder):
    return [int(path.name[-8:]) for path in sorted(folder.glob("checkpoint-*[0-9]"))]


def overwrite(name, start, end=None):
    """A part of a file becomes zeros, or is cut off."""

    def damage(folder):
        content = (folder / name).read_bytes()
        zeros = b"" if end is None else bytes(len(content[start:end]))
        (folder / name).write_bytes(content[:start] + zeros + (b"" if end is None else content[end:]))

    return damage


DAMAGES = {
    "parameters cut off": overwrite("parameters.safetensors", 100),
    "empty parameters": overwrite("parameters.safetensors", 0),
    "parameters of zeros": overwrite("parameters.safetensors", 0, 10**6),
    "optimiser cut off": overwrite("optimizer.pt", -10),
    "empty optimiser": overwrite("optimizer.pt", 0),
    "optimiser of zeros": overwrite("optimizer.pt", 0, 10**6),
    "optimiser with a hole": overwrite("optimizer.pt", 300, 350),
    "empty state": overwrite("state.json", 0),
    "state of zeros": overwrite("state.json", 0, 10**6),
    "no optimiser": lambda folder: (folder / "optimizer.pt").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path, caplog):
    for step in (1, 2):
        save(tmp_path, step)
    DAMAGES[damage](tmp_path / "checkpoint-00000002")
    assert checkpointing.latest(tmp_path).step == 1
    assert "checkpoint-00000002 cannot be read" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    assert checkpointing.latest(tmp_path) is None
    for step in (1, 2):
        save(tmp_path, step)
        DAMAGES["empty state"](tmp_path / f"checkpoint-{step:08d}")
    with pytest.raises(ValueError, match="none of its 2 checkpoints can be read; delete them to begin anew") as refusal:
        checkpointing.latest(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("reader", ["load_file", "torch.load"])
@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.EIO, "Input/output error"), RuntimeError("not enough memory: you tried to allocate")],
    ids=lambda error: type(error).__name__,
)
def test_a_machine_that_fails_is_no_damage(reader, error, tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(f"imageconductor.training.checkpointing.{reader}", Mock(side_effect=error))
    with pytest.raises(type(error)):
        checkpointing.latest(tmp_path)


def test_a_run_that_goes_back_behind_a_damaged_checkpoint_deletes_nothing_later(tmp_path):
    for step in (1000, 900):
        save(tmp_path, step)
    DAMAGES["empty state"](tmp_path / "checkpoint-00001000")
    for step in (940, 970):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [940, 970, 1000]
    save(tmp_path, 1000, keep=2)
    assert steps(tmp_path) == [970, 1000]
    assert checkpointing.latest(tmp_path).step == 1000


def test_copies_and_links_of_checkpoints_are_the_users(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-00000001", tmp_path / "elsewhere" / "kept")
    shutil.copytree(tmp_path / "checkpoint-00000001", tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-00000000").symlink_to(tmp_path / "elsewhere" / "kept")
    (tmp_path / "checkpoint-00000009.zip").touch()
    (tmp_path / "checkpoint-00000009").touch()
    save(tmp_path, 2, keep=1)
    assert checkpointing.latest_step(tmp_path) == 2
    assert checkpointing.latest(tmp_path).step == 2
    assert not (tmp_path / "checkpoint-00000001").exists()
    for name in ("checkpoint-best", "checkpoint-00000000", "elsewhere/kept"):
        assert (tmp_path / name / "state.json").is_file()


def test_an_old_checkpoint_that_cannot_be_deleted_costs_a_warning(tmp_path, monkeypatch, caplog):
    delete = shutil.rmtree

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        delete(path, ignore_errors=True)

    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", busy)
    save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [1, 2]
    assert "checkpoint-00000001 cannot be deleted" in caplog.text


def test_nothing_of_a_checkpoint_is_held_while_a_run_goes_on_from_it(configure, build):
    config = configure("camera_lora", max_steps=1)
    train(*build(config), config)
    config.max_steps = 2
    stage, data = build(config)
    terms, held = stage.loss_terms, []

    def look(*arguments):
        held.extend(line for line in Path("/proc/self/maps").read_text().splitlines() if config.output in line)
        return terms(*arguments)

    stage.loss_terms = look
    assert train(stage, data, config).step == 2
    assert not held


def test_two_runs_do_not_write_into_one_folder(configure, monkeypatch):
    config = configure("camera_lora")
    monkeypatch.setattr(checkpointing, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(run.Networks, "load", lambda *_: pytest.fail("weights were read"))
    with lock(Path(config.output) / ".lock"), pytest.raises(ValueError, match=f"writing into {config.output}; wait"):
        run_stage(config)
    assert [path.name for path in Path(config.output).iterdir()] == [".lock"]


def test_what_a_killed_run_left_half_written_goes(configure, build):
    config = configure("camera_lora")
    output = Path(config.output)
    for name in (".checkpoint-00000001.host.1.partial", ".result.abc.partial", "previews/.step-1.host.1.partial"):
        (output / name).mkdir(parents=True)
    inner = output / "another_run" / ".checkpoint-00000001.host.2.partial"  # which may be running
    inner.mkdir(parents=True)
    train(*build(config), config)
    assert list(output.rglob(".*")) == [inner]
