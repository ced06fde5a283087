"""Motion from footage: the command that writes it as a drawing, and sampling that takes it directly."""

import json

import numpy as np
import pytest
import torch
from footage import pan, texture, write, write_cotracker
from PIL import Image

import sample
from imageconductor.commands.tracks import main
from imageconductor.conditioning import Trajectories, cover_crop, load_image
from imageconductor.data import video_motion
from imageconductor.data.trackers import LucasKanadeTracker
from imageconductor.data.video_motion import Footage, take_motion, track_footage
from imageconductor.sampling.job import SampleJob, prepare

SIZE, VELOCITY = (192, 128), (2.0, -1.0)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write(tmp_path_factory.mktemp("video") / "pan.mp4", pan(3, 20, VELOCITY))


def shifts(tracks):
    """Displacement (N, 2) from the first frame to the last one."""
    return (tracks.points[:, -1] - tracks.points[:, 0]).numpy()


def test_points_are_followed_and_written_as_a_drawing(video, tmp_path, capsys):
    out = tmp_path / "deep" / "tracks.json"
    assert main([str(video), str(out), "--points", "60,70", "100.5,64", "--frames", "16"]) == 0
    tracks = Trajectories.load(out, 16)
    assert tracks.size == SIZE
    assert tracks.points[:, 0].tolist() == pytest.approx(np.array([[60, 70], [100.5, 64]]))
    assert shifts(tracks) == pytest.approx(np.tile([30.0, -15.0], (2, 1)), abs=0.7)
    assert capsys.readouterr().out == f"{out}: 2 of 2 points followed through 16 frames\n"


def test_start_stride_and_what_leaves_the_frame(video, tmp_path, capsys):
    out = tmp_path / "tracks.json"
    options = ["--points", "60,70", "188,64", "--frames", "4", "--stride", "5", "--start-frame", "2"]
    assert main([str(video), str(out), *options]) == 0
    tracks = Trajectories.load(out, 4)
    assert shifts(tracks)[0] == pytest.approx([30, -15], abs=0.7)
    assert tracks.visible.tolist() == [[True] * 4, [True, False, False, False]]
    assert tracks.points[1, 3].tolist() == pytest.approx(tracks.points[1, 1].tolist()), "stays where it was seen last"
    assert "1 of 2 points followed through 4 frames, 1 were lost or left the frame" in capsys.readouterr().out


def test_a_size_crops_as_an_image_is_cropped(video, tmp_path):
    out = tmp_path / "tracks.json"
    assert main([str(video), str(out), "--grid", "2", "--size", "64x64"]) == 0
    tracks = Trajectories.load(out, 20)
    assert tracks.size == (64, 64)
    assert tracks.points[:, 0].numpy() == pytest.approx(
        np.array([[15.5, 15.5], [47.5, 15.5], [15.5, 47.5], [47.5, 47.5]])
    )
    followed = tracks.visible.all(dim=1)
    assert followed.any()
    assert shifts(tracks)[followed] == pytest.approx(np.tile([19, -9.5], (int(followed.sum()), 1)), abs=0.5)


BAD = {
    "missing": (["nowhere.mp4"], "nowhere.mp4: no such video file"),
    "text": (["{text}"], "note.mp4 cannot be read as a video"),
    "outside": (["{video}", "--points", "5,5", "192,3"], "point 1 at (192, 3) lies outside the 192x128 frame of"),
    "outside the crop": (["{video}", "--points", "5,5", "--size", "64x64"], "point 0 at (5, 5) lies outside the part"),
    "not a number": (["{video}", "--points", "nan,5"], "point 0 at (nan, 5) lies outside"),
    "too short": (["{video}", "--frames", "21"], "pan.mp4 has 20 frames, 21 are needed"),
    "too short for the stride": (["{video}", "--frames", "5", "--stride", "5"], "has 20 frames, 21 are needed"),
    "starts too late": (["{video}", "--start-frame", "19"], "has 20 frames, 21 are needed"),
    "one frame": (["{video}", "--frames", "1"], "--frames must be at least 2"),
    "a stride over all": (["{video}", "--stride", "20"], "--stride 20 leaves one of its 20 frames"),
    "too fine a grid": (["{video}", "--grid", "17"], "--grid must be at most 16, got 17"),
    "a folder": (["{video}"], "is a folder; name a file such as"),
    "no CoTracker": (["{video}", "--tracker", "cotracker", "--cotracker", "{folder}"], "CoTracker cannot be loaded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, video, tmp_path, capsys, monkeypatch):
    (tmp_path / "note.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    (path, *options), message = BAD[name]
    places = {"video": video, "text": tmp_path / "note.mp4", "folder": tmp_path / "empty"}
    out = tmp_path if name == "a folder" else tmp_path / "tracks.json"
    before = set(tmp_path.iterdir())
    assert main([path.format(**places), str(out), *(option.format(**places) for option in options)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert set(tmp_path.iterdir()) == before


def test_arguments_that_cannot_be_read_are_refused(video, tmp_path, capsys):
    for options, message in (
        (["--size", "64"], "size must be WIDTHxHEIGHT in pixels, such as 576x320, got '64'"),
        (["--points", "5,", "6"], "expected X,Y, got '5,'"),
        (["--grid", "0"], "must be at least 1, got 0"),
        (["--grid", "2", "--points", "5,5"], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit):
            main([str(video), str(tmp_path / "out.json"), *options])
        assert message in capsys.readouterr().err


def test_noise_cannot_be_followed_and_length_has_a_limit(tmp_path, capsys, monkeypatch):
    random = np.random.default_rng(0)
    noise = write(tmp_path / "noise.mp4", random.integers(0, 255, (6, 64, 64, 3), dtype=np.uint8))
    assert main([str(noise), str(tmp_path / "out.json"), "--points", "32,32"]) == 2
    assert "none of the 1 points could be followed; take points on edges" in capsys.readouterr().err
    monkeypatch.setattr(video_motion, "MAX_FRAMES", 5)
    assert main([str(noise), str(tmp_path / "out.json")]) == 2
    assert "goes on for more than 5 frames" in capsys.readouterr().err


def test_cotracker_follows_too(video, tmp_path):
    write_cotracker(tmp_path / "clone")
    out = tmp_path / "tracks.json"
    options = ["--tracker", "cotracker", "--cotracker", str(tmp_path / "clone"), "--points", "10,20", "--frames", "4"]
    assert main([str(video), str(out), *options]) == 0
    assert Trajectories.load(out, 4).visible[0].all()


def test_chunks_change_nothing_and_large_frames_are_measured_in_their_own_pixels():
    frames = pan(5, 20, (1.5, 0.5), (96, 64))
    points = np.array([[30.0, 30.0], [50.0, 40.0], [90.0, 20.0]])
    told = []
    ours = track_footage(Footage(frames, (96, 64), "pan"), points, on_frames=told.append)
    positions, followed = LucasKanadeTracker().track(frames, points)
    assert torch.equal(ours.visible, torch.from_numpy(followed))
    assert ours.points.numpy()[followed] == pytest.approx(positions[followed], abs=1e-2)
    assert sum(told) == 19
    doubled = track_footage(Footage(frames, (192, 128), "pan"), 2 * points + 0.5)
    assert doubled.points.numpy()[followed] == pytest.approx(2 * ours.points.numpy()[followed] + 0.5, abs=1e-2)


def test_sampling_takes_the_motion_of_a_video(video, tiny_model, tmp_path):
    image = tmp_path / "first.png"
    Image.fromarray(texture(1, (60, 40), 0)).save(image)
    job = SampleJob(model=str(tiny_model), image=str(image), motion_from=str(video))
    inputs = prepare(job)
    assert inputs.trajectories.points.shape == (9, 4, 2)
    assert inputs.trajectories.size == cover_crop(load_image(image), (32, 32)).size
    middle = inputs.trajectories.points[4]
    assert (middle[-1] - middle[0]).tolist() == pytest.approx([19 * 2 / 4, -19 / 4], abs=0.3)
    assert torch.equal(take_motion(video, (32, 32), 4).points, inputs.trajectories.points)


@pytest.mark.slow
def test_a_run_from_a_video_repeats_without_it(tiny_model, tmp_path):
    moving = write(tmp_path / "moving.mp4", pan(4, 8, (3, 0), (96, 96)))
    first, second = tmp_path / "first", tmp_path / "second"
    image = tmp_path / "first.png"
    Image.fromarray(texture(1, (32, 32), 0)).save(image)
    common = ["--model", str(tiny_model), "--image", str(image), "--steps", "1"]
    assert sample.main([*common, "--motion-from", str(moving), "--output", str(first)]) == 0
    moving.unlink()
    assert sample.main(["--config", str(first / "run.yaml"), "--output", str(second)]) == 0
    for name in ("video-0.mp4", "overlay-0.mp4", "trajectories.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    visible = [track.get("visible") for track in json.loads((first / "trajectories.json").read_text())["tracks"]]
    assert any(visible), "points that leave the frame are hidden"
