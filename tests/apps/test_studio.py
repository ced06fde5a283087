"""From a form to files: what is kept, what repeats it, what is made of it afterwards."""

import importlib
import json
import shutil
import zipfile
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from imageconductor.apps.engine import Engine, Stopped
from imageconductor.apps.form import Form, build_job, list_controls, read_defaults
from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.progress import Step
from imageconductor.apps.results import Result, measure_background
from imageconductor.apps.shelf import Shelf
from imageconductor.apps.studio import Studio
from imageconductor.apps.visits import Visits
from imageconductor.commands import sample
from imageconductor.conditioning import Trajectories
from imageconductor.sampling.job import SampleJob, prepare

DRAWING = {"width": 64, "height": 64, "tracks": [{"points": [[8, 8], [40, 48]]}, {"points": [[50, 20]]}]}
LOST = {"points": [[10, 8], [40, 48]]}  # beside the middle of a picture of 200x64


@pytest.fixture(scope="module")
def studio(tiny_model, tmp_path_factory):
    engine = Engine(SampleJob(model=str(tiny_model), device="cpu"), Limits(results=3))
    yield Studio(engine, Visits(tmp_path_factory.mktemp("visits"), engine.limits))
    engine.close()


@pytest.fixture
def visit(studio, request):
    return studio.visits.find(request.node.name)


@pytest.fixture(scope="module")
def form(tmp_path_factory) -> Form:
    path = tmp_path_factory.mktemp("uploads") / "picture.png"
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return Form(picture=str(path), drawing=DRAWING, prompt="a cat", seed=3)


def make(studio, visit, form, **options) -> Result:
    *_, last = studio.make(visit, form, **options)
    assert isinstance(last, Result)
    return last


def change(form, **changes) -> Form:
    return Form(**{**vars(form), **changes})


def frames(path):
    return iio.imread(path, plugin="FFMPEG")


def refused(studio, visit, form, **options) -> FieldError:
    with pytest.raises(FieldError) as caught:
        list(studio.make(visit, form, **options))
    return caught.value


def test_run_yaml_repeats_a_result_frame_by_frame(studio, visit, form, tmp_path):
    result = make(studio, visit, change(form, videos=2))
    assert result.note == ""
    with zipfile.ZipFile(result.folder / "all.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    for place, config in (("a", result.folder), ("b", tmp_path / "unpacked")):
        output = tmp_path / place
        assert sample.main(["--config", str(config / "run.yaml"), "--output", str(output)]) == 0
        for seed in (3, 4):
            assert np.array_equal(frames(output / f"video-{seed}.mp4"), frames(result.find("video.mp4", seed)))
    assert not np.array_equal(frames(tmp_path / "a" / "video-3.mp4"), frames(tmp_path / "a" / "video-4.mp4"))


def test_the_files_of_a_result(studio, visit, form):
    result = make(studio, visit, form)
    gif = Image.open(result.find("video.gif", 3))
    assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (4, (256, 256), 120, 0)
    assert result.find("overlay.mp4", 3).name == "overlay-3.mp4"
    assert result.find("video.mp4", 9) is None
    assert result.drawing == DRAWING
    assert json.loads((result.folder / "trajectories.json").read_text())["width"] == 32
    assert not list(visit.folder.glob("drawing-*"))
    assert len(result.displacement) == 1


def test_scales_that_a_visitor_leaves_alone_are_the_defaults_of_what_is_made(studio, visit, form):
    page_base = pytest.importorskip("gradio") and importlib.import_module("imageconductor.apps.page_base")
    usual = read_defaults(studio.engine.base)
    values = {**vars(form), "look_scale": 1.0, "motion_scale": 1.0, "looks": [], "motions": []}
    values |= {"guidance_scale": usual.guidance_scale, "trajectory_guidance_scale": 2.5}
    for name in ("picture", "drawing", "drawing_size"):
        del values[name]
    events = page_base.PageEvents(studio, SimpleNamespace(settings=SimpleNamespace(names=list(values))))
    found = events.read_form(visit, ("", DRAWING, *values.values()))
    assert (found.guidance_scale, found.trajectory_guidance_scale) == (None, 2.5)


def test_only_the_latest_results_are_kept(studio, visit, form):
    made = [make(studio, visit, change(form, steps=1, seed=seed)) for seed in range(4)]
    assert [result.number for result in visit.results] == [4, 3, 2]
    assert not made[0].folder.exists()
    with pytest.raises(FieldError, match="no longer kept"):
        visit.result(1)


def test_resumed_with_the_same_form_it_is_the_same_and_says_that_run_yaml_is_not(studio, visit, form):
    whole = make(studio, visit, form)
    again = make(studio, visit, change(form, seed=99, steps=7), resumed=(whole.number, 2))  # these stay as they were
    assert again.seeds == [3]
    assert np.array_equal(frames(again.find("video.mp4", 3)), frames(whole.find("video.mp4", 3)))
    assert again.note == f"made from the first 2 steps of result {whole.number}"
    assert (again.folder / "run.yaml").read_text().startswith("# The settings of these videos; it does not repeat")
    other = make(studio, visit, change(form, drawing=None), resumed=(whole.number, 1))
    assert not np.array_equal(frames(other.find("video.mp4", 3)), frames(whole.find("video.mp4", 3)))
    for step in (0, 3):
        assert refused(studio, visit, form, resumed=(whole.number, step)).field == "resume"
    assert refused(studio, visit, form, resumed=(77, 1)).field == "resume"


def test_a_video_that_was_taken_up_is_taken_up_before_and_after_that_step(studio, visit, form):
    whole = make(studio, visit, form)
    other = make(studio, visit, change(form, drawing=None), resumed=(whole.number, 1))
    for result, step in ((whole, 1), (other, 2)):  # Its frames stay, whatever the form says.
        again = make(studio, visit, change(form, drawing=result.drawing, frames=3), resumed=(other.number, step))
        assert np.array_equal(frames(again.find("video.mp4", 3)), frames(result.find("video.mp4", 3)))


def test_a_video_of_several_windows_counts_all_their_steps_and_cannot_be_taken_up(studio, visit, form, tmp_path):
    *events, result = studio.make(visit, change(form, frames=6))
    steps = [(event.done, event.total) for event in events if isinstance(event, Step)]
    assert steps == [(n, 6) for n in range(1, 7)]  # three in each of two windows
    assert sample.main(["--config", str(result.folder / "run.yaml"), "--output", str(tmp_path / "a")]) == 0
    assert np.array_equal(frames(tmp_path / "a" / "video-3.mp4"), frames(result.find("video.mp4", 3)))
    error = refused(studio, visit, change(form, frames=6), resumed=(result.number, 1))
    assert (error.field, str(error)) == ("resume", "a video of more than 4 frames cannot be taken up in between")


def test_a_seed_of_a_sheet_is_refined_into_the_video_that_all_steps_make(studio, visit, form):
    sheet = make(studio, visit, change(form, videos=3, steps=1))
    *_, refined = studio.repeat(visit, sheet.number, seed=[4], steps=3)
    direct = make(studio, visit, change(form, seed=4, steps=3))
    assert np.array_equal(frames(refined.find("video.mp4", 4)), frames(direct.find("video.mp4", 4)))


@pytest.mark.slow  # tests/sampling/test_job_mix.py has the command's part
def test_the_mixing_board_weighs_and_its_run_yaml_repeats(studio, visit, form, tmp_path):
    visit.mix.set(camera=0.5, object=1.0, mixed=0.0)
    result = make(studio, visit, form, uses_mix=True)
    assert sample.main(["--config", str(result.folder / "run.yaml"), "--output", str(tmp_path / "a")]) == 0
    assert np.array_equal(frames(tmp_path / "a" / "video-3.mp4"), frames(result.find("video.mp4", 3)))
    for last in studio.make(visit, change(form, steps=8), uses_mix=True):
        if isinstance(last, Step):
            visit.mix.set(camera=1.5)
    assert last.note == "the mixing board was moved while they were made"
    assert refused(studio, visit, change(form, drawing=None), uses_mix=True).field == "drawing"


def test_without_tracks_there_is_nothing_for_the_camera_free_scale(studio, visit, form):
    *_, last = studio.make(visit, change(form, drawing=None, camera_free_scale=1.5))
    assert isinstance(last, Result), last
    assert last.job.camera_free_scale is None


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"picture": None, "prompt": " "}, "picture", "choose a picture"),
        ({"drawing": {**DRAWING, "tracks": [{"points": [[99, 1]]}]}}, "drawing", "track 0, point 0"),
        ({"drawing": {**DRAWING, "tracks": [{"points": [[1, 1], [9, 9]], "start": 99}]}}, "drawing", "start"),
        ({"drawing_size": (64, 48)}, "drawing", "a picture of 64x64 pixels and not to this one of 64x48"),
        ({"drawing": {**DRAWING, "width": 200, "tracks": [LOST]}}, "drawing", "every track is outside of the bright"),
        ({"prompt": "x" * 3000}, "prompt", "3000 characters"),
        ({"seed": -1}, "seed", "the seed must be"),
        ({"videos": 100}, "seed", "from 1 to 9"),
        ({"steps": 1000}, "steps", "from 1 to 100"),
        ({"frames": 1000}, "frames", "from 1 to 64"),
        ({"control": "all"}, "control", "automatic"),
        ({"control": "camera", "camera_free_scale": 1.5}, "scales", "camera_free_scale"),
        ({"guidance_scale": float("nan")}, "scales", "the guidance scale"),
    ],
)
def test_refusals_stand_beside_the_field_that_they_concern(studio, visit, form, changes, field, said):
    error = refused(studio, visit, change(form, **changes))
    assert (error.field, said in str(error)) == (field, True)
    assert str(visit.folder) not in str(error)
    assert not list(visit.folder.iterdir())


def test_a_result_says_of_which_tracks_the_video_shows_nothing(studio, visit, form):
    kept = {"points": [[100, 8], [90, 48]]}
    wide = change(form, drawing={**DRAWING, "width": 200, "tracks": [kept, LOST, {**LOST, "control": "camera"}]})
    result = make(studio, visit, change(wide, steps=1))
    (said,) = result.cropped
    assert said.startswith("track 1 is outside of the bright part of the picture")
    *_, again = studio.repeat(visit, result.number, seed=[4])
    assert again.cropped == result.cropped
    assert make(studio, visit, change(form, steps=1)).cropped == []


@pytest.mark.parametrize(
    ("lacks", "controls", "expected"),
    [
        ((), ["camera", "object", "mixed", "base"], None),
        (("object",), ["camera", "base"], "camera"),
        (("camera",), ["object", "base"], "object"),
        (("camera", "object"), ["base"], "base"),
    ],
)
def test_a_drawing_moves_what_the_models_loras_can_move(form, tiny_model, tmp_path, lacks, controls, expected):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for name in lacks:
        shutil.rmtree(folder / f"{name}_lora")
    base = SampleJob(model=str(folder), device="cpu")
    job = build_job(form, base, Shelf(), Limits(), tmp_path)
    assert (list_controls(str(folder)), job.control) == (controls, expected)
    prepare(job)  # would refuse a control without its LoRA
    assert build_job(change(form, control="mixed"), base, Shelf(), Limits(), tmp_path).control == "mixed"


def test_the_page_may_have_another_size_than_its_model(form, tiny_model, tmp_path):
    base = SampleJob(model=str(tiny_model), device="cpu", width=48)
    usual = read_defaults(base)
    assert (usual.width, usual.height) == (48, 32)
    inputs = prepare(build_job(form, base, Shelf(), Limits(), tmp_path))
    assert inputs.image is not None
    assert inputs.image.size == inputs.trajectories.size == (48, 32)
    with pytest.raises(FieldError, match="a video of 48 x 32 is larger than allowed"):
        build_job(form, base, Shelf(), Limits(video_pixels=1024), tmp_path)


def test_stopped_while_it_is_decoded_nothing_is_kept(studio, visit, form):
    for last in studio.make(visit, form):
        if isinstance(last, Step) and last.done == last.total:
            visit.stop()
    assert isinstance(last, Stopped)
    assert visit.results == []


def test_a_stopped_request_leaves_nothing(studio, visit, form):
    events = studio.make(visit, form)
    for last in events:  # noqa: B007
        visit.stop()
    assert isinstance(last, Stopped)
    assert visit.results == []
    assert not visit.is_busy


def test_background_displacement_of_a_picture_that_moves_by_two_pixels_a_frame():
    texture = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)
    wide = np.asarray(Image.fromarray(texture).resize((160, 96), Image.Resampling.BICUBIC))
    video = np.stack([wide[:, 2 * t : 2 * t + 128] for t in range(5)])
    still = Trajectories.from_tracks([[[20, 20]]], (128, 96), 5)
    assert measure_background(video, still).startswith("background displacement: 5.0 px")  # mean of 2, 4, 6 and 8
    assert measure_background(video[:1].repeat(5, axis=0), still).startswith("background displacement: 0.0 px")
    everywhere = Trajectories.from_tracks([[[x, y]] for x in range(9, 128, 15) for y in range(9, 96, 15)], (128, 96), 5)
    assert "covers the picture" in measure_background(video, everywhere)
