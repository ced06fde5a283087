"""What a drawing may state beside its points: when and how fast, between which frames, what it moves, the camera."""

import json

import numpy as np
import pytest
import torch
from scipy.interpolate import PchipInterpolator

from imageconductor.conditioning import FlowMapConvention, Trajectories, build_flow_map, camera_motion
from imageconductor.conditioning.trajectories import inside

SIZE = (64, 48)
CORNER = [[10, 8], [40, 8], [40, 38]]


def load(tmp_path, *tracks, length=16, **fields):
    path = tmp_path / "walk.json"
    frame = {"width": SIZE[0], "height": SIZE[1]} if tracks or "camera" not in fields else {}
    path.write_text(json.dumps({**frame, **({"tracks": tracks} if tracks else {}), **fields}))
    return Trajectories.load(path, length, published_size=SIZE)


def xs(tmp_path, **options):
    """The x of a track from 0 to 10 in each of 11 frames."""
    return load_x(load(tmp_path, {"points": [[0, 5], [10, 5]], **options}, length=11))


def load_x(drawn):
    return drawn.points[0, :, 0].tolist()


@pytest.mark.parametrize("num_frames", [2, 3, 15, 16, 33])
def test_a_file_that_states_points_alone_is_the_curve_of_the_release(num_frames, tmp_path):
    drawn = load(tmp_path, {"points": CORNER}, {"points": [[3, 4]]}, length=num_frames)
    curve = PchipInterpolator(np.linspace(0, 1, 3), np.asarray(CORNER, float))(np.linspace(0, 1, num_frames))
    expected = np.asarray(CORNER, float) if num_frames == 3 else curve
    assert drawn.points[0].numpy().tobytes() == expected.tobytes(), "bit for bit: run.yaml of old runs must repeat"
    assert drawn.control is None


def test_a_drawing_of_an_earlier_release_is_where_it_was(tmp_path):
    path = tmp_path / "walk.json"
    path.write_text('{"width": 128, "height": 128, "tracks": [{"points": [[81, 75], [66, 92], [42, 96]]}]}')
    points = Trajectories.load(path, 16).points[0, [1, 5, 9]]
    was = [
        [79.50399999999999, 78.07977425044093],
        [71.84615384615384, 88.37389770723104],
        [62.05292307692307, 93.24495238095237],
    ]
    torch.testing.assert_close(points, torch.tensor(was, dtype=torch.float64), rtol=0, atol=1e-12)


def test_motion_happens_between_start_and_end_and_stands_before_and_after(tmp_path):
    drawn = load(tmp_path, {"points": [[10, 8], [40, 8]], "start": 4, "end": 10})
    assert load_x(drawn) == pytest.approx([10] * 5 + [15, 20, 25, 30, 35] + [40] * 6)
    steps = drawn.points[0].diff(dim=0)
    assert not steps[:4].any()
    assert not steps[10:].any()
    assert drawn.visible.all()
    assert not drawn.still.any()
    field = build_flow_map(drawn, FlowMapConvention(13, 2.0, "peak", still_drift_px=0))[0]
    moves = field.abs().amax((0, 2, 3)) > 0
    assert moves.tolist() == [False] * 5 + [True] * 6 + [False] * 5  # a step is drawn in the frame it ends in


def test_start_or_end_alone(tmp_path):
    assert xs(tmp_path, start=5) == pytest.approx([0] * 6 + [2, 4, 6, 8, 10])
    assert xs(tmp_path, end=5) == pytest.approx([0, 2, 4, 6, 8] + [10] * 6)


def test_as_many_points_as_frames_do_not_hide_a_timing(tmp_path):
    points = load(tmp_path, {"points": CORNER, "start": 1}, length=3).points[0]
    assert points.tolist() == [CORNER[0], CORNER[0], CORNER[2]]


def test_easings_agree_at_the_ends_and_differ_between(tmp_path):
    halves = {"linear": 5, "ease-in": 2.5, "ease-out": 7.5, "ease-in-out": 5}
    quarter = {"linear": 2, "ease-in": 0.4, "ease-out": 3.6, "ease-in-out": 1.04}
    for name in halves:
        x = xs(tmp_path, easing=name)
        assert (x[0], x[-1]) == (0, 10)
        assert (x[5], x[2]) == pytest.approx((halves[name], quarter[name])), name
        assert x == sorted(x)


def test_times_are_when_the_points_are_reached(tmp_path):
    for interpolation in ("pchip", "linear"):
        track = {"points": CORNER, "times": [2, 4, 14], "interpolation": interpolation}
        points = load(tmp_path, track).points[0]
        reached = [CORNER[k] for k in (0, 0, 1, 2, 2)]
        torch.testing.assert_close(points[[0, 2, 4, 14, 15]], torch.tensor(reached, dtype=torch.float64))
        torch.testing.assert_close(points[3], torch.tensor([25.0, 8.0], dtype=torch.float64), atol=6, rtol=0)


def test_straight_lines_keep_their_corners_and_the_curve_does_not(tmp_path):
    zigzag = [[0, 0], [10, 20], [20, 0], [30, 40]]
    straight = load(tmp_path, {"points": zigzag, "interpolation": "linear"}, length=31).points[0]
    assert straight[5].tolist() == pytest.approx([5, 10])
    assert straight[12].tolist() == pytest.approx([12, 16])
    curved = load(tmp_path, {"points": zigzag}, length=31).points[0]
    assert abs(curved[12, 1] - 16) > 1
    assert curved[[0, 10, 20, 30]].tolist() == zigzag


@pytest.mark.parametrize("timing", [{"start": 5, "end": 10}, {"times": [5, 10]}, {"start": 5, "easing": "ease-in"}])
def test_times_of_a_stated_clip_length_survive_another(timing, tmp_path):
    track = {"points": [[0, 5], [10, 5]], **timing}
    here = load(tmp_path, track, length=16)
    path = tmp_path / "walk.json"
    path.write_text(json.dumps({"width": 64, "height": 48, "num_frames": 16, "tracks": [track]}))
    twice = Trajectories.load(path, 31)
    torch.testing.assert_close(twice.points[:, ::2], here.points, rtol=0, atol=1e-12)
    assert (twice.points[0, :11, 0] == 0).all(), "it begins to move at the same moment"
    assert (twice.points[0, 11, 0] > 0).all()


def test_a_track_may_enter_and_leave(tmp_path):
    track = {"points": [[-20, 10], [100, 10]], "outside": True}
    drawn = load(tmp_path, track, length=13)
    assert drawn.points[0, :, 0].tolist() == pytest.approx([-20 + 10 * t for t in range(13)])
    assert drawn.visible[0].tolist() == [0 <= -20 + 10 * t < 64 for t in range(13)]
    assert torch.equal(drawn.visible, inside(drawn.points, SIZE))
    drawn.save(tmp_path / "saved.json")
    again = Trajectories.load(tmp_path / "saved.json", 13)
    assert torch.equal(again.points, drawn.points)
    assert torch.equal(again.visible, drawn.visible)


def test_control_is_carried_along_and_saved(tmp_path):
    tracks = [{"points": CORNER, "control": "object"}, {"points": CORNER}, {"points": [[1, 1]], "control": "camera"}]
    drawn = load(tmp_path, *tracks)
    for changed in (drawn, drawn.resize((32, 32)), drawn.cover_crop((32, 32)), drawn.flip_horizontal()):
        assert changed.control is not None
        assert changed.control.tolist() == [1, -1, 0]
    drawn.save(tmp_path / "saved.json")
    again = Trajectories.load(tmp_path / "saved.json", 16)
    assert torch.equal(again.points, drawn.points)
    assert again.control is not None
    assert again.control.tolist() == [1, -1, 0]
    resampled = drawn.resample(31)
    assert resampled.control is not None
    assert torch.equal(resampled.points[2], drawn.points[2, :1].expand(31, 2))
    torch.testing.assert_close(resampled.points[:, ::2], drawn.points)


def test_the_cameras_motion_follows_the_drawn_tracks(tmp_path):
    camera = {
        "pan": [0.2, 0.1],
        "zoom": -0.1,
        "roll": 5,
        "easing": "ease-in-out",
        "start": 2,
        "end": 12,
        "grid": [2, 3],
    }
    both = load(tmp_path, {"points": CORNER}, camera=camera)
    alone = load(tmp_path, camera=camera, note="a file without tracks needs no frame")
    expected = camera_motion(
        SIZE, 16, pan=(0.2, 0.1), zoom=-0.1, roll=5, easing="ease-in-out", start=2, end=12, grid=(2, 3)
    )
    assert alone.size == SIZE
    assert torch.equal(alone.points, expected.points)
    assert torch.equal(both.points[1:], expected.points)
    assert torch.equal(both.visible[1:], expected.visible)
    assert torch.equal(both.points[:1], load(tmp_path, {"points": CORNER}).points)
    assert both.control is not None
    assert both.control.tolist() == [-1, 0, 0, 0, 0, 0, 0]


TRACK = {"points": [[1, 1], [2, 2]]}
BAD_TRACKS = {
    "a mistyped key": ({"esing": "linear"}, "track 1: unknown key 'esing'; did you mean easing?"),
    "a strange key": ({"colour": 3}, "track 1: unknown key 'colour'; there are points, visible, start"),
    "an easing": ({"easing": "ease in"}, "easing must be one of linear, ease-in, ease-out, ease-in-out, got 'ease in'"),
    "a negative start": ({"start": -1}, "track 1: start must be at least 0, got -1"),
    "start as text": ({"start": "2"}, "track 1: start must be a number, got '2'"),
    "an endless end": ({"end": float("inf")}, "track 1: end must be finite"),
    "a huge end": ({"end": 10**400}, "track 1: end must be finite"),
    "end before start": ({"start": 5, "end": 5}, "track 1: end must be after start, got start 5 and end 5"),
    "end at 0": ({"end": 0}, "track 1: end must be after start, got start 0 and end 0"),
    "a late end": ({"end": 16}, "track 1: end: there is no frame 16 in a clip of 16 frames, the last is 15; "),
    "a late start": ({"start": 15}, "track 1: start must be before the last frame, 15"),
    "times and easing": ({"times": [1, 2], "easing": "ease-in"}, "track 1: times say when"),
    "times and end": ({"times": [1, 2], "end": 5}, "track 1: times say when"),
    "too few times": ({"times": [1]}, "track 1: times must be 2 frames, one for each point, got 1"),
    "times that fall": ({"times": [4, 3]}, "track 1: times must rise, got 3 after 4"),
    "times of text": ({"times": [1, "2"]}, "track 1: times: number 1 must be a number, got '2'"),
    "late times": ({"times": [1, 20]}, "track 1: times: there is no frame 20"),
    "a number as times": ({"times": 4}, "track 1: times must be a list"),
    "an interpolation": ({"interpolation": "cubic"}, "track 1: interpolation must be pchip or linear, got 'cubic'"),
    "a control": ({"control": "objekt"}, "control must be camera or object, got 'objekt'; did you mean object?"),
    "outside as text": ({"outside": "yes"}, "track 1: outside must be true or false, got 'yes'"),
    "a point outside": ({"points": [[1, 1], [70, 1]]}, "outside the 64x48 frame"),
    "never inside": (
        {"points": [[70, 1], [80, 1]], "outside": True},
        "track 1 lies outside 64x48 in each of the 16 frames",
    ),
    "too far": (
        {"points": [[-1e308, 1], [1e308, 1], [0, 0]], "outside": True},
        "track 1 has points more than 1e+06 px outside",
    ),
    "a single point's start": ({"points": [[1, 1]], "start": 3}, "track 1 is a single point, which holds still; start"),
}


@pytest.mark.parametrize("name", BAD_TRACKS)
def test_what_is_wrong_with_a_track_is_said_in_one_line(name, tmp_path):
    options, said = BAD_TRACKS[name]
    with pytest.raises(ValueError, match=r"walk\.json: track 1") as error:
        load(tmp_path, TRACK, {**TRACK, **options})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


BAD_FILES = {
    "a mistyped key": ({"num_frame": 16}, "unknown key 'num_frame'; did you mean num_frames?"),
    "no clip": ({"num_frames": 0}, "num_frames must be a whole number from 1 to 4096, got 0"),
    "half a frame": ({"num_frames": 15.5}, "num_frames must be a whole number"),
    "no object": ({"camera": "pan-left"}, "camera must be an object such as"),
    "a camera's key": ({"camera": {"pann": [0, 0]}}, "camera: unknown key 'pann'; did you mean pan?"),
    "a camera's times": ({"camera": {"times": [0, 1]}}, "camera: unknown key 'times'"),
    "pan as number": ({"camera": {"pan": 0.2}}, "camera: pan must be [x, y], two numbers, got 0.2"),
    "pan too far": ({"camera": {"pan": [0, 200]}}, "camera: pan: y must be at most 100, got 200"),
    "zoom as text": ({"camera": {"zoom": "in"}}, "camera: zoom must be a number, got 'in'"),
    "roll": ({"camera": {"roll": float("nan")}}, "camera: roll must be finite, got nan"),
    "grid": ({"camera": {"grid": [3, 0]}}, "camera: grid must have at least one column and row"),
    "grid too fine": ({"camera": {"grid": [40, 40]}}, "camera: grid has 1600 tracks, at most 256 are accepted"),
    "returns": ({"camera": {"returns": 1}}, "camera: returns must be true or false, got 1"),
    "the camera's end": ({"camera": {"end": 16}}, "camera: end: there is no frame 16 in a clip of 16 frames"),
    "half a frame size": ({"camera": {}, "width": 64}, "lacks height"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_wrong_with_a_file_is_said_in_one_line(name, tmp_path):
    fields, said = BAD_FILES[name]
    tracks = [] if "camera" in fields else [TRACK]
    with pytest.raises(ValueError, match=r"walk\.json: ") as error:
        load(tmp_path, *tracks, **fields)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 5000}, "num_frames must be a whole number from 1 to 4096, got 5000"),
        ({"num_frames": 10**400}, "num_frames must be a whole number from 1 to 4096"),
        ({"start": 1, "end": 1.0000000000000002}, "end must be after start"),
        ({"times": [0, 5e-324]}, "times must rise"),
    ],
)
def test_times_that_cannot_be_told_apart_are_refused(fields, message, tmp_path):
    path = tmp_path / "drawn.json"
    of_file = {key: value for key, value in fields.items() if key == "num_frames"}
    track = {"points": [[1, 1], [9, 9]], **{key: value for key, value in fields.items() if key != "num_frames"}}
    path.write_text(json.dumps({"width": 16, "height": 16, "tracks": [track], **of_file}))
    with pytest.raises(ValueError, match=message):
        Trajectories.load(path, 8)
