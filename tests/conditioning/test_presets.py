import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imageconductor.conditioning import (
    CAMERA_PRESETS,
    OBJECT_PRESETS,
    PRESET_HELP,
    camera_motion,
    camera_preset,
    object_preset,
)
from imageconductor.conditioning.trajectories import inside

sizes = st.tuples(st.integers(1, 500), st.integers(1, 500))


def test_ten_of_each_and_each_explained():
    assert len(set(CAMERA_PRESETS)) == len(set(OBJECT_PRESETS)) == 10
    assert set(PRESET_HELP) == {*CAMERA_PRESETS, *OBJECT_PRESETS}


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("pan-left", (1, 0)),
        ("pan-right", (-1, 0)),
        ("pan-up", (0, 1)),
        ("pan-down", (0, -1)),
        ("pan-up-left", (0.5**0.5, 0.5**0.5)),
        ("pan-down-right", (-(0.5**0.5), -(0.5**0.5))),
    ],
)
def test_the_scene_moves_against_the_camera(name, direction):
    points = camera_preset(name, (384, 256), 16, strength=0.5).points
    reach = torch.tensor(direction, dtype=torch.float64) * 0.5 * 0.225 * 256
    torch.testing.assert_close(points[:, -1] - points[:, 0], reach.expand(9, 2))


def test_zoom_and_roll_move_about_the_centre():
    def ends(name):
        points = camera_preset(name, (301, 201), 8, grid=(5, 3)).points - torch.tensor([150.0, 100.0])
        return points[:, 0], points[:, -1]

    for name, factor in (("zoom-in", 1.45), ("zoom-out", 1 / 1.45)):
        start, end = ends(name)
        torch.testing.assert_close(end, start * factor)
    start, end = ends("roll")
    torch.testing.assert_close(end.norm(dim=-1), start.norm(dim=-1))
    cross = start[:, 0] * end[:, 1] - start[:, 1] * end[:, 0]
    assert (cross[start.norm(dim=-1) > 1] < 0).all()  # y points down: negative is counter-clockwise


# Track 0 in frame 7 and track 7 in frame 15 of 384x256x16 at strength 1.25, and how many points are visible.
AS_IT_WAS = {
    "pan-left": ([97.1, 42.166666667], [263.5, 212.833333333], 138),
    "pan-right": ([29.9, 42.166666667], [119.5, 212.833333333], 138),
    "pan-up": ([63.5, 75.766666667], [191.5, 284.833333333], 123),
    "pan-down": ([63.5, 8.566666667], [191.5, 140.833333333], 123),
    "zoom-in": ([29.9, 19.766666667], [191.5, 260.833333333], 128),
    "zoom-out": ([90.113861386, 59.909240924], [191.5, 182.113333333], 144),
    "pan-up-left": ([87.258787848, 65.925454515], [242.411688245, 263.745021579], 135),
    "pan-down-right": ([39.741212152, 18.407878819], [140.588311755, 161.921645088], 135),
    "pan-down-up": ([63.5, -25.033333333], [191.5, 212.833333333], 111),
    "roll": ([45.741100192, 78.305275645], [237.008494808, 199.685557268], 134),
}


@pytest.mark.parametrize("name", CAMERA_PRESETS)
def test_a_preset_is_the_motion_that_it_was(name):
    tracks = camera_preset(name, (384, 256), 16, strength=1.25)
    first, second, visible = AS_IT_WAS[name]
    assert tracks.points[0, 7].tolist() == pytest.approx(first, abs=1e-8)
    assert tracks.points[7, 15].tolist() == pytest.approx(second, abs=1e-8)
    assert int(tracks.visible.sum()) == visible


def test_amounts_of_the_camera_are_parts_of_the_shorter_side():
    centre = torch.tensor([199.5, 99.5])

    def ends(**amounts):
        points = camera_motion((400, 200), 5, grid=(2, 2), **amounts).points - centre
        return points[:, 0], points[:, -1]

    start, end = ends(pan=(0.25, -0.1))
    torch.testing.assert_close(end - start, torch.tensor([-50.0, 20.0], dtype=torch.float64).expand(4, 2))
    start, end = ends(zoom=0.5)
    torch.testing.assert_close(end, 2 * start)
    start, end = ends(zoom=-0.5)
    torch.testing.assert_close(end, start / 2)
    start, end = ends(roll=90)  # clockwise: what was at the right is at the top
    torch.testing.assert_close(end, torch.stack([start[:, 1], -start[:, 0]], dim=-1))


def test_a_camera_moves_between_its_start_and_end():
    points = camera_motion((64, 64), 16, pan=(0.5, 0), start=5, end=10, easing="ease-in-out").points[4, :, 0]
    assert (points[:6] == points[0]).all()
    torch.testing.assert_close(points[10:], (points[0] - 32).expand(6))
    steps = points[5:11].diff().abs()
    assert steps[0] < steps[2] > steps[4]


def test_a_camera_that_does_not_move_holds_still():
    tracks = camera_motion((64, 64), 4)
    assert tracks.still.all()
    assert tracks.visible.all()
    assert not camera_motion((64, 64), 4, roll=1).still.any()


def test_there_and_back_returns():
    points = camera_preset("pan-down-up", (64, 48), 9).points
    torch.testing.assert_close(points[:, -1], points[:, 0])
    assert (points[:, 4, 1] < points[:, 0, 1]).all()


def test_a_track_that_left_stays_invisible():
    tracks = camera_preset("pan-down-up", (64, 48), 9, strength=2)
    assert inside(tracks.points, tracks.size)[0, -1]  # the first track starts at the top
    assert tracks.visible[0, 0]
    assert not tracks.visible[0, -1]


@given(st.sampled_from(CAMERA_PRESETS), sizes, st.integers(1, 20), st.floats(0.1, 5))
def test_camera_tracks_start_inside_and_are_seen_only_inside(name, size, num_frames, strength):
    tracks = camera_preset(name, size, num_frames, strength=strength, grid=(3, 2))
    assert tracks.points.shape == (6, num_frames, 2)
    assert tracks.visible[:, 0].all()
    assert inside(tracks.points, size)[tracks.visible].all()


@given(st.sampled_from(OBJECT_PRESETS), sizes, st.integers(1, 20), st.floats(0.1, 5), st.floats(0, 0.999), st.data())
def test_object_paths_start_where_asked_and_stay_inside(name, size, num_frames, strength, fx, data):
    start = (fx * size[0], data.draw(st.floats(0, 0.999)) * size[1])
    tracks = object_preset(name, size, num_frames, start=start, strength=strength)
    assert tracks.points.shape == (1, num_frames, 2)
    assert inside(tracks.points, size).all()
    torch.testing.assert_close(tracks.points[0, 0], torch.tensor(start, dtype=torch.float64))


def test_a_path_too_long_for_the_frame_is_scaled_as_a_whole(caplog):
    free = object_preset("s-curve", (1000, 1000), 9, start=(500, 500)).points[0] - 500
    with caplog.at_level(logging.WARNING):
        tight = object_preset("s-curve", (1000, 1000), 9, start=(899, 500)).points[0] - torch.tensor([899.0, 500.0])
    torch.testing.assert_close(tight, free * 100 / 225)
    assert "44 %" in caplog.text


def test_unknown_names_and_bad_values():
    with pytest.raises(ValueError, match=r"'pan-lft'; did you mean pan-left.*pan-right.*roll"):
        camera_preset("pan-lft", (64, 64), 4)
    with pytest.raises(ValueError, match=r"unknown object preset 'pan-left'; .*There are: line-right"):
        object_preset("pan-left", (64, 64), 4, start=(1, 1))
    with pytest.raises(ValueError, match=r"start \(64, 1\) lies outside the 64x64"):
        object_preset("arc", (64, 64), 4, start=(64, 1))
    with pytest.raises(ValueError, match="strength must be positive, got -1"):
        camera_preset("roll", (64, 64), 4, strength=-1)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        camera_preset("roll", (64, 64), 0)
    with pytest.raises(ValueError, match="grid must have at least one column"):
        camera_preset("roll", (64, 64), 4, grid=(0, 3))
