"""Videos are read by decord, and where it has no wheels by PyAV."""

import io
import subprocess
import sys

import footage
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest

from imageconductor.data.clip_records import CorruptClipError
from imageconductor.data.videos import Video

NUM_FRAMES = 30
LEVELS = 40 + 6 * np.arange(NUM_FRAMES)


@pytest.fixture(params=["decord", "pyav"])
def reader(request, monkeypatch):
    """The package that reads."""
    pytest.importorskip("decord" if request.param == "decord" else "av")
    if request.param == "pyav":
        monkeypatch.setitem(sys.modules, "decord", None)
    return request.param


@pytest.fixture(scope="module", params=[{}, {"output_params": ["-bf", "3", "-g", "8"]}], ids=["usual", "b_frames"])
def path(request, tmp_path_factory):
    """A video of 96x80 at 12 fps whose frames grow brighter."""
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    frames = np.broadcast_to(LEVELS.astype(np.uint8)[:, None, None, None], (NUM_FRAMES, 80, 96, 3))
    iio.imwrite(path, np.ascontiguousarray(frames), plugin="FFMPEG", fps=12, codec="libx264", **request.param)
    return path


def test_frames_are_those_asked_for_in_any_order(reader, path):
    video = Video(path, "a")
    assert (len(video), video.fps, video.size()) == (NUM_FRAMES, 12.0, (96, 80))
    for numbers in ([0], [29], [3, 4, 5], [20, 21], [2], [1, 9, 17, 25], [7, 7, 6]):
        frames = video.frames(numbers)
        assert frames.dtype == np.uint8
        assert frames.shape == (len(numbers), 80, 96, 3)
        np.testing.assert_allclose(frames.mean((1, 2, 3)), LEVELS[numbers], atol=2)


def test_bytes_are_read_too(reader, path):
    assert len(Video(io.BytesIO(path.read_bytes()), "a")) == NUM_FRAMES


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)], check=True)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_phone_gives_upright_frames(reader, degrees, tmp_path):
    plain = footage.pan(0, 6, (2, 0), (96, 64))
    footage.write(tmp_path / "plain.mp4", plain)
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    video = Video(tmp_path / "turned.mp4", "a")
    expected = np.rot90(plain, degrees // 90, (1, 2))  # ffmpeg's angle is counterclockwise, as numpy's
    assert video.size() == expected.shape[2:0:-1]
    for numbers in ([0], [2, 5]):
        frames = video.frames(numbers)
        assert frames.shape == expected[numbers].shape
        assert np.abs(frames.astype(int) - expected[numbers]).mean() < 4


def split_boxes(content):
    """The boxes of an mp4 by name."""
    found = {}
    while content:
        size = int.from_bytes(content[:4], "big")
        found[content[4:8]], content = content[:size], content[size:]
    return found


def test_a_cover_in_front_is_not_read_in_place_of_the_video(reader, tmp_path):
    footage.write(tmp_path / "video.mp4", footage.pan(0, 6, (1, 0), (96, 64)))
    iio.imwrite(tmp_path / "cover.png", footage.pan(0, 1, (0, 0), (192, 128))[0])
    inputs = ["-i", tmp_path / "cover.png", "-i", tmp_path / "video.mp4", "-map", "0", "-map", "1"]
    ffmpeg(*inputs, "-c", "copy", "-disposition:v:0", "attached_pic", tmp_path / "both.mp4")
    boxes = split_boxes((tmp_path / "both.mp4").read_bytes())
    header = split_boxes(boxes[b"moov"][8:])
    track = header.pop(b"trak")  # The cover is in udta, which ffmpeg writes last.
    boxes[b"moov"] = boxes[b"moov"][:8] + b"".join([*header.values(), track])
    video = Video(io.BytesIO(b"".join(boxes.values())), "a")
    assert (len(video), video.fps, video.frames([0, 5]).shape) == (6, 25.0, (2, 64, 96, 3))


def test_damage_is_told_by_the_name(reader, path, tmp_path):
    with pytest.raises(CorruptClipError, match="a is not a readable video"):
        Video(io.BytesIO(b"no video"), "a")
    with pytest.raises(CorruptClipError, match="a: frame 30 cannot be decoded"):
        Video(path, "a").frames([NUM_FRAMES])


def test_colours_are_the_same_with_both(path, monkeypatch):
    pytest.importorskip("decord")
    found = []
    for is_missing in (False, True):
        if is_missing:
            monkeypatch.setitem(sys.modules, "decord", None)
        found.append(Video(path, "a").frames(range(0, NUM_FRAMES, 5)).astype(int))
    assert abs(found[0] - found[1]).max() <= 2


def test_a_missing_package_is_no_damage(path, monkeypatch):
    for name in ("decord", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        Video(path, "a")
