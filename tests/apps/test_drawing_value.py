"""What a browser may send in place of a drawing, and what the editor gets of files and presets."""

import base64
import io
import json
import math

import numpy as np
import pytest
import torch

from imageconductor.apps.drawing import check_drawing_value, drawing_value, import_tracks, list_presets
from imageconductor.conditioning import (
    CAMERA_PRESETS,
    OBJECT_PRESETS,
    Trajectories,
    camera_preset,
    object_preset,
)
from imageconductor.conditioning.formats import read_tracks

SIZE = (64, 48)
TRACK = {"points": [[10, 8], [40, 8], [40, 38]], "start": 2, "end": 9, "easing": "ease-in", "control": "object"}
DRAWING = {"width": 64, "height": 48, "num_frames": 16, "tracks": [TRACK, {"points": [[5, 5]]}]}


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def test_a_drawing_is_read_as_a_file_of_the_same_content_is(tmp_path):
    path = tmp_path / "drawn.json"
    value = {**DRAWING, "camera": {"pan": [0.1, 0], "zoom": 0.2, "start": 3}}
    path.write_text(json.dumps(value))
    drawn, loaded = check_drawing_value(value, 24, size=SIZE), Trajectories.load(path, 24)
    assert drawn.size == SIZE
    for name in ("points", "visible", "still", "control"):
        assert torch.equal(getattr(drawn, name), getattr(loaded, name)), name


def test_an_empty_drawing_has_no_tracks():
    assert check_drawing_value({**DRAWING, "tracks": []}, 16).num_tracks == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tracks": [{"points": [[64, 8]]}]}, "track 0, point 0 at .64, 8. lies outside"),
        ({"tracks": [{"points": [[math.nan, 8]]}]}, "must be finite"),
        ({"tracks": [{"points": [[10**400, 8]]}]}, "a number is too large"),
        ({"tracks": [{"points": [["10", 8]]}]}, "two numbers"),
        ({"tracks": [{"points": [[True, 8]]}]}, "two numbers"),
        ({"tracks": [{"points": []}]}, "has no points"),
        ({"tracks": [None]}, "must be a list"),
        ({"tracks": {}}, "tracks must be a list"),
        ({"tracks": "x" * 10**6}, "tracks must be a list"),
        ({"tracks": [[[1, 1]]] * 300}, "300 tracks, at most 256 can be used"),
        ({"tracks": [{"points": [[1, 1]] * 9000}]}, "9000 points, at most 8192"),
        ({"tracks": [{"points": [[1, 1]], "visible": [True] * 10**5}]}, "more than tracks and their points"),
        ({"tracks": [{"points": [[1, 1]], "cut": []}]}, "unknown key 'cut'"),
        ({"tracks": [{"points": [[1, 1]], "x" * 10**6: 1}]}, "a key is longer"),
        ({"tracks": [{"points": [[1, 1], [2, 2]], "easing": "e" * 10**6}]}, "a text of 1000000 characters"),
        ({"tracks": [{"points": [[1, 1], [2, 2]], "start": 16}]}, "there is no frame 16"),
        ({"tracks": [{"points": [[1, 1]], "note": deep(900)}]}, "more than tracks and their points"),
        ({"width": 0}, "two positive whole numbers"),
        ({"width": 10**9}, "may be 65536 pixels"),
        ({"width": "64"}, "two positive whole numbers"),
        ({"width": 65}, "belongs to a picture of 65x48 pixels"),
        ({"num_frames": 10**6}, "num_frames must be"),
        ({"camera": {"grid": [20, 20]}}, "grid has 400 tracks"),
        ({"camera": {"pan": [math.inf, 0]}}, "must be finite"),
        ({"camera": []}, "camera must be an object"),
        ({"__proto__": 1}, "unknown key"),
    ],
)
def test_what_no_editor_sends_is_refused_in_words(change, message):
    with pytest.raises(ValueError, match=message) as error:
        check_drawing_value({**DRAWING, **change}, 16, size=SIZE)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "no picture yet"), ("", "no picture yet"), ([], "must be an object"), ("x" * 10**6, "must be an object")],
)
def test_what_is_no_object_is_refused_in_words(value, message):
    with pytest.raises(ValueError, match=message) as error:
        check_drawing_value(value, 16)
    assert len(str(error.value)) < 200


def send(content, name="drawn.json", size=SIZE, **fields):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    file = {"name": name, "data": base64.b64encode(data).decode()}
    return import_tracks({"files": [file], "size": list(size), "video_size": None, "num_frames": 16, **fields})


def test_a_file_of_ours_comes_back_with_all_that_it_states():
    drawing = {
        **DRAWING,
        "tracks": [
            TRACK,
            {"points": [[-30.0, 40.0], [60.0, 40.0]], "times": [0, 9], "outside": True},
            {"points": [[1.0, 2.0], [3.0, 4.0]], "visible": [True, False], "interpolation": "linear"},
        ],
        "camera": {"pan": [0.1, 0], "roll": 3, "start": 2, "easing": "ease-out", "returns": True, "grid": [4, 2]},
    }
    assert send(drawing) == {"drawing": drawing, "notes": []}


def test_tracks_of_another_picture_size_are_moved_as_sampling_moves_them(tmp_path):
    path = tmp_path / "drawn.json"
    path.write_text(json.dumps(DRAWING))
    video, picture = (48, 48), (640, 360)
    value = drawing_value(read_tracks(path), picture, 16, video)
    on_video = check_drawing_value(value, 16, size=picture).cover_crop(video)
    expected = Trajectories.load(path, 16).cover_crop(video)
    torch.testing.assert_close(on_video.points, expected.points, rtol=0, atol=2e-3)


def test_points_at_the_border_stay_in_a_picture_of_another_size():
    borders = [[0, 0], [63.9, 47.9], [63.5, 0]]
    answer = send({**DRAWING, "tracks": [{"points": borders}]}, size=(640, 480))
    assert "outside" not in answer["drawing"]["tracks"][0]
    assert check_drawing_value(answer["drawing"], 3).visible.all()


def test_an_array_of_another_tool_is_imported_with_what_it_hides():
    path = np.stack([np.linspace(0.1, 0.9, 16), np.full(16, 0.5)], axis=-1)
    tracks = np.stack([path, path, path[::-1]], axis=1).astype(np.float32)
    tracks[10:, 0] = -1
    buffer = io.BytesIO()
    np.save(buffer, tracks)
    answer = send(buffer.getvalue(), "motion.npy")
    drawn = check_drawing_value(answer["drawing"], 16, size=SIZE)
    assert drawn.visible[0].tolist() == [True] * 10 + [False] * 6
    assert drawn.points[0, 9, 0].item() == pytest.approx(64 * (0.1 + 0.8 * 9 / 15) - 0.5, abs=1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (None, "no track file was sent"),
        ({"files": [], "size": [64, 48], "num_frames": 16}, "choose one to"),
        ({"files": [{"name": "a", "data": "%"}], "size": [64, 48], "num_frames": 16}, "arrived damaged"),
        ({"files": [{"name": "a"}], "size": [64, 48], "num_frames": 16}, "needs a name and its content"),
        ({"files": [{"name": "a", "data": "A" * (12 << 20)}], "size": [64, 48], "num_frames": 16}, "larger than 8 MiB"),
        ({"files": [{"name": "a", "data": ""}], "size": [64, 48], "num_frames": 16}, "not valid JSON"),
        ({"files": [{"name": "a", "data": ""}], "size": [64], "num_frames": 16}, "picture: frame size"),
        ({"files": [{"name": "a", "data": ""}], "size": [64, 48], "num_frames": 10**9}, "num_frames"),
    ],
)
def test_an_import_that_is_none_is_answered_in_words(request_, message):
    answer = import_tracks(request_)
    assert list(answer) == ["error"]
    assert message in answer["error"]


@pytest.mark.parametrize(
    ("bounds", "camera", "kept"),
    [
        ({"max_tracks": 200, "max_points": 4096}, {}, range(100)),
        ({"max_tracks": 64}, {}, range(0, 100, 2)),
        ({"max_tracks": 64}, {"grid": [5, 4], "zoom": 0.1}, range(0, 100, 3)),
        ({"max_tracks": 100, "max_points": 45}, {}, range(0, 100, 5)),
        ({"max_tracks": -1, "max_points": "many"}, {}, range(100)),
    ],
)
def test_of_an_import_every_kth_track_is_kept_where_the_page_takes_fewer(bounds, camera, kept):
    tracks = [{"points": [[n % 60, 8], [40, 8]]} for n in range(100)]
    answer = send({**DRAWING, "tracks": tracks, **({"camera": camera} if camera else {})}, **bounds)
    assert answer["drawing"]["tracks"] == [tracks[n] for n in kept]
    expected = [] if len(kept) == 100 else [f"Of 100 tracks {len(kept)} are kept, one of every {kept.step}"]
    assert [note.split(":")[0] for note in answer["notes"]] == expected


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "..\\evil.json", "..", "", "\0a.json"])
def test_no_name_leads_out_of_the_folder_or_into_the_message(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    answer = send(b"no tracks", name)
    assert not list(tmp_path.iterdir()), "what was sent is gone"
    assert str(tmp_path) not in answer["error"]
    assert "not valid JSON" in answer["error"]


@pytest.mark.parametrize("name", OBJECT_PRESETS)
def test_an_object_preset_of_few_points_is_the_preset_itself(name):
    size, start = (384, 256), (190.0, 120.0)
    preset = next(entry for entry in list_presets()["object"] if entry["name"] == name)
    points = [[start[0] + 256 * x, start[1] + 256 * y] for x, y in preset["points"]]
    keys = {"interpolation": preset["interpolation"]} if "interpolation" in preset else {}
    value = {"width": 384, "height": 256, "tracks": [{"points": points, **keys}]}
    expected = object_preset(name, size, 16, start=start)
    assert (check_drawing_value(value, 16).points - expected.points).abs().max() < 2.2
    assert len(points) <= 13


@pytest.mark.parametrize("name", CAMERA_PRESETS)
def test_a_camera_preset_is_its_amounts(name):
    preset = next(entry for entry in list_presets()["camera"] if entry["name"] == name)
    value = {"width": 384, "height": 256, "tracks": [], "camera": preset["camera"]}
    expected = camera_preset(name, (384, 256), 16)
    drawn = check_drawing_value(value, 16)
    torch.testing.assert_close(drawn.points, expected.points, rtol=0, atol=1e-9)
    assert torch.equal(drawn.visible, expected.visible)
