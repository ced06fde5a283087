"""What a job asks of the pipeline."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from imageconductor.commands import sample
from imageconductor.sampling.job import SampleJob, call_arguments, load_pipeline, prepare, render
from imageconductor.sampling.job_files import load_job
from imageconductor.sampling.video import to_uint8


def test_a_job_is_one_call_with_its_arguments(tiny_model, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    jobs = [
        SampleJob(
            image=str(tmp_path / "a.png"), preset=preset, control="camera", model=str(tiny_model), steps=1, seed=seed
        )
        for preset, seed in (("pan-left", [3, 4]), ("zoom-in", [5, 6]))
    ]
    inputs = [prepare(job) for job in jobs]
    pipe = load_pipeline(inputs[0].job)
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(inputs)
    assert [one.initial_seed() for one in arguments["generator"]] == [3, 4, 5, 6]
    assert arguments["num_videos_per_prompt"] == 2
    videos = pipe(**arguments, output_type="np").frames
    for one, other in zip(videos, (video for of_one in render(pipe, inputs) for video in of_one), strict=True):
        assert np.array_equal(to_uint8(one), other)
    first = call_arguments(inputs)["generator"][0]
    assert torch.equal(first.get_state(), torch.Generator().manual_seed(3).get_state()), "fresh ones for each call"


def test_further_seeds_are_none_that_is_named():
    assert SampleJob(image="a.png", seed=[3, 2], num_videos=5).seeds == [3, 2, 4, 5, 6]


def test_every_file_of_a_job_is_looked_for_beside_its_yaml(tmp_path, monkeypatch):
    """Of LoRAs and runs too, whose scale stands behind them; what is not there stays as it is."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "jobs"
    names = ("a.png", "base.safetensors", "ink.safetensors", "run", "look")
    for name in names:
        (folder / name).mkdir(parents=True)
    job = {"image": "a.png", "base": "base.safetensors", "lora": ["ink.safetensors:0.5", "ink.safetensors", "gone:2"]}
    job |= {"motion_lora": ["run:2"], "appearance_lora": ["look"], "noise_prior": "run:0.25", "model": "lab/model"}
    (folder / "job.yaml").write_text(json.dumps(job))
    found = load_job(folder / "job.yaml")
    assert (found.image, found.base) == (str(folder / "a.png"), str(folder / "base.safetensors"))
    assert found.lora == [f"{folder}/ink.safetensors:0.5", f"{folder}/ink.safetensors", "gone:2"]
    assert (found.motion_lora, found.appearance_lora) == ([f"{folder}/run:2"], [f"{folder}/look"])
    assert (found.noise_prior, found.model) == (f"{folder}/run:0.25", "lab/model")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_one_line_with_a_remedy(error, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr(sample, "prepare", fail)
    output = ["--output", str(tmp_path / "out")]
    assert sample.main(output) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory ran out (")
    for option in re.findall("--[a-z-]+", line):
        assert option in sample.parser().format_help()
    assert "--decode-chunk-size 1" in line
    monkeypatch.setattr(sample, "prepare", lambda _: 1 + torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        sample.main(output)
