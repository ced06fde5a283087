"""Stages on the tiny model, as a command would build them."""

import json
import multiprocessing
import socket
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import TINY_WORLD, tiny_gates, tiny_networks
from launched import PRELOADED, run_rank

from imageconductor.data.batches import Batches
from imageconductor.models.networks import Networks
from imageconductor.training.stages.registry import find_stage


@pytest.fixture(scope="session")
def reference_clips(tmp_path_factory):
    """A folder of two videos of six frames, 32x32, with captions."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for name in ("left", "right"):
        frames = random.integers(0, 255, (6, 32, 32, 3), np.uint8)
        iio.imwrite(folder / f"{name}.mp4", frames, plugin="FFMPEG", fps=8, codec="libx264", macro_block_size=2)
        (folder / f"{name}.txt").write_text(f"a square moves {name}")
    return folder


@pytest.fixture(scope="session")
def object_gates(tmp_path_factory):
    """A folder of open object gates of four objects for the tiny model."""
    folder = tmp_path_factory.mktemp("gates") / "object_gates"
    tiny_gates(tiny_networks().unet)[0].save_pretrained(folder)
    return folder


@pytest.fixture
def configure(tiny_model, tmp_path, reference_clips, object_gates):
    """Makes the settings of a stage by its name: two steps of one clip."""

    def make(name, **changes):
        small = {
            "model": str(tiny_model),
            "output": str(tmp_path / "run"),
            "max_steps": 2,
            "batch_size": 1,
            "learning_rate": 1e-2,
            "save_every": 1,
            "keep_checkpoints": 5,
            "log_every": 1,
        }
        if name == "motion_director":
            small |= {"data": [str(reference_clips)], "size": (32, 32), "num_frames": 4, "fps": None}
        elif not changes.get("data"):
            small["world"] = TINY_WORLD
        if name == "scene_gates":
            small |= {"encoder_channels": [8, 16], "encoder_blocks": 1, "motion_lora_rank": 2}
            small |= {} if changes.get("learns_object_gates") else {"object_gates": str(object_gates)}
        if name in ("object_gates", "scene_gates"):
            small |= {"max_objects": 4, "gate_learning_rate": 0.1}
        if name.endswith("_lora") or name in ("motion_director", "few_step"):
            small["lora_rank"] = 2
        return find_stage(name).Config(**small | changes)

    return make


@pytest.fixture
def build():
    """Makes a stage and its data from its settings."""

    def make(config):
        stage = find_stage(config.stage)(Networks.load(config.model), config)
        return stage, Batches(stage.build_samples(config), config.batch_size)

    return make


@pytest.fixture
def parameters():
    """What a stage learns, by name."""
    return lambda stage: {name: p for group in stage.trainable().values() for name, p in group.parameters.items()}


@pytest.fixture
def losses():
    """Denoising losses that a run folder has logged."""
    return lambda folder: [
        json.loads(line)["denoising"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def run_forked(tmp_path_factory):
    """Runs a launcher's command in processes that have imported everything: that would be most of the time of a run.

    They are children of one process, with the variables that a launcher would set.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run_there(arguments, **variables):
        processes = int(next(text for text in arguments if text.startswith("--nproc_per_node=")).partition("=")[2])
        script = arguments[1 + next(i for i, text in enumerate(arguments) if text.startswith("--nproc_per_node=")) :]
        said = tmp_path_factory.mktemp("said")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        place |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = []
        for rank in range(processes):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **place, **numbers, **variables}
            ranks.append(context.Process(target=run_rank, args=(script, environment, said / f"{rank}.txt")))
            ranks[-1].start()
        for process in ranks:
            process.join(300)
        told = "\n".join(path.read_text() for path in sorted(said.iterdir()))
        assert [process.exitcode for process in ranks] == [0] * processes, told

    return run_there
