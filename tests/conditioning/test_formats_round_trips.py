"""What is written in one form and read, written in another and read again, is the same within what the forms hold."""

import itertools

import numpy as np
import pytest

from imageconductor.conditioning import Trajectories
from imageconductor.conditioning.formats import FORMATS, list_written, read_tracks, write_tracks, written_formats
from imageconductor.conditioning.interpolation import place_track
from imageconductor.conditioning.trajectory_json import Track

SIZE = (384, 256)
FRAMES = 121
ERROR_PX = {"kjnodes": 0.5, "ltx": 0.5, "tora": 0.5 * SIZE[0] / 256}
"""Half a step of the forms that round; others keep float32."""


def clip(*, measured):
    t = np.linspace(0, 1, FRAMES)
    curve = np.stack([20 + 340 * t, 128 + 100 * np.sin(6 * t)], -1)
    line = np.stack([300 - 200 * t, 40 + 150 * t], -1)
    visible = np.ones((2, FRAMES), bool)
    if measured:
        curve = curve + np.array([60, 0])  # leaves the frame to the right
        visible[0, 30:50] = visible[1, -20:] = False
    tracks = [Track(curve, visible[0], per_frame=True), Track(line, visible[1], per_frame=True)]
    return [*tracks, Track(np.array([[50.25, 60.75]]), np.ones(1, bool))]


def through(name, tracks, folder):
    folder.mkdir()
    written = write_tracks(str(folder / "file.npy"), tracks, SIZE, name, num_frames=FRAMES)
    assert sorted(folder.iterdir()) == sorted(written.paths)
    assert written.paths == list_written(str(folder / "file.npy"), len(tracks), name)
    paths = written.paths if name == "tora" else written.paths[0]
    # What the content of a file tells without its name, apart from the two of the same shape.
    file = read_tracks(paths, drawn_size=SIZE, format="ltx" if name == "ltx" else None)
    assert file.format == name
    assert file.size == SIZE
    return file.tracks


def interpolate(tracks, num_frames):
    points, visible = zip(*[place_track(track, num_frames) for track in tracks], strict=True)
    return np.stack(points), np.stack(visible)


@pytest.mark.parametrize(("first", "second"), itertools.product(written_formats(), repeat=2))
def test_drawn_tracks_pass_every_pair(first, second, tmp_path):
    tracks = clip(measured=False)
    again = through(second, through(first, tracks, tmp_path / "1"), tmp_path / "2")
    expected, actual = interpolate(tracks, FRAMES), interpolate(again, FRAMES)
    allowed = ERROR_PX.get(first, 0) + ERROR_PX.get(second, 0) + 1e-3
    assert np.abs(actual[0] - expected[0]).max() <= allowed
    assert actual[1].all()
    assert [len(track.points) == 1 for track in again] == [False, False, True]


HOLDS_ALL = [name for name, form in FORMATS.items() if form.write and form.has_visibility and form.has_outside]


@pytest.mark.parametrize(("first", "second"), itertools.product(HOLDS_ALL, repeat=2))
def test_hidden_points_and_points_outside_pass(first, second, tmp_path):
    tracks = clip(measured=True)
    again = through(second, through(first, tracks, tmp_path / "1"), tmp_path / "2")
    expected, actual = interpolate(tracks, FRAMES), interpolate(again, FRAMES)
    assert np.array_equal(actual[1], expected[1])
    seen = expected[1]
    assert np.abs(actual[0] - expected[0])[seen].max() < 1e-3
    assert (np.abs(actual[0] - expected[0])[~seen] < 40).all(), "hidden positions stay between their neighbours"


def test_what_is_lost_is_said(tmp_path):
    tracks = clip(measured=True)
    hidden = sum(int((~track.visible).sum()) for track in tracks)

    def notes(name, **options):
        return " | ".join(write_tracks(tmp_path / "f.txt", tracks, SIZE, name, **options).notes)

    published = notes("published")
    assert f"no visibility; {hidden} hidden points" in published
    assert "no points outside the frame" in published
    assert "no frame size; this one is 384x256" in published
    assert "resampled" not in published
    assert "rounded" in notes("tora")
    assert "were hidden" in notes("wangp")
    assert notes("imageconductor") == ""
    drawn = write_tracks(tmp_path / "f.txt", clip(measured=False), SIZE, "published").notes
    assert drawn == ("published holds no frame size; this one is 384x256",)
    assert "resampled to 16 points" in notes("wan-move", num_frames=16)
    assert "takes 81 frames or other 4n+1" in notes("wan-move", num_frames=16)
    # A border point of the frame has to be readable again.
    write_tracks(tmp_path / "f.json", tracks, SIZE, "published")
    assert read_tracks(tmp_path / "f.json", drawn_size=SIZE).format == "published"


def test_frames_that_tools_expect(tmp_path):
    drawn = [Track(np.array([[1.0, 2.0], [30.0, 40.0], [90.0, 7.0]]), np.ones(3, bool))]

    def count(name, tracks):
        written = write_tracks(tmp_path / "f", tracks, SIZE, name)
        return len(read_tracks(written.paths[0], drawn_size=SIZE).tracks[0].points)

    assert {name: count(name, drawn) for name in ("imageconductor", "kjnodes", "ltx", "wan-move", "ati", "tora")} == {
        "imageconductor": 3,
        "kjnodes": 16,
        "ltx": 121,
        "wan-move": 81,
        "ati": 121,
        "tora": 49,
    }
    curve = Trajectories.from_tracks([[[1, 2], [30, 40], [90, 7]]], SIZE, 49).to_tracks()
    assert count("wan-move", curve) == 49, "of the form 4n + 1, so it is kept"
    assert count("ati", curve) == 121


def test_wangp_hides_what_would_turn_all_into_pixels(tmp_path):
    again = through("wangp", clip(measured=True), tmp_path / "1")
    assert np.load(tmp_path / "1" / "file.npy").max() <= 1
    expected = interpolate(clip(measured=True), FRAMES)
    inside = (expected[0][0] <= SIZE).all(-1)
    assert np.array_equal(again[0].visible, expected[1][0] & inside)


def test_written_values_are_those_of_the_tools(tmp_path):
    import io

    import torch

    track = [Track(np.array([[10.0, 20.0], [11.0, 22.0]]), np.array([True, False]), per_frame=True)]
    path = tmp_path / "f.pth"
    write_tracks(path, track, SIZE, "ati", num_frames=2)
    array = np.load(io.BytesIO(torch.load(path, weights_only=True)))["array"]
    assert array.dtype == np.float32
    assert array.tolist() == [[[[84, 164, 8]], [[0, 0, 0]]]], "8 (x + 1/2), 8 (y + 1/2), 8"
    write_tracks(tmp_path / "a_tracks.npy", track, SIZE, "wan-move", num_frames=2)
    assert np.load(tmp_path / "a_tracks.npy").shape == (1, 2, 1, 2)
    assert np.load(tmp_path / "a_visibility.npy").tolist() == [[[True], [False]]]
    write_tracks(tmp_path / "f.json", track, SIZE, "kjnodes", num_frames=2)
    assert (tmp_path / "f.json").read_text() == '[{"x": 10, "y": 20}, {"x": 11, "y": 22}]', "flat for one"
    write_tracks(tmp_path / "f.json", track, SIZE, "ltx", num_frames=2)
    assert (tmp_path / "f.json").read_text().startswith('[[{"x": 10')
    write_tracks(tmp_path / "f.txt", track, (20, 40), "tora", num_frames=2)
    assert (tmp_path / "f.txt").read_text() == "128,128\n141,141\n"
    border = [Track(np.array([[19.99, 39.99], [0.0, 0.0]]), np.ones(2, bool), per_frame=True)]
    write_tracks(tmp_path / "f.txt", border, (20, 40), "tora", num_frames=2)
    assert (tmp_path / "f.txt").read_text() == "255,255\n0,0\n", "inside of any picture"


def test_refusals_before_anything_is_written(tmp_path):
    track = [Track(np.array([[np.nan, 20.0]]), np.ones(1, bool))]
    with pytest.raises(ValueError, match="track 0 has points that are not finite"):
        write_tracks(tmp_path / "f", track, SIZE, "ati")
    with pytest.raises(ValueError, match="there are no tracks"):
        write_tracks(tmp_path / "f", [], SIZE, "ati")
    with pytest.raises(ValueError, match="sg-i2v files are read and not written"):
        write_tracks(tmp_path / "f", track, SIZE, "sg-i2v")
    assert not list(tmp_path.iterdir())
