"""Boxes: their file forms, what is wrong of them, and how they move with the picture."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity_smcd import FOLDER
from PIL import Image
from safetensors.torch import load_file

from imageconductor.conditioning import Boxes, Trajectories, cover_crop
from imageconductor.conditioning.box_files import check_boxes

META = json.loads((FOLDER / "data_meta.json").read_text())
SIZE = (60, 40)


def boxes(*rows, size=SIZE, names=None):
    """Objects of rows of boxes, None where absent."""
    present = torch.tensor([[box is not None for box in row] for row in rows])
    xyxy = torch.tensor([[(0.0, 0.0, 0.0, 0.0) if box is None else box for box in row] for row in rows])
    return Boxes(xyxy, present, tuple(names or ["dog"] * len(rows)), size)


def write(path, **changes):
    content = {"width": 60, "height": 40, "num_frames": 3, "objects": [{"name": "dog", "boxes": [[0, 0, 9, 9]] * 3}]}
    path.write_text(json.dumps(content | changes))
    return path


def test_a_file_holds_boxes_exactly(tmp_path):
    some = boxes([(0, 0, 60, 40), None, (1 / 3, 2.25, 30.1, 20)], [None, (5, 5, 6, 6), None], names=["dog", "ball"])
    some.save(tmp_path / "b.json")
    again = Boxes.load(tmp_path / "b.json", 3)
    assert torch.equal(again.xyxy, some.xyxy)
    assert torch.equal(again.present, some.present)
    assert (again.names, again.size) == (("dog", "ball"), SIZE)
    half = Boxes.load(tmp_path / "b.json", 3, (30, 20))
    torch.testing.assert_close(half.xyxy, some.xyxy / 2)
    Boxes.empty(SIZE, 3).save(tmp_path / "none.json")
    assert Boxes.load(tmp_path / "none.json", 3).num_objects == 0


def test_key_boxes_are_interpolated_by_centre_and_size(tmp_path):
    keys = [[0, 0, 10, 10], [20, 10, 40, 20], [30, 10, 50, 30]]
    path = write(tmp_path / "b.json", num_frames=9, objects=[{"name": "dog", "boxes": keys, "frames": [1, 4, 7]}])
    found = Boxes.load(path, 9)
    assert found.present.all()
    assert torch.equal(found.xyxy[0, [1, 4, 7]], torch.tensor(keys).double())
    assert torch.equal(found.xyxy[0, 0], found.xyxy[0, 1]), "before the first key box it stays"
    assert torch.equal(found.xyxy[0, 8], found.xyxy[0, 7])
    drawn = [[(x1 + x2) / 2 - 0.5, (y1 + y2) / 2 - 0.5] for x1, y1, x2, y2 in keys]
    tracks = Trajectories.from_tracks([drawn], SIZE, 7)
    torch.testing.assert_close(found.centres().points[0, 1:8], tracks.points[0])
    held = [{"name": "dog", "boxes": [[1, 2, 3, 4]], "frames": [5]}]
    assert Boxes.load(write(path, num_frames=9, objects=held), 9).xyxy.unique(dim=1).shape[1] == 1


def test_a_null_key_hides_an_object_until_the_next(tmp_path):
    keys = {"boxes": [[0, 0, 4, 4], None, [8, 0, 12, 4]], "frames": [0, 2, 6]}
    found = Boxes.load(write(tmp_path / "b.json", num_frames=8, objects=[{"name": "dog", **keys}]), 8)
    assert found.present[0].tolist() == [True, True, False, False, False, False, True, True]
    assert found.xyxy[0, 1, 0] > 0, "it moves on towards its next key box"
    nothing = [{"name": "dog", "boxes": [None], "frames": [0]}]
    assert not Boxes.load(write(tmp_path / "b.json", objects=nothing), 3).present.any()


@given(
    st.lists(st.tuples(*[st.floats(0, 60, width=32)] * 2, *[st.floats(0, 40, width=32)] * 2), min_size=2, max_size=5),
    st.integers(6, 12),
)
def test_interpolated_boxes_stay_in_the_frame_and_keep_an_area(corners, num_frames):
    keys = [[min(a, b), min(c, d), max(a, b), max(c, d)] for a, b, c, d in corners]
    keys = [[x1, y1, x2, y2] for x1, y1, x2, y2 in keys if x2 > x1 + 1e-3 and y2 > y1 + 1e-3] or [[0, 0, 1, 1]]
    times = [round(t) for t in np.linspace(0, num_frames - 1, len(keys))]
    content = {"width": 60, "height": 40, "objects": [{"name": "x", "boxes": keys, "frames": times}]}
    found = Boxes.from_objects(check_boxes(content, num_frames, "b").objects, SIZE, num_frames)
    assert found.present.all()
    torch.testing.assert_close(found.flip_horizontal().flip_horizontal().xyxy, found.xyxy)


WRONG = {
    "not JSON": ("{", "no JSON"),
    "a list": ([], "boxes are read as"),
    "no objects": ({"width": 60, "height": 40}, "lacks objects"),
    "unknown key": ({"objekts": 1}, "unknown key 'objekts'; did you mean objects"),
    "frames of another video": ({"num_frames": 5}, "for 5 frames, and the video has 3"),
    "frames are no number": ({"num_frames": True}, "whole number from 1 to"),
    "objects are no list": ({"objects": {}}, "objects must be a list"),
    "an object is no object": ({"objects": [3]}, "object 0 must be"),
    "no name": ({"objects": [{"boxes": [None] * 3}]}, "object 0: name must be the class"),
    "an empty name": ({"objects": [{"name": " ", "boxes": [None] * 3}]}, "object 0: name must be the class"),
    "no boxes": ({"objects": [{"name": "dog", "boxes": []}]}, "boxes must be a list"),
    "too few boxes": (
        {"objects": [{"name": "dog", "boxes": [None] * 2}]},
        r"\('dog'\): 2 boxes for 3 frames; give one",
    ),
    "frames that go back": ({"objects": [{"name": "dog", "boxes": [None] * 2, "frames": [2, 1]}]}, "must increase"),
    "frames outside": ({"objects": [{"name": "dog", "boxes": [None], "frames": [3]}]}, "0 to at most 2"),
    "frames of others": ({"objects": [{"name": "dog", "boxes": [None], "frames": [0, 1]}]}, "1 numbers, one for each"),
    "a frame between": ({"objects": [{"name": "dog", "boxes": [None], "frames": [0.5]}]}, "whole numbers"),
}
BAD_BOX = {
    "x1 = x2": ([5, 5, 5, 9], r"object 0 \('dog'\), frame 1: the box \(5, 5, 5, 9\) has no area"),
    "y2 < y1": ([5, 9, 8, 5], "has no area"),
    "left of the frame": ([-1, 5, 5, 9], r"lies outside the 60x40 frame; x must be in \[0, 60\]"),
    "below the frame": ([0, 5, 5, 41], "lies outside"),
    "three numbers": ([0, 5, 5], r"a box must be \[x1, y1, x2, y2\] or null"),
    "a text": ([0, 5, "5", 9], "x2 must be a number"),
    "nan": ([0, math.nan, 5, 9], "y1 must be finite"),
}
WRONG |= {f"box: {k}": ({"objects": [{"name": "dog", "boxes": [None, b, None]}]}, m) for k, (b, m) in BAD_BOX.items()}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_of_a_file_is_told(tmp_path, case):
    content, message = WRONG[case]
    path = tmp_path / "b.json"
    if isinstance(content, dict) and case != "no objects":
        write(path, **content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        Boxes.load(path, 3)
    assert str(path) in str(error.value)


def test_too_many_objects_and_no_file(tmp_path):
    path = write(tmp_path / "b.json", objects=[{"name": "dog", "boxes": [None] * 3}] * 9)
    assert Boxes.load(path, 3).num_objects == 9
    with pytest.raises(ValueError, match="9 objects, at most 8 are accepted"):
        Boxes.load(path, 3, max_objects=8)
    with pytest.raises(FileNotFoundError, match="no boxes at"):
        Boxes.load(tmp_path / "none.json", 3)


def test_boxes_that_cannot_be_are_refused():
    with pytest.raises(
        ValueError, match=r"the box \(0, 0, 61, 9\) of object 0 \(dog\) in frame 1 leaves the 60x40 frame"
    ):
        boxes([None, (0, 0, 61, 9)])
    with pytest.raises(ValueError, match="has no area"):
        boxes([(3, 0, 3, 9)])
    with pytest.raises(ValueError, match="leaves the"):
        boxes([(math.nan, 0, 3, 9)])
    with pytest.raises(ValueError, match="needs a class name"):
        boxes([None], names=[""])
    with pytest.raises(ValueError, match="1 objects need as many names, got 2"):
        boxes([None], names=["a", "b"])
    with pytest.raises(ValueError, match=r"xyxy must be \(N, T, 4\)"):
        Boxes(torch.zeros(1, 2, 2), torch.ones(1, 2, dtype=torch.bool), ("a",), SIZE)
    with pytest.raises(ValueError, match="present must be bool"):
        Boxes(torch.zeros(1, 2, 4), torch.ones(1, 2), ("a",), SIZE)
    assert boxes([None, (1, 1, 2, 2)]).xyxy[0, 0].tolist() == [0] * 4, "absent boxes are zero"


# -- with the picture


def drawn(some, t=0):
    """Which pixels a picture shows whose first object is filled: boxes on whole pixels are exact."""
    picture = np.zeros((some.size[1], some.size[0]), np.uint8)
    x1, y1, x2, y2 = some.xyxy[0, t].round().int().tolist()
    picture[y1:y2, x1:x2] = 255
    return Image.fromarray(picture)


def covered(picture):
    """The box of what is at least half white."""
    rows, columns = (np.flatnonzero((np.asarray(picture.convert("L")) > 127).any(axis=axis)) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("size", [(120, 80), (30, 20), (60, 30), (30, 40), (90, 90)])
def test_boxes_move_with_the_crop(size):
    some = boxes([(20, 12, 40, 28)])
    picture = drawn(some).convert("RGB")
    torch.testing.assert_close(
        some.cover_crop(size).xyxy[0, 0], torch.tensor(covered(cover_crop(picture, size))).double(), atol=1, rtol=0
    )
    torch.testing.assert_close(
        some.resize(size).xyxy[0, 0], torch.tensor(covered(picture.resize(size))).double(), atol=1, rtol=0
    )
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert some.flip_horizontal().xyxy[0, 0].tolist() == covered(mirrored)
    tracks = some.centres()
    torch.testing.assert_close(some.cover_crop(size).centres().points, tracks.cover_crop(size).points)
    torch.testing.assert_close(some.resize(size).centres().points, tracks.resize(size).points)


def test_what_a_crop_cuts():
    some = boxes([(0, 0, 30, 20), (0, 0, 8, 40), (58, 0, 60, 40)])
    cropped = some.cover_crop((40, 40))
    assert cropped.present[0].tolist() == [True, False, False]
    assert cropped.xyxy[0, 0].tolist() == [0, 0, 20, 20]
    again = some.cover_crop((20, 20)).cover_crop((40, 40), picture=SIZE)
    assert torch.equal(again.xyxy, cropped.xyxy)
    assert some.cover_crop(SIZE) is some


def test_boxes_of_tracks_and_tracks_of_boxes():
    tracks = Trajectories.from_tracks([[[10, 10], [40, 30]], [[0, 0]]], SIZE, 5)
    some = Boxes.from_tracks(tracks, (8, 6), ["dog", "ball"])
    assert some.xyxy[0, 0].tolist() == [6.5, 7.5, 14.5, 13.5]
    assert some.xyxy[1, 0].tolist() == [0, 0, 4.5, 3.5], "cut at the frame"
    torch.testing.assert_close(some.centres().points[0], tracks.points[0])
    growing = torch.linspace(2, 10, 5).view(1, 5, 1).expand(2, 5, 2)
    grown = Boxes.from_tracks(tracks, growing, ["dog", "ball"])
    assert (grown.xyxy[0, :, 2] - grown.xyxy[0, :, 0]).tolist() == pytest.approx([2, 4, 6, 8, 10])
    late = boxes([None, (0, 0, 10, 8), None, (20, 0, 30, 8)], [None] * 4).centres().points
    assert late[0].tolist() == [[4.5, 3.5], [4.5, 3.5], [14.5, 3.5], [24.5, 3.5]], "a start to count motion from"
    assert not late[1].any()
    hidden = Trajectories(tracks.points, torch.tensor([[True] * 4 + [False], [True] * 5]), SIZE)
    assert not Boxes.from_tracks(hidden, (8, 6), ["a", "b"]).present[0, 4]
    with pytest.raises(ValueError, match="positive sides, got 0"):
        Boxes.from_tracks(tracks, (0, 6), ["a", "b"])


def test_what_the_network_reads():
    some = boxes([(0, 0, 60, 40), None], [(15, 10, 30, 20), (30, 20, 60, 40)])
    xyxy, present = some.normalise()
    assert xyxy.tolist() == [[[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5]], [[0, 0, 0, 0], [0.5, 0.5, 1, 1]]]
    assert present.tolist() == [[1, 1], [0, 1]]
    assert some.at_frames([1]).xyxy[1, 0].tolist() == [30, 20, 60, 40]
    assert torch.equal(some.select([1]).xyxy, some.xyxy[1:])


@pytest.mark.parametrize("case", META["stage1_box_cases"], ids=lambda case: "x".join(map(str, case["image_wh"])))
def test_grounding_images_are_cropped_as_recorded(case):
    """Scaled, cut and perhaps mirrored; boxes under 1 % of the picture are left out."""
    side = case["out_shape"][1]
    (width, height), done = case["image_wh"], case["performed"]
    xywh = torch.tensor([box["xywh"] for box in case["boxes"]]).double()
    whole = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=-1).clamp(min=0)
    whole = whole.minimum(torch.tensor([width, height, width, height]))[:, None]
    some = Boxes(whole, torch.ones(len(whole), 1, dtype=torch.bool), ("thing",) * len(whole), (width, height))
    scale, offset = (done["performed_scale"],) * 2, (-done["crop_x"], -done["crop_y"])
    cropped = some.crop(scale, offset, (side, side), min_area=0.01)
    if case["flipped"]:
        cropped = cropped.flip_horizontal()
    assert cropped.present[:, 0].tolist() == [box["valid"] for box in case["boxes"]]
    for found, box in zip(cropped.normalise()[0][0], case["boxes"], strict=True):
        assert not box["valid"] or found.tolist() == pytest.approx(box["xyxy_over_256"], abs=1e-5)


# -- the published form


def published(tmp_path, text, size=None):
    Image.new("RGB", size or tuple(META["config"]["custom_wh"])).save(tmp_path / "img.png")
    (tmp_path / "bbox.txt").write_text(text)
    return tmp_path


def test_published_folder():
    record = META["custom"]
    expected = load_file(FOLDER / "data_expected.safetensors")["custom/boxes"]
    for path in (FOLDER / "fixtures" / "custom", FOLDER / "fixtures" / "custom" / "bbox.txt"):
        some = Boxes.load(path, record["lines"], name="dog")
        assert some.size == tuple(META["config"]["custom_wh"])
        assert some.xyxy[0].tolist() == record["pixel_rows"]
        torch.testing.assert_close(some.normalise()[0][:, 0], expected)
        assert list(some.normalise()[0][None].shape) == record["batch_shapes"]["boxes"]
        assert list(some.normalise()[1][None].shape) == record["batch_shapes"]["masks"]
    with pytest.raises(ValueError, match=rf"{record['lines']} boxes, one for each frame, and the video has 5"):
        Boxes.load(FOLDER / "fixtures" / "custom", 5, name="dog")
    with pytest.raises(ValueError, match="does not tell the class of its object"):
        Boxes.load(FOLDER / "fixtures" / "custom", record["lines"])


def test_lines_that_published_readers_stumble_over(tmp_path, caplog):
    """A side out of the picture is cut, blank lines and trailing commas are read; what is no box is refused."""
    cases = META["custom_malformed_lines_published_behaviour"]
    width, height = META["config"]["custom_wh"]
    for name, case in cases.items():
        folder = published(tmp_path, case["line"])
        lines = [line for line in case["line"].splitlines() if line]
        given = [[float(part) for part in line.split(",") if part.strip()] for line in lines]
        if given[0][0] >= given[0][2]:
            with pytest.raises(ValueError, match=r"line 1: the box .* has no area"):
                Boxes.load(folder, len(lines), name="dog")
            continue
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            some = Boxes.load(folder, len(lines), name="dog")
        cut = np.clip(given, 0, [width, height, width, height])
        np.testing.assert_allclose(some.xyxy[0], cut)
        assert ("is cut at its sides" in caplog.text) == (cut.tolist() != given), name
        if "boxes" in case:
            np.testing.assert_allclose(some.normalise()[0][:, 0], case["boxes"], atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("70,1,80,9", "line 1: the box .70, 1, 80, 9. lies outside the"),
        ("1,1,9,9\n1,2,3", r"line 2: a box must be \[x1, y1, x2, y2\]"),
        ("1,1,9,9\n1,2,x,3", "line 2: a box must be x1,y1,x2,y2"),
        ("nan,1,9,9", "line 1: x1 must be finite"),
    ],
)
def test_lines_that_are_no_box(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Boxes.load(published(tmp_path, text, SIZE), len(text.splitlines()), name="dog")


def test_published_folders_that_lack_something(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no boxes at .*bbox.txt"):
        Boxes.load(tmp_path, 1, name="dog")
    (tmp_path / "bbox.txt").write_text("1,1,9,9")
    with pytest.raises(FileNotFoundError, match=r"no img.png beside"):
        Boxes.load(tmp_path, 1, name="dog")
    (tmp_path / "img.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        Boxes.load(tmp_path, 1, name="dog")
