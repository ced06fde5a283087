"""What is refused, in words, before it costs anything."""

import io

import pytest
from PIL import Image, ImageFile

from imageconductor.apps.limits import FieldError, Limits, safe_name


def refusal(work, *arguments) -> FieldError:
    with pytest.raises(FieldError) as caught:
        work(*arguments)
    return caught.value


def test_fifty_megapixels_are_refused_before_a_pixel_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    Image.new("1", (10000, 5000)).save(path)

    def decode(self):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    error = refusal(Limits().check_picture, path)
    assert error.field == "picture"
    assert "10000 x 5000 pixels (50.0 megapixels), at most 40 megapixels" in str(error)
    assert Limits(image_pixels=50_000_000).check_picture(path) == (10000, 5000)


def test_a_text_file_and_a_large_one_are_refused_by_the_visitors_name(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    assert str(refusal(Limits().check_picture, tmp_path / "a.png", "cat.png")).startswith("cat.png is not a picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    error = refusal(Limits(image_bytes=20).check_picture, tmp_path / "b.png")
    assert "b.png has 0.0 MB" in str(error)


def test_formats_that_run_programs_are_not_tried(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    assert Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())).format == "EPS"
    assert "is not a picture" in str(refusal(Limits().check_picture, tmp_path / "a.png"))
    assert "no longer kept; choose it again" in str(refusal(Limits().check_picture, tmp_path / "gone.png"))


@pytest.mark.parametrize(
    ("drawing", "said"),
    [
        ({"width": 9, "height": 9, "tracks": [{"points": [[1, 1]]}] * 1000}, "1000 tracks, at most 64"),
        ({"width": 9, "height": 9, "tracks": [{"points": [[1, 1]] * 5000}]}, "5000 points, at most 4096"),
        ({"width": 9, "height": 9, "tracks": [{"points": [[1, 99]]}]}, "lies outside the 9x9 frame"),
        ({"width": 9, "height": 9, "tracks": [{"points": [[float("nan"), 1]]}]}, "must be finite"),
        ({"width": 9, "height": 9, "tracks": [], "script": 1}, "script"),
        ("tracks", "must be an object"),
    ],
)
def test_drawings_from_a_browser_are_bounded_and_read_as_files_are(drawing, said):
    error = refusal(Limits().check_drawing, drawing, 16)
    assert error.field == "drawing"
    assert said in str(error)


@pytest.mark.parametrize("value", [0, 10, 2.5, "many", None, float("nan"), float("inf"), [1]])
def test_numbers_outside_their_bounds(value):
    error = refusal(Limits().check_number, "steps", "the number of steps", value, 1, 9)
    assert (error.field, "from 1 to 9" in str(error)) == ("steps", True)


def test_numbers_and_texts_within_them():
    assert Limits().check_number("steps", "steps", 3.0, 1, 9) == 3
    assert Limits().check_text("prompt", "the prompt", "a" * 2000) == "a" * 2000
    assert "2001 characters" in str(refusal(Limits().check_text, "prompt", "the prompt", "a" * 2001))
    with pytest.raises(ValueError, match="tracks must be at least 1"):
        Limits(tracks=0)


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/tmp/upload/my cat (1).png", "my-cat-1-.png"),
        ("..", "file"),
        ("<img src=x>", "img-src-x"),
        ("a" * 300, "a" * 80),
    ],
)
def test_names_lead_nowhere(given, safe):
    assert safe_name(given) == safe
