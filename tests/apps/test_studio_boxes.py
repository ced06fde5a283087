"""Requests with boxes, to a model that has gates: their files, what repeats them, resuming, refusals."""

import re

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from imageconductor.apps.engine import Engine
from imageconductor.apps.form import Form
from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.results import Result, measure_background
from imageconductor.apps.studio import Studio
from imageconductor.apps.visits import Visits
from imageconductor.conditioning import Boxes, Trajectories
from imageconductor.sampling.job import SampleJob
from imageconductor.sampling.job_files import load_job

STAR = {"name": "star", "boxes": [[8, 8, 40, 40], [20, 20, 60, 64]], "frames": [0, 3]}
DRAWING = {"width": 64, "height": 64, "num_frames": 4, "tracks": [], "objects": [STAR]}


@pytest.fixture(scope="module")
def studio(gated_model, tmp_path_factory):
    engine = Engine(SampleJob(model=str(gated_model), device="cpu"), Limits(results=3))
    yield Studio(engine, Visits(tmp_path_factory.mktemp("visits"), engine.limits))
    engine.close()


@pytest.fixture
def visit(studio, request):
    return studio.visits.find(request.node.name)


@pytest.fixture(scope="module")
def form(tmp_path_factory) -> Form:
    path = tmp_path_factory.mktemp("uploads") / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    return Form(picture=str(path), drawing=DRAWING, prompt="a star", seed=3, steps=2)


def change(form, **changes) -> Form:
    return Form(**{**vars(form), **changes})


def make(studio, visit, form, **options) -> Result:
    *_, last = studio.make(visit, form, **options)
    assert isinstance(last, Result)
    return last


def frames(result):
    return iio.imread(result.find("video.mp4", 3), plugin="FFMPEG")


def test_boxes_act_are_among_the_files_and_run_yaml_repeats_them(studio, visit, form):
    asked = change(form, scene_guidance_scale=2.5, gated_fraction=0.5)
    result = make(studio, visit, asked)
    assert result.title.startswith("1: boxes, seed 3")
    assert result.drawing == DRAWING
    boxes = Boxes.load(result.folder / "boxes.json", 4)
    assert (boxes.names, boxes.size) == (("star",), (32, 32))
    assert boxes.xyxy[0, [0, 3]].tolist() == [[4, 4, 20, 20], [10, 10, 30, 32]]
    assert not np.array_equal(iio.imread(result.find("overlay.mp4", 3), plugin="FFMPEG"), frames(result))
    job = load_job(result.folder / "run.yaml")
    assert (job.scene_guidance_scale, job.first_frame_by, job.gated_fraction) == (2.5, "both", 0.5)
    *_, again = studio.repeat(visit, result.number)  # from run.yaml
    assert np.array_equal(frames(again), frames(result))
    assert (again.folder / "boxes.json").read_bytes() == (result.folder / "boxes.json").read_bytes()
    assert not list(visit.folder.glob("boxes-*"))


def test_a_result_is_taken_up_again_with_other_boxes(studio, visit, form):
    whole = make(studio, visit, form)
    same = make(studio, visit, form, resumed=(whole.number, 1))
    assert np.array_equal(frames(same), frames(whole))
    moved = {**DRAWING, "objects": [{**STAR, "boxes": [[0, 0, 16, 16], [0, 40, 20, 64]]}]}
    other = make(studio, visit, change(form, drawing=moved), resumed=(whole.number, 1))
    assert not np.array_equal(frames(other), frames(whole))


def test_without_boxes_the_settings_of_the_gates_say_nothing(studio, visit, form):
    job = make(studio, visit, change(form, drawing=None, scene_guidance_scale=3.0, gated_fraction=0.2, steps=1)).job
    assert (job.scene_guidance_scale, job.first_frame_by, job.gated_fraction) == (1, "controlnet", 1)
    asked = change(form, drawing=None, scene_guidance_scale=3.0, first_frame_by="gates", steps=1)
    job = make(studio, visit, asked).job
    assert (job.scene_guidance_scale, job.first_frame_by) == (3, "gates")


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"drawing": {**DRAWING, "objects": [{**STAR, "name": ""}]}}, "drawing", "box 1 has no name"),
        ({"drawing": {**DRAWING, "objects": [STAR] * 5}}, "drawing", "5 boxes, this model takes at most 4"),
        (
            {"drawing": {**DRAWING, "objects": [{**STAR, "name": "<|endoftext|>"}]}},
            "drawing",
            "does not know the class name",
        ),
        ({"drawing": {**DRAWING, "objects": [{**STAR, "name": "\u4e2d" * 30}]}}, "drawing", "tokens"),
        ({"scene_guidance_scale": float("nan")}, "scales", "the guidance by boxes"),
        ({"gated_fraction": 1.5}, "scales", "from 0 to 1, got 1.5"),
        ({"first_frame_by": "magic"}, "scales", "automatic, controlnet, gates, both"),
        ({"picture": None, "first_frame_by": "gates"}, "scales", "needs a picture of frame 0"),
    ],
)
def test_refusals_stand_beside_the_field_that_they_concern(studio, visit, form, changes, field, said):
    with pytest.raises(FieldError) as caught:
        list(studio.make(visit, change(form, **changes)))
    assert (caught.value.field, said in str(caught.value)) == (field, True), str(caught.value)
    assert str(visit.folder) not in str(caught.value)
    assert not list(visit.folder.iterdir())


def test_background_displacement_keeps_away_from_boxes():
    video = np.random.default_rng(0).integers(0, 255, (1, 96, 128, 3), np.uint8).repeat(4, axis=0)
    still = Trajectories.from_tracks([[[120, 90]]], (128, 96), 4)

    def count(*corners):
        box = torch.tensor([corners], dtype=torch.float64).expand(1, 4, 4)
        words = measure_background(video, still, Boxes(box, torch.ones(1, 4, dtype=torch.bool), ("wall",), (128, 96)))
        found = re.search(r"median of (\d+) points", words)
        return 0 if "covers the picture" in words else int(found[1])

    left, right = count(0, 0, 45, 96), count(83, 0, 128, 96)
    assert 0 < left < right  # the track is on the right, so a box there takes fewer points away
    assert count(4, 4, 124, 92) == 0  # within the box too, far from its sides
