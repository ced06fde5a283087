"""`mix` of a job: the mixing board as a setting, which run.yaml records."""

import json
import shutil
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from imageconductor import config as config_file
from imageconductor.commands import sample
from imageconductor.sampling.job import Inputs, SampleJob, call_arguments, prepare
from imageconductor.sampling.job_files import change_job, load_job


@pytest.fixture
def options(tiny_model, tmp_path):
    Image.new("RGB", (32, 32), (90, 120, 30)).save(tmp_path / "picture.png")
    return ["--model", str(tiny_model), "--image", str(tmp_path / "picture.png"), "--device", "cpu", "--steps", "1"]


def test_the_command_takes_weights_and_run_yaml_repeats_them(options, tmp_path):
    drawn = ["--preset", "line-right", "--output"]
    assert sample.main([*options, "--mix", "0.5", "2", "0", *drawn, str(tmp_path / "a")]) == 0
    assert sample.main([*options, "--mix", "-3", "0", "4", *drawn, str(tmp_path / "b")]) == 0
    assert sample.main(["--config", str(tmp_path / "a" / "run.yaml"), "--output", str(tmp_path / "c")]) == 0
    assert load_job(tmp_path / "a" / "run.yaml").mix == (0.5, 2.0, 0.0)
    a, b, c = (iio.imread(tmp_path / name / "video-0.mp4", plugin="FFMPEG") for name in "abc")
    assert np.array_equal(a, c)
    assert not np.array_equal(a, b)


def test_weights_reach_the_pipeline_by_name_in_place_of_the_models_scale(tiny_model):
    job = SampleJob(model=str(tiny_model), prompt="a cat", preset="line-right", mix=(1.0, 2.0, 3.0), device="cpu")
    arguments = call_arguments([prepare(job)])
    assert arguments["mix"] == {"camera": 1.0, "object": 2.0, "mixed": 3.0}
    assert arguments["trajectory_guidance_scale"] == 1
    without = call_arguments([prepare(SampleJob(model=str(tiny_model), prompt="a cat", device="cpu"))])
    assert without["mix"] is None


@pytest.fixture(scope="module")
def guided_model(tiny_model, tmp_path_factory):
    """One with guidance by trajectories of its own."""
    model = tmp_path_factory.mktemp("guided") / "model"
    shutil.copytree(tiny_model, model)
    index = model / "model_index.json"
    values = json.loads(index.read_text())
    values["sampling_defaults"]["trajectory_guidance_scale"] = 2.0
    index.write_text(json.dumps(values))
    return model


def test_the_end_of_a_mix_brings_the_models_scale_back(guided_model):
    job = SampleJob(model=str(guided_model), prompt="a cat", preset="line-right", mix=(0, 2, 0), device="cpu")
    mixed = prepare(job).job
    assert mixed.trajectory_guidance_scale == 1.0
    apart = prepare(change_job(mixed, {"mix": None, "control": "object"})).job
    assert apart.trajectory_guidance_scale == 2.0


def test_a_scale_of_trajectories_that_are_not_there_is_refused_where_it_was_asked_for(guided_model, tmp_path):
    """The model's own is no reason to refuse, also in a record of an earlier version, which kept it."""
    job = SampleJob(model=str(guided_model), prompt="a cat", device="cpu")
    with pytest.raises(
        ValueError, match=r"trajectory_guidance_scale 1.5 weighs .*, or leave trajectory_guidance_scale"
    ):
        prepare(replace(job, trajectory_guidance_scale=1.5))
    prepare(replace(job, trajectory_guidance_scale=1.0))
    inputs = prepare(job)
    assert prepare(inputs.job).job == inputs.job
    assert prepare(change_job(inputs.job, {"preset": "line-right"})).job.trajectory_guidance_scale == 2.0
    of_evaluation = Inputs(replace(inputs.job, trajectory_guidance_scale=1.5), inputs.image, inputs.trajectories)
    assert call_arguments([of_evaluation])["trajectory_guidance_scale"] is None
    config_file.save(replace(inputs.job, trajectory_guidance_scale=2.0), tmp_path / "run.yaml")
    assert prepare(load_job(tmp_path / "run.yaml")).job.trajectory_guidance_scale is None


@pytest.mark.parametrize(
    ("recorded", "changes", "expected"),
    [  # control, mix, camera_free_scale, trajectory_guidance_scale
        ({"mix": (0, 1, 0)}, {"preset": "pan-left"}, ("camera", None, None, 2.0)),
        ({"mix": (0, 1, 0)}, {"control": "camera"}, ("camera", None, None, 2.0)),
        ({"mix": (0, 1, 0)}, {"camera_free_scale": 1.5}, ("object", None, 1.5, 2.0)),
        ({"mix": (0, 1, 0)}, {"trajectory_guidance_scale": 3.0}, ("object", None, None, 3.0)),
        ({"mix": (0, 1, 0)}, {"trajectory_guidance_scale": 1.0}, ("object", (0, 1, 0), None, 1.0)),
        ({"mix": (0, 1, 0)}, {"seed": [4]}, ("object", (0, 1, 0), None, 1.0)),
        ({"camera_free_scale": 1.5}, {"mix": (1, 0, 0)}, ("object", (1, 0, 0), None, 1.0)),
        ({"camera_free_scale": 1.5}, {"control": "camera"}, ("camera", None, None, 2.0)),
        ({"camera_free_scale": 1.5}, {"control": "object"}, ("object", None, 1.5, 2.0)),
        ({"trajectory_guidance_scale": 3.0}, {"mix": (1, 0, 0)}, ("object", (1, 0, 0), None, 1.0)),
    ],
)
def test_of_a_records_mix_control_and_scales_the_last_asked_for_stays(guided_model, recorded, changes, expected):
    job = SampleJob(model=str(guided_model), prompt="a cat", preset="line-right", device="cpu", **recorded)
    new = prepare(change_job(prepare(job).job, changes)).job
    assert (new.control, new.mix, new.camera_free_scale, new.trajectory_guidance_scale) == expected


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "weighs what trajectories do"),
        (["--preset", "line-right", "--camera-free-scale", "1.5"], "excludes camera_free_scale"),
        (["--preset", "line-right", "--trajectory-guidance-scale", "2"], "excludes camera_free_scale and trajectory"),
    ],
)
def test_what_does_not_go_with_it(options, tmp_path, capsys, more, said):
    assert sample.main([*options, "--mix", "1", "1", "0", *more, "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
