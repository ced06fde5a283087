"""What a job asks of the pipeline."""

import numpy as np
import torch
from PIL import Image

from imageconductor.sampling.job import SampleJob, call_arguments, load_pipeline, prepare, render
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
