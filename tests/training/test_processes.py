"""Several processes, and runs that are killed: the entry points as a launcher starts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def command(model, output, processes, **settings):
    fixed = {"model": model, "output": output, "world.size": "[32,32]", "world.num_frames": 4, "learning_rate": 1e-2}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        *(sys.executable, *launcher, "train_motion_controlnet.py"),
        *(f"{key}={value}" for key, value in {**fixed, **settings}.items()),
    ]


def start(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        arguments, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(arguments):
    process = start(arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def kill_all(mentioning):
    """Sends SIGKILL to the launcher and to its workers, which are sessions of their own."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mentioning.encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def weights(output):
    return load_file(output / "motion_controlnet" / "diffusion_pytorch_model.safetensors")


def losses(output):
    return [json.loads(line)["denoising"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(tiny_model, tmp_path_factory):
    """A run of two processes that nothing disturbed."""
    output = tmp_path_factory.mktemp("two") / "run"
    run(command(tiny_model, output, 2, batch_size=1, max_steps=STEPS, save_every=1, log_every=1))
    return output


STEPS = 12


def test_two_processes_are_one_with_twice_the_batch(two, tiny_model, tmp_path):
    run(command(tiny_model, tmp_path / "one", 1, batch_size=2, max_steps=STEPS, log_every=1))
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(tmp_path / "one")), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_is_never_killed(processes, two, tiny_model, tmp_path):
    arguments = {"batch_size": 1, "max_steps": STEPS, "save_every": 1, "log_every": 1}
    whole = two
    if processes == 1:
        whole = tmp_path / "whole"
        run(command(tiny_model, whole, 1, **arguments))
    killed = tmp_path / "killed"
    process = start(command(tiny_model, killed, processes, **arguments))
    deadline = time.monotonic() + 200
    while not list(killed.glob("checkpoint-*[2-9]")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    kill_all(str(killed))
    process.communicate()
    assert list(killed.glob("checkpoint-*"))
    assert not (killed / "motion_controlnet").exists(), "it was over before it was killed"
    run(command(tiny_model, killed, processes, **arguments))
    expected, found = weights(whole), weights(killed)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert losses(killed) == losses(whole)
    assert len(Path(killed / "environment.jsonl").read_text().splitlines()) == 2
