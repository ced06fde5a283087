"""Videos are read by decord, and where it has no wheels by PyAV."""

import io
import sys

import imageio.v3 as iio
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
