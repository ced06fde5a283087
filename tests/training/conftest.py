"""Stages on the tiny model, as a command would build them."""

import json
from pathlib import Path

import pytest
from conftest import TINY_WORLD

from imageconductor.data.batches import Batches
from imageconductor.models.networks import Networks
from imageconductor.training.run import build_samples
from imageconductor.training.stages.registry import find_stage


@pytest.fixture
def configure(tiny_model, tmp_path):
    """Makes the settings of a stage by its name: two steps of one clip."""

    def make(name, **changes):
        small = {
            "model": str(tiny_model),
            "output": str(tmp_path / "run"),
            "world": TINY_WORLD,
            "max_steps": 2,
            "batch_size": 1,
            "learning_rate": 1e-2,
            "save_every": 1,
            "keep_checkpoints": 5,
            "log_every": 1,
        }
        if name.endswith("_lora"):
            small["lora_rank"] = 2
        return find_stage(name).Config(**small | changes)

    return make


@pytest.fixture
def build():
    """Makes a stage and its data from its settings."""

    def make(config):
        stage = find_stage(config.stage)(Networks.load(config.model), config)
        return stage, Batches(build_samples(config), config.batch_size)

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
