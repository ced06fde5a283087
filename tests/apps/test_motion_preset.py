"""A motion as a small file that plays on any picture."""

import json

import pytest

from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.motion_preset import MotionPreset, fit_drawing
from imageconductor.conditioning import Trajectories

DRAWING = {
    "width": 64,
    "height": 32,
    "num_frames": 8,
    "tracks": [{"points": [[10, 3], [63.9, 31.9]], "start": 2, "control": "camera"}, {"points": [[5, 5]]}],
    "camera": {"pan": [0.1, 0]},
}


def read(tmp_path, text) -> MotionPreset:
    path = tmp_path / "motion.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return MotionPreset.read(path, Limits(), "mine.json")


def test_what_is_saved_is_read(tmp_path):
    preset = MotionPreset(DRAWING, "mixed", 7.5, 2.0, None, {"ink": 0.5}, {"walk": -1.0})
    assert read(tmp_path, preset.to_text()) == preset
    assert read(tmp_path, MotionPreset().to_text()) == MotionPreset()


def test_a_drawing_moves_with_the_picture():
    """Against the library's own resize, of which points at the border may differ by the border's rule."""
    moved = fit_drawing(DRAWING, (128, 96))
    assert (moved["width"], moved["height"]) == (128, 96)
    assert moved["camera"] == DRAWING["camera"]
    assert {key: value for key, value in moved["tracks"][0].items() if key != "points"} == {
        "start": 2,
        "control": "camera",
    }
    before = Trajectories.from_tracks([one["points"] for one in DRAWING["tracks"]], (64, 32), 2).resize((128, 96))
    after = Trajectories.from_tracks([one["points"] for one in moved["tracks"]], (128, 96), 2)
    assert after.points.numpy() == pytest.approx(before.points.numpy(), abs=1e-6)
    assert fit_drawing(DRAWING, (64, 32)) == DRAWING


def test_points_on_the_border_stay_inside_and_those_outside_stay_outside():
    drawing = {"width": 8, "height": 8, "tracks": [{"points": [[7.99, 0], [-4, 4]], "outside": True}]}
    (border, outside) = fit_drawing(drawing, (800, 8))["tracks"][0]["points"]
    assert 799 < border[0] < 800
    assert outside[0] == pytest.approx(-350.5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "mine.json is not a JSON file"),
        (b"\xff\xfe\x00", "mine.json is not a JSON file"),
        ("[" * 100_000, "mine.json is not a JSON file"),
        ("{}", 'does not state "motion_preset": 1'),
        ({"motion_preset": 1, "command": "x"}, "unknown command"),
        ({"motion_preset": 1, "control": "all"}, "control must be one of"),
        ({"motion_preset": 1, "guidance_scale": float("inf")}, "finite number"),
        ({"motion_preset": 1, "guidance_scale": "7"}, "finite number"),
        ({"motion_preset": 1, "looks": ["../../x"]}, "looks must name LoRAs"),
        ({"motion_preset": 1, "looks": {"x": 1e9}}, "between -100 and 100"),
        ({"motion_preset": 1, "drawing": {"width": 8, "height": 8, "tracks": [{"points": [[9, 9]]}]}}, "outside"),
        ({"motion_preset": 1, "drawing": {"tracks": []}}, "frame size"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path, content, said):
    with pytest.raises(FieldError) as caught:
        read(tmp_path, json.dumps(content) if isinstance(content, dict) else content)
    assert said in str(caught.value)
    assert caught.value.field == "preset"


def test_a_large_file_is_not_read(tmp_path):
    (tmp_path / "motion.json").write_bytes(b" " * 2000)
    with pytest.raises(FieldError, match="larger than"):
        MotionPreset.read(tmp_path / "motion.json", Limits(preset_bytes=1000))
