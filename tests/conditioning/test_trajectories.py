import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from imageconductor.conditioning import Trajectories
from imageconductor.conditioning.trajectories import inside

FLOW_CASES = json.loads((Path(__file__).parents[1] / "data/flow/flow_cases.json").read_text())
SIZE = (384, 256)


def one_point(x, y, size):
    return Trajectories(torch.tensor([[[x, y]]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool), size)


@pytest.mark.parametrize("case", [name for name in FLOW_CASES["cases"] if name != "single_click"])
def test_interpolation_is_that_of_the_release(case):
    record = FLOW_CASES["cases"][case]
    points = Trajectories.from_tracks(record["tracks"], SIZE, FLOW_CASES["L"]).points[0]
    torch.testing.assert_close(points, torch.tensor(record["interp_first_track"], dtype=torch.float64))


def test_a_single_point_stands_still_and_two_equal_points_only_do_not_move():
    drawn = Trajectories.from_tracks([[[5, 6]], [[5, 6], [5, 6]]], SIZE, 4)
    assert drawn.still.tolist() == [True, False]
    assert (drawn.points == torch.tensor([5.0, 6.0])).all()
    assert drawn.visible.all()


def test_no_tracks_is_a_drawing_too():
    drawn = Trajectories.from_tracks([], SIZE, 16)
    assert drawn.points.shape == Trajectories.empty(SIZE, 16).points.shape == (0, 16, 2)


@pytest.mark.parametrize(
    ("tracks", "said"),
    [
        ([[[1, 1]], [[1, 1], [2, float("nan")]]], ["track 1, point 1", "finite", "nan"]),
        ([[[1, 1], [10**400, 2]]], ["track 0, point 1", "finite"]),
        ([[[1, 1], [384, 2]]], ["track 0, point 1", "(384, 2)", "outside", "384x256"]),
        ([[[1, -0.001]]], ["track 0, point 0", "outside"]),
        ([[[1, 1]], []], ["track 1", "no points"]),
        ([[[1, 1, 1]]], ["track 0, point 0", "two numbers", "[1, 1, 1]"]),
        ([[[True, 1]]], ["track 0, point 0", "two numbers"]),
        ([[["3", 1]]], ["track 0, point 0", "two numbers"]),
        ([3], ["track 0", "list of [x, y]", "got 3"]),
        ([{"point": [[1, 1]]}], ["track 0: unknown key 'point'; did you mean points?"]),
        ([{"visible": [True]}], ["track 0", "list of [x, y]"]),
        ([{"points": [[1, 1]], "visible": [1]}], ["track 0", "booleans"]),
        ([[[1, 1]]] * 9, ["9 tracks", "at most 8"]),
        ("drawn", ["list of tracks"]),
    ],
)
def test_errors_say_where(tracks, said):
    with pytest.raises(ValueError, match=r"^walk\.json: ") as error:
        Trajectories.from_tracks(tracks, SIZE, 16, source="walk.json", max_tracks=8)
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[[1, 2]", "not valid JSON"),
        ("7", "expected a list of tracks or an object"),
        ('{"tracks": []}', "lacks width, height"),
        ('{"width": 0, "height": 4, "tracks": []}', "two positive whole numbers"),
        ('{"width": 8, "height": 4, "tracks": [{"points": [[1, 1], [8, 1]]}]}', "track 0, point 1 at (8, 1)"),
        ("[[[1, NaN]]]", "track 0, point 0 must be finite"),
    ],
)
def test_file_errors_name_the_file(tmp_path, text, said):
    path = tmp_path / "walk.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"walk\.json") as error:
        Trajectories.load(path, 16)
    assert said in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Trajectories.load(tmp_path / "nowhere.json", 16)


def test_the_two_json_forms(tmp_path):
    published, ours = tmp_path / "published.json", tmp_path / "ours.json"
    published.write_text("[[[1, 2], [30, 40]], [[5, 6]]]")
    ours.write_text('{"width": 384, "height": 256, "tracks": [{"points": [[1, 2], [30, 40]]}, {"points": [[5, 6]]}]}')
    a, b = Trajectories.load(published, 16), Trajectories.load(ours, 16)
    assert a.size == b.size == SIZE
    assert torch.equal(a.points, b.points)
    # Published coordinates are already those of the frame wanted; ours are rescaled to it.
    assert torch.equal(Trajectories.load(published, 16, (96, 64)).points, a.points)
    assert torch.equal(Trajectories.load(ours, 16, (96, 64)).points, b.resize((96, 64)).points)


def test_save_then_load_gives_the_same(tmp_path):
    torch.manual_seed(0)
    points, visible = 50 * torch.rand(4, 7, 2, dtype=torch.float64), torch.ones(4, 7, dtype=torch.bool)
    points[1, 5:] -= 60  # a track that leaves the frame
    visible[1, 5:] = visible[2, 3] = False
    points[3] = points[3, :1]
    tracks = Trajectories(points, visible, (50, 50), torch.tensor([False, False, False, True]))
    tracks.save(tmp_path / "tracks.json")
    again = Trajectories.load(tmp_path / "tracks.json", 7)
    assert torch.equal(again.points, tracks.points)
    assert torch.equal(again.visible, tracks.visible)
    assert torch.equal(again.still, tracks.still)
    assert again.size == tracks.size
    assert [path.name for path in tmp_path.iterdir()] == ["tracks.json"]


def test_a_drawing_made_ready_and_saved_is_ready(tmp_path):
    # What `sample.py --config run.yaml` relies on: the saved trajectories pass through the same preparation unchanged.
    random = torch.Generator().manual_seed(1)
    for drawn_at in [(64, 64), (37, 53), (384, 256)]:
        corners = torch.rand(40, 5, 2, generator=random, dtype=torch.float64) * torch.tensor(drawn_at)
        corners[::4, -1] = torch.tensor(drawn_at) - 1e-3  # past the last pixel's centre, where clamping begins
        ready = Trajectories.from_tracks(corners.tolist(), drawn_at, 16).cover_crop((64, 64))
        ready.save(tmp_path / "tracks.json")
        again = Trajectories.load(tmp_path / "tracks.json", 16, published_size=(64, 64)).cover_crop((64, 64))
        assert torch.equal(again.points, ready.points)
        assert torch.equal(again.visible, ready.visible)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "tracks.json"
    one_point(1, 1, (4, 4)).save(path)
    before = path.read_text()
    with pytest.raises(ValueError, match="track 0 has points that are not finite"):
        one_point(float("nan"), 1, (4, 4)).save(path)
    assert path.read_text() == before


def test_a_frame_between_a_seen_and_a_hidden_point_is_hidden(tmp_path):
    path = tmp_path / "tracks.json"
    track = {"points": [[0, 0], [1, 0], [2, 0]], "visible": [True, True, False]}
    path.write_text(json.dumps({"width": 4, "height": 4, "tracks": [track]}))
    assert Trajectories.load(path, 5).visible[0].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("hidden", "start"),
    [([0, 0], [10, 8]), ([-1, -1], [10, 8]), ([1e300, 3], [10, 8]), ([-30, 8], [-30, 8]), ([0, 3], [0, 3])],
)
def test_padding_of_a_measured_track_is_no_place_from_which_it_moves(hidden, start, tmp_path):
    track = {"points": [hidden, [10, 8], hidden, [14, 8]], "visible": [False, True, False, True]}
    (tmp_path / "tracks.json").write_text(json.dumps({"width": 64, "height": 48, "tracks": [track]}))
    points = Trajectories.load(tmp_path / "tracks.json", 4).points[0].tolist()
    assert points == [start, [10, 8], [12, 8] if start == [10, 8] else hidden, [14, 8]]


@pytest.mark.parametrize("num_frames", [2, 5, 16, 31, 40])
def test_a_saved_track_is_loaded_at_another_length_as_it_is_resampled(num_frames, tmp_path):
    line = torch.stack([torch.arange(16.0) * 3, torch.arange(16.0) ** 1.5], -1)
    visible = torch.ones(2, 16, dtype=torch.bool)
    visible[0, :3] = visible[0, 7:9] = visible[1, 12:] = False
    points = torch.stack([line, line.flip(-1)]).double()
    unknown = points.masked_fill(~visible[..., None], float("nan"))
    points[~visible] = -500.0  # a guess of the tracker's
    tracks = Trajectories(points, visible, (64, 64))
    tracks.save(tmp_path / "tracks.json")
    again, resampled = Trajectories.load(tmp_path / "tracks.json", num_frames), tracks.resample(num_frames)
    assert torch.equal(again.visible, resampled.visible)
    if num_frames != 16:  # a file of as many points is loaded as it is
        assert torch.equal(again.points, resampled.points)
        assert again.points.min() >= 0, "the guess is no part of the curve"
        assert torch.equal(Trajectories(unknown, visible, (64, 64)).resample(num_frames).points, resampled.points)


sizes = st.tuples(st.integers(1, 700), st.integers(1, 700))
fractions = st.floats(0, 0.9999999) | st.sampled_from([0.0, 0.9999999])  # the edges are where it can go wrong


@given(sizes, sizes, fractions, fractions)
@example((1, 11), (1, 25), 0.0, 0.984375)  # the scale's rounding carries its edge over the new one
def test_a_point_in_the_frame_stays_in_it_and_close(old, new, fx, fy):
    tracks = one_point(fx * old[0], fy * old[1], old)
    moved = tracks.resize(new).points
    assert inside(moved, new).all()
    assert inside(moved.float(), new).all()
    exact = (tracks.points + 0.5) * torch.tensor(new) / torch.tensor(old) - 0.5
    assert ((moved - exact).abs() <= 0.5 * (torch.tensor(new) / torch.tensor(old)).clamp(min=1) + 0.02).all()


@given(sizes, st.integers(1, 700), fractions)
def test_cover_crop_hides_nothing_along_the_side_it_keeps(old, width, fx):
    new = (width, max(1, old[1] * width // old[0]))
    if new[1] * old[0] <= width * old[1]:
        moved = one_point(fx * old[0], (old[1] - 1) / 2, old).cover_crop(new)
        assert moved.visible.all()
        assert inside(moved.points, new).all()


@given(sizes, fractions, fractions)
def test_flip_twice_is_identity(size, fx, fy):
    tracks = one_point(fx * (size[0] - 1), fy * size[1], size)
    flipped = tracks.flip_horizontal()
    assert inside(flipped.points, size).all()
    torch.testing.assert_close(flipped.flip_horizontal().points, tracks.points, rtol=0, atol=0.02)


def test_the_mirror_image_of_the_first_pixel_is_the_last():
    assert one_point(0, 3, (8, 4)).flip_horizontal().points.tolist() == [[[7, 3]]]


def test_operations_that_change_nothing():
    tracks = Trajectories.from_tracks([[[383.999, 0], [0.1, 255.999]]], SIZE, 16)
    assert torch.equal(tracks.resize(SIZE).points, tracks.points)
    assert tracks.cover_crop(SIZE).visible.all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"points": torch.zeros(2, 3)}, r"points must be \(N, T, 2\)"),
        ({"visible": torch.ones(2, 3)}, "visible must be bool"),
        ({"still": torch.zeros(3, dtype=torch.bool)}, r"still must be bool \(2,\)"),
        ({"size": (4, 0)}, "frame size"),
        ({"control": torch.tensor([0, 2])}, r"control must be int64 \(2,\) from -1 to 1"),
        ({"control": torch.tensor([0, 1, 1])}, r"control must be int64 \(2,\) from -1 to 1, got torch.int64 \(3,\)"),
    ],
)
def test_fields_must_fit_together(fields, said):
    good = {"points": torch.zeros(2, 3, 2), "visible": torch.ones(2, 3, dtype=torch.bool), "size": (4, 4)}
    with pytest.raises(ValueError, match=said):
        Trajectories(**(good | fields))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_an_editors_encoding_does_not_matter(encoding, tmp_path):
    content = {"width": 64, "height": 64, "tracks": [{"points": [[20, 20], [40, 30]]}], "note": "é"}
    (tmp_path / "tracks.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert Trajectories.load(tmp_path / "tracks.json", 2).points[0].tolist() == [[20, 20], [40, 30]]


UNKNOWN = {
    "a track alone": ("[[1, 2], [3, 4]]", "one track of 2 .* without the brackets"),
    "text": ("walk left\n", r"not valid JSON .* it begins 'walk left"),
    "lines of three numbers": ("20,20,1\n30,24,1\n", r"not valid JSON .* it begins '20,20,1"),
    "text in JSON": ('"walk left"', "expected a list of tracks or an object, found 'walk left'"),
    "other keys": ('{"trajectories": [], "fps": 8}', r"lacks width, height, tracks; it has \['trajectories', 'fps'\]"),
    "another encoding": ('{"width": "é"}'.encode("latin-1"), r"not UTF-8 text \(line 1\)"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_read_is_named_for_what_it_is(name, tmp_path):
    content, found = UNKNOWN[name]
    (tmp_path / "other.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        ValueError, match=rf"other\.json.*{found}.*trajectories are read as JSON: .*\[\[\[x, y\]"
    ) as error:
        Trajectories.load(tmp_path / "other.json", 4)
    assert "\n" not in str(error.value)


def test_advice_for_too_many_tracks_can_be_followed():
    with pytest.raises(ValueError, match="400 tracks, at most 256 are accepted; draw fewer, or keep one in 2"):
        Trajectories.from_tracks([[[1, 1]]] * 400, SIZE, 4)
