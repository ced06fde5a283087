"""Boxes of the editor's value: what a browser may send, other numbers of frames, files, other pictures."""

import base64
import json
import math

import numpy as np
import pytest
import torch

from imageconductor.apps.drawing import import_tracks
from imageconductor.apps.drawn_boxes import MAX_NAME_CHARS, check_drawn_boxes, without_boxes
from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.motion_preset import MotionPreset, fit_drawing
from imageconductor.conditioning import Boxes

SIZE, FRAMES, MOST = (64, 48), 16, 3
DOG = {"name": "dog", "boxes": [[4, 4, 20, 16], [30, 10, 60, 40], [30, 8, 50, 30]], "frames": [0, 6, 15]}
BALL = {"name": "red ball", "boxes": [None, [0, 0, 64, 48], None], "frames": [0, 3, 9]}
DRAWING = {"width": 64, "height": 48, "num_frames": FRAMES, "tracks": [{"points": [[5, 5]]}], "objects": [DOG, BALL]}


def file_of(drawing):
    return {key: value for key, value in drawing.items() if key != "tracks"}


def test_boxes_are_read_as_a_file_of_the_same_content_is(tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps(file_of(DRAWING)))
    drawn, loaded = check_drawn_boxes(DRAWING, FRAMES, MOST), Boxes.load(tmp_path / "boxes.json", FRAMES)
    assert drawn is not None
    assert (drawn.names, drawn.size) == (("dog", "red ball"), SIZE)
    assert torch.equal(drawn.xyxy, loaded.xyxy)
    assert torch.equal(drawn.present, loaded.present)
    assert drawn.present[1].tolist() == [False] * 3 + [True] * 6 + [False] * 7


@pytest.mark.parametrize("objects", [{}, {"objects": []}, {"objects": None}], ids=["without", "empty", "null"])
def test_a_drawing_without_boxes_fits_a_model_that_takes_none(objects):
    drawing = {**file_of(DRAWING), "tracks": []}
    del drawing["objects"]
    assert check_drawn_boxes({**drawing, **objects}, FRAMES, None) is None


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ([{**DOG, "name": "  "}], "box 1 has no name"),
        ([DOG, {"boxes": [[0, 0, 1, 1]], "frames": [0]}], "box 2 has no name"),
        ([{**DOG, "name": "d" * (MAX_NAME_CHARS + 1)}], "61 characters, at most 60"),
        ([DOG] * 4, "4 boxes, this model takes at most 3"),
        ([{**DOG, "boxes": [[4, 4, 65, 16]] * 3}], "lies outside the 64x48 frame"),
        ([{**DOG, "boxes": [[4, 4, 4, 16]] * 3}], "has no area"),
        ([{**DOG, "boxes": [[4, 4, math.nan, 16]] * 3}], "must be finite"),
        ([{**DOG, "boxes": [[4, 4, 10**400, 16]] * 3}], "must be finite"),
        ([{**DOG, "frames": [0, 6, 16]}], "at most 15"),
        ([{**DOG, "frames": [0, 6, 6]}], "must increase"),
        ([{**DOG, "boxes": [None] * 10**5}], "more than 4096 key boxes"),
        ([{**DOG, "x" * 10**6: 1}], "a key is longer"),
        ([{**DOG, "note": [[[]]]}], "a note must be a text"),
        ([{**DOG, "script": 1}], "unknown key 'script'"),
        ([None], "must be an object"),
        ({"dog": DOG}, "must be a list"),
        ("x" * 10**6, "must be a list"),
    ],
)
def test_what_no_editor_sends_is_refused_in_words_beside_the_editor(objects, said):
    with pytest.raises(FieldError) as caught:
        Limits().check_drawing({**DRAWING, "objects": objects}, FRAMES, max_objects=MOST)
    assert said in str(caught.value)
    assert caught.value.field == "drawing"
    assert len(str(caught.value)) < 500
    with pytest.raises(FieldError, match="which this model does not have"):
        Limits().check_drawing(DRAWING, FRAMES)


def test_in_another_number_of_frames_keys_stay_in_the_same_part_of_the_clip():
    twice = check_drawn_boxes(DRAWING, 31, MOST)
    assert twice is not None
    for key, frame in zip(DOG["boxes"], (0, 12, 30), strict=True):
        assert twice.xyxy[0, frame].tolist() == key
    assert twice.present[1].nonzero().flatten().tolist() == list(range(6, 18))
    # Of 6 frames, frame 0 is the nearest one to the frames 0 and 1 of 16, and exactly the first of them.
    crowd = {"name": "dog", "boxes": [[x, 0, x + 1, 1] for x in range(4)], "frames": [0, 1, 3, 15]}
    few = check_drawn_boxes({**DRAWING, "objects": [crowd]}, 6, MOST)
    assert few is not None
    assert [few.xyxy[0, t, 0].item() for t in (0, 1, 5)] == [0, 2, 3]


def send(content, name="boxes.json", size=SIZE, **fields):
    file = {"name": name, "data": base64.b64encode(json.dumps(content).encode()).decode()}
    request = {"files": [file], "size": list(size), "video_size": None, "num_frames": FRAMES, "max_objects": MOST}
    return import_tracks({**request, **fields})


def test_a_file_of_key_boxes_comes_back_as_it_is():
    assert send(file_of(DRAWING)) == {"objects": [DOG, BALL], "notes": []}


def test_boxes_for_each_frame_become_few_keys_that_say_the_same(tmp_path):
    drawn = check_drawn_boxes(DRAWING, FRAMES, MOST)
    assert drawn is not None
    drawn.save(tmp_path / "boxes.json")
    answer = send(json.loads((tmp_path / "boxes.json").read_text()))
    again = check_drawn_boxes({**DRAWING, "objects": answer["objects"]}, FRAMES, MOST)
    assert again is not None
    assert torch.equal(again.present, drawn.present)
    assert (again.xyxy - drawn.xyxy).abs().max() <= 0.5
    assert max(len(one["frames"]) for one in answer["objects"]) <= 6


def test_boxes_of_another_picture_size_are_moved_as_sampling_moves_them(tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps(file_of(DRAWING)))
    video, picture = (48, 48), (640, 360)
    answer = send(file_of(DRAWING), size=picture, video_size=list(video))
    drawing = {"width": picture[0], "height": picture[1], "num_frames": FRAMES, "objects": answer["objects"]}
    moved = check_drawn_boxes(drawing, FRAMES, MOST)
    assert moved is not None
    expected = Boxes.load(tmp_path / "boxes.json", FRAMES).cover_crop(video)
    found = moved.cover_crop(video)
    assert torch.equal(found.present, expected.present)
    torch.testing.assert_close(found.xyxy[0], expected.xyxy[0], rtol=0, atol=2e-3)


def test_tracks_and_boxes_are_imported_together():
    tracks = without_boxes(DRAWING)
    files = [
        {"name": name, "data": base64.b64encode(json.dumps(content).encode()).decode()}
        for name, content in (("b.json", file_of(DRAWING)), ("a.json", tracks))
    ]
    assert send({}, files=files) == {"objects": [DOG, BALL], "drawing": tracks, "notes": []}
    assert send({}, files=[files[0], {**files[0], "name": "c.json"}])["error"] == "choose one file of boxes"


@pytest.mark.parametrize(
    ("content", "fields", "said"),
    [
        (file_of(DRAWING), {"max_objects": None}, "has no object gates"),
        (file_of(DRAWING), {"max_objects": 1}, "boxes.json: 2 objects, at most 1"),
        ({"objects": []}, {}, "boxes.json: lacks width, height"),
        ({**file_of(DRAWING), "num_frames": "all"}, {}, "num_frames must be a whole number"),
        (file_of({**DRAWING, "objects": [{**DOG, "name": "d" * 99}]}), {}, "99 characters"),
    ],
)
def test_an_import_that_is_none_is_answered_in_words(content, fields, said):
    answer = send(content, **fields)
    assert list(answer) == ["error"]
    assert said in answer["error"]


def test_a_preset_carries_boxes_which_move_with_the_picture(tmp_path):
    path = tmp_path / "motion.json"
    preset = MotionPreset(DRAWING, scene_guidance_scale=2.0, first_frame_by="gates", gated_fraction=0.5)
    path.write_text(preset.to_text())
    assert MotionPreset.read(path, Limits(), max_objects=MOST) == preset
    with pytest.raises(FieldError, match="which this model does not have"):
        MotionPreset.read(path, Limits())
    before = check_drawn_boxes(DRAWING, FRAMES, MOST)
    after = check_drawn_boxes(fit_drawing(DRAWING, (200, 111)), FRAMES, MOST)
    assert before is not None
    assert after is not None
    # As the library's own resize; the key boxes of a curve and its cut at the sides commute with it.
    np.testing.assert_allclose(after.xyxy, before.resize((200, 111)).xyxy, atol=1e-9)
    path.write_text(json.dumps({"motion_preset": 1, "first_frame_by": "magic"}))
    with pytest.raises(FieldError, match="first_frame_by must be one of"):
        MotionPreset.read(path, Limits())
