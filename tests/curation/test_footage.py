"""Footage of many kinds: orientation, containers, damage, timestamps, and lists of sources."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import cv2
import footage
import imageio_ffmpeg
import numpy as np
import pytest

from imageconductor.curation import footage as footage_module
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.cuts import choose_frames, find_scenes, frame_duration
from imageconductor.curation.footage import Limits, Rejected, decode_mp4, encode_mp4, read_frames, read_frames_at
from imageconductor.curation.sources import Source, find_sources
from imageconductor.curation.steps import grid_points, scan

LIMITS = Limits(16, 4096)


def same(size):
    return size


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)], check=True)


def corners(width=96, height=64):
    """A frame whose corners differ: red, green, blue, white from the top left, clockwise."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2, 0] = frame[: height // 2, width // 2 :, 1] = 255
    frame[height // 2 :, width // 2 :, 2] = 255
    frame[height // 2 :, : width // 2] = 255
    return np.stack([frame] * 3)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_turned_phone_gives_upright_frames(degrees, tmp_path):
    footage.write(tmp_path / "plain.mp4", corners())
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    _, picture = next(read_frames(tmp_path / "turned.mp4", same, LIMITS))
    expected = np.rot90(corners()[0], degrees // 90)  # ffmpeg's angle is counterclockwise, as numpy's
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).mean() < 12


@pytest.mark.parametrize("flip", ["hflip", "vflip"])
def test_a_mirrored_video_is_mirrored_back(flip, tmp_path):
    footage.write(tmp_path / "plain.mp4", corners())
    ffmpeg(f"-display_{flip}", "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "mirrored.mp4")
    _, picture = next(read_frames(tmp_path / "mirrored.mp4", same, LIMITS))
    expected = corners()[0][:, ::-1] if flip == "hflip" else corners()[0][::-1]
    assert np.abs(picture.astype(int) - expected).mean() < 12


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("x.ts", "libx264"),
        ("x.mpg", "mpeg2video"),
        ("x.avi", "mpeg4"),
        ("x.avi", "libx264"),
        ("x.flv", "libx264"),
        ("x.mkv", "libx264"),
    ],
)
def test_every_place_of_every_container_is_found_again(name, codec, tmp_path):
    shown = np.stack([np.full((32, 48, 3), 20 + t, np.uint8) for t in range(200)])
    path = footage.write(tmp_path / name, shown, codec=codec, g="25", bf="2")
    times = [time for time, _ in read_frames(path, same, LIMITS)]
    every = read_frames_at(path, times, same, LIMITS)
    assert len(times) >= 198
    for first in range(30, len(times) - 20, 7):
        wanted = [first, first + 4, first + 11]
        assert np.array_equal(read_frames_at(path, [times[n] for n in wanted], same, LIMITS), every[wanted])
    ranged = [time for time, _ in read_frames(path, same, LIMITS, times[110], times[150])]
    assert ranged == times[110:151]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_that_avi_reorders_are_shown_in_order_at_equal_steps(codec, tmp_path):
    shown = np.stack([np.full((32, 48, 3), 20 + t, np.uint8) for t in range(100)])
    path = footage.write(tmp_path / "x.avi", shown, codec=codec, g="25", bf="2")
    times, pictures = zip(*read_frames(path, same, LIMITS), strict=True)
    assert times == pytest.approx([t / 25 for t in range(len(shown))])
    assert np.stack(pictures).mean((1, 2, 3)) == pytest.approx(shown.mean((1, 2, 3)), abs=4)


def test_footage_whose_times_are_not_in_order_is_rejected(tmp_path, monkeypatch):
    """A file whose frames are reordered, as if FFmpeg had not noticed; a recording with a joint is read up to it."""
    path = footage.write(tmp_path / "x.avi", footage.pan(0, 60, (1, 0)), g="25", bf="2")
    monkeypatch.setattr(footage_module, "_time_untimed", lambda frames, _: footage_module._time_frames(frames, 0.0))
    row, _ = scan(Source("x", str(path)), CurateConfig("", ""))
    assert (row.reason, row.detail) == ("unreadable", "timestamps out of order")
    part = footage.write(tmp_path / "part.ts", footage.pan(1, 60, (1, 0)), bf="0").read_bytes()
    (tmp_path / "joined.ts").write_bytes(part + part)
    times = [time for time, _ in read_frames(tmp_path / "joined.ts", same, LIMITS)]
    assert times == pytest.approx([t / 25 for t in range(60)])


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("name", ["video.mp4", "frames/0.png"])
def test_storage_that_fails_rejects_no_footage(name, tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / name).symlink_to("/proc/self/mem")  # reading its beginning is an error of input and output
    source = Source("x", str((tmp_path / name) if name == "video.mp4" else tmp_path / "frames"))
    with pytest.raises(OSError, match="Input/output error"):
        scan(source, CurateConfig("", ""))


def test_a_broken_file_is_not_taken_for_broken_storage(tmp_path, monkeypatch):
    """Some of FFmpeg's readers call a file that breaks off an error of input and output."""
    (tmp_path / "x.mp4").write_bytes(b"broken")

    def fail(*_, **__):
        raise av.error.OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(av, "open", fail)
    row, _ = scan(Source("x", str(tmp_path / "x.mp4")), CurateConfig("", ""))
    assert row.reason == "unreadable"


@pytest.mark.parametrize("detector", ["adaptive", "content"])
@pytest.mark.parametrize("place", [1, 2, 20, 37, 38, 39])
def test_a_cut_is_found_wherever_it_is(place, detector):
    before, after = footage.pan(1, 40, (1, 0), (96, 64)), footage.pan(2, 40, (1, 0.5), (96, 64))
    config = CurateConfig("", "", cut_detector=detector)
    cut = [*before[:place], *after[place:]]
    assert find_scenes(iter(cut), config) == [(0, place - 1), (place, 39)]
    for count in (1, 2, 3, 40):
        assert find_scenes(iter(before[:count]), config) == [(0, count - 1)]
    flash = before.copy()
    flash[place] = 255
    assert [scene.first for scene in find_scenes(iter(flash), config)] == [0, place]


@pytest.mark.parametrize("start", ["1.5", "2"])
def test_a_stream_copied_cut_is_whole(start, tmp_path):
    footage.write(tmp_path / "long.mp4", footage.pan(0, 120, (0.5, 0)), g="25")
    ffmpeg("-ss", start, "-i", tmp_path / "long.mp4", "-c", "copy", tmp_path / "cut.mp4")
    row, files = scan(Source("cut", str(tmp_path / "cut.mp4")), CurateConfig("", ""))
    assert row.reason is None
    assert set(files) == {"mp4"}


def test_names_and_titles_that_are_not_utf8(tmp_path):
    footage.write(tmp_path / "plain.avi", footage.pan(0, 40, (1, 0)), codec="mpeg4")
    content = (tmp_path / "plain.avi").read_bytes()
    ffmpeg("-i", tmp_path / "plain.avi", "-c", "copy", "-metadata", "title=cafe", tmp_path / "titled.avi")
    content = (tmp_path / "titled.avi").read_bytes().replace(b"cafe", b"caf\xe9")
    folder = tmp_path / "videos"
    folder.mkdir()
    strange = os.fsencode(folder) + b"/caf\xe9.avi"
    Path(os.fsdecode(strange)).write_bytes(content)
    (source,) = find_sources(CurateConfig(str(folder), ""))
    assert source.id == "caf\\xe9.avi"
    assert json.loads(json.dumps(source.path)) == source.path
    row, _ = scan(source, CurateConfig("", ""))
    assert row.reason is None
    row.path.encode()


def test_only_the_first_of_long_footage_is_looked_at(tmp_path):
    path = footage.write(tmp_path / "long.mp4", footage.pan(0, 150, (0.5, 0)))
    row, _ = scan(Source("long", str(path)), CurateConfig("", "", max_scan_s=2.0))
    assert row.num_source_frames == 51
    assert row.reason is None


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    footage.write(tmp_path / "plain.mp4", corners())
    ffmpeg("-i", tmp_path / "plain.mp4", "-c", "copy", "-aspect", "3:1", tmp_path / "wide.mp4")
    _, picture = next(read_frames(tmp_path / "wide.mp4", same, LIMITS))
    assert picture.shape == (64, 192, 3)


@pytest.mark.parametrize("place", [None, 2.0])
def test_frames_come_back_by_their_times(place, tmp_path):
    shown = np.stack([np.full((32, 48, 3), 2 * t, np.uint8) for t in range(100)])
    path = footage.write(tmp_path / "counted.mp4", shown, g="12", bf="2")
    times = [time for time, _ in read_frames(path, same, LIMITS, place)]
    first = 0 if place is None else 50
    assert times == pytest.approx([t / 25 for t in range(first, 100)])
    chosen = read_frames_at(path, [times[3], times[10], times[40]], same, LIMITS)
    assert chosen.mean(axis=(1, 2, 3)) == pytest.approx([2 * (first + t) for t in (3, 10, 40)], abs=2)


def test_an_mp4_keeps_its_pictures_and_its_bytes():
    clip = footage.pan(0, 8, (1, 0), size=(96, 64))
    content = encode_mp4(clip, 25 / 3)
    assert {encode_mp4(clip, 25 / 3) for _ in range(20)} == {content}
    assert np.abs(decode_mp4(content).astype(int) - clip).mean() < 3


def test_limits_hold_before_frames_are_decoded(tmp_path):
    path = footage.write(tmp_path / "large.mp4", np.zeros((1, 32, 512, 3), np.uint8))
    with pytest.raises(Rejected, match="too large"):
        next(read_frames(path, same, Limits(16, 256)))
    with pytest.raises(Rejected, match="too small"):
        next(read_frames(path, same, Limits(64, 4096)))


def test_an_unknown_codec_and_a_damaged_stream_are_told_apart(tmp_path):
    good = footage.write(tmp_path / "good.mp4", footage.pan(0, 60, (1, 0))).read_bytes()
    (tmp_path / "unknown.mp4").write_bytes(good.replace(b"avc1", b"zzzz"))
    row, _ = scan(Source("unknown", str(tmp_path / "unknown.mp4")), CurateConfig("", ""))
    assert row.reason == "unreadable"
    ffmpeg("-i", tmp_path / "good.mp4", "-c", "copy", "-movflags", "faststart", tmp_path / "fast.mp4")
    fast = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(fast[: len(fast) // 2])
    row, _ = scan(Source("cut", str(tmp_path / "cut.mp4")), CurateConfig("", ""))
    assert row.reason == "damaged"


def test_a_missing_file_is_named(tmp_path):
    row, files = scan(Source("gone", str(tmp_path / "gone.mp4")), CurateConfig("", ""))
    assert (row.reason, files) == ("missing", {})


@pytest.mark.parametrize("count", [32, 33, 100, 600])
def test_intervals_stay_within_the_scene(count):
    config = CurateConfig("", "")
    intervals = set()
    for seed in range(60):
        chosen, interval = choose_frames(np.arange(count) / 30, config, np.random.default_rng(seed))
        assert chosen[0] >= 0
        assert chosen[-1] < count
        assert set(np.diff(chosen)) == {interval}
        intervals.add(interval)
    assert max(intervals) <= min(16, (count - 1) // 31)
    assert len(intervals) > 1 or count < 63


@pytest.mark.parametrize(("rate", "digits"), [(30, 3), (30000 / 1001, 3), (120, 3), (24, 2), (25, 3)])
def test_times_that_a_container_rounds_are_of_a_constant_rate(rate, digits):
    """Matroska and WebM count in milliseconds, GIF in hundredths of a second."""
    times = np.round(np.arange(150) / rate, digits)
    assert 1 / frame_duration(times) == pytest.approx(rate, rel=2e-3)
    for seed in range(60):
        chosen, interval = choose_frames(times, CurateConfig("", ""), np.random.default_rng(seed))
        assert set(np.diff(chosen)) == {interval}


def test_where_half_of_the_steps_are_long_a_frame_lasts_a_short_one():
    times = np.cumsum([0.0, *[0.02] * 60, *[0.1] * 60])
    assert frame_duration(times) == pytest.approx(0.02)
    with pytest.raises(Rejected) as error:
        choose_frames(times[40:81], CurateConfig("", ""), np.random.default_rng(0))
    assert error.value.reason == "uneven frame rate"


def test_an_uneven_rate_is_evened_out_in_time():
    times = np.sort(np.concatenate([np.arange(0, 4, 1 / 50), np.arange(4, 8, 1 / 25)]))
    chosen, interval = choose_frames(times, CurateConfig("", "", max_interval=4), np.random.default_rng(3))
    assert np.abs(np.diff(times[chosen]) - interval / 50).max() <= 1 / 50 + 1e-9


def test_the_grid_is_centred():
    points = grid_points((384, 256), 16)
    assert points.shape == (256, 2)
    assert points.mean(0) == pytest.approx([191.5, 127.5])
    assert points[1] - points[0] == pytest.approx([24, 0])
    assert points[0] == pytest.approx([11.5, 7.5])


def test_webvid_openvid_and_plain_tables(tmp_path):
    (tmp_path / "webvid.csv").write_text('videoid,name,page_dir\n7,"A dog, running",000001\n7,again,000001\n')
    config = CurateConfig(str(tmp_path / "webvid.csv"), "", source="csv", videos="/v")
    assert find_sources(config) == [Source("7", str(Path("/v/000001/7.mp4")), "A dog, running")]
    (tmp_path / "own.csv").write_text("id,caption,path\nb,two words,b.mp4\na,,a.mp4\n")
    config = CurateConfig(str(tmp_path / "own.csv"), "", source="csv", camera_only=True)
    assert find_sources(config) == [
        Source("a", str(tmp_path / "a.mp4"), "", True),
        Source("b", str(tmp_path / "b.mp4"), "two words", True),
    ]
    (tmp_path / "openvid.csv").write_text('video,caption,aesthetic score,motion score\nb_1.mp4,"A, b",5.1,0.3\n')
    config = CurateConfig(str(tmp_path / "openvid.csv"), "", source="csv", videos="/v")
    assert find_sources(config) == [Source("b_1.mp4", str(Path("/v/b_1.mp4")), "A, b")]
    (tmp_path / "bad.csv").write_text("name,file\nx,y\n")
    with pytest.raises(ValueError, match=r"bad\.csv: needs the columns id, caption, path.* it has name, file"):
        find_sources(CurateConfig(str(tmp_path / "bad.csv"), "", source="csv"))


def realestate(root, name, youtube, times):
    lines = [f"https://www.youtube.com/watch?v={youtube}", *(f"{t} 0.5 0.9 0.5 0.5 0 0 " + "1 " * 12 for t in times)]
    (root / "train").mkdir(exist_ok=True)
    (root / "train" / f"{name}.txt").write_text("\n".join(lines))


def test_realestate10k_as_video_and_as_frames(tmp_path):
    clip = footage.pan(0, 150, (0.6, 0))
    footage.write(tmp_path / "AbC-1.mp4", clip, g="25")
    realestate(tmp_path, "one", "AbC-1", range(2000000, 5000000, 40000))
    realestate(tmp_path, "two", "other", range(1000000, 3000000, 40000))
    (tmp_path / "two").mkdir()
    for number, time in enumerate(range(0, 4000000, 40000)):
        cv2.imwrite(str(tmp_path / "two" / f"{time}.jpg"), clip[number][..., ::-1])
    config = CurateConfig(str(tmp_path), "", source="realestate10k")
    video, pictures = find_sources(config)
    assert (video.id, video.camera_only, video.start_s, video.end_s) == ("train/one", True, 2.0, 4.96)
    for source, count in ((video, 75), (pictures, 50)):
        row, files = scan(source, config)
        assert row.reason is None
        assert row.num_source_frames == count
        assert source.start_s <= row.start_s < row.end_s <= source.end_s + 1e-6
        start = round(row.start_s * 25)
        first = cv2.resize(clip[start], (384, 256), interpolation=cv2.INTER_CUBIC)
        assert np.abs(decode_mp4(files["mp4"])[0].astype(int) - first).mean() < 8


def test_frames_in_a_folder_are_shown_as_a_viewer_shows_them(tmp_path):
    cv2.imwrite(str(tmp_path / "0.png"), np.full((64, 64, 4), (0, 0, 255, 0), np.uint8))
    cv2.imwrite(str(tmp_path / "40000.png"), np.full((64, 64), 40000, np.uint16))
    pictures = [picture for _, picture in read_frames(tmp_path, same, LIMITS)]
    assert [np.unique(picture).tolist() for picture in pictures] == [[255], [156]]


def test_processes_that_read_footage_do_without_torch():
    code = "import sys, imageconductor.curation.steps; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_videos_behind_a_link_and_captions_of_any_editor_are_found(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.mp4").touch()
    (tmp_path / "elsewhere" / "a.txt").write_bytes("a café".encode("utf-16"))
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    assert find_sources(CurateConfig(str(folder), "")) == [Source("sub/a.mp4", str(folder / "sub" / "a.mp4"), "a café")]
    (tmp_path / "elsewhere" / "a.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text"):
        find_sources(CurateConfig(str(folder), ""))


def test_a_table_with_an_open_quotation_mark_is_refused(tmp_path):
    rows = ["id,caption,path", *(f"{n},a cat,{n}.mp4" for n in range(100))]
    rows[4] = '3,"a dog,3.mp4'
    (tmp_path / "table.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"table\.csv, line 5: quotation marks do not balance"):
        find_sources(CurateConfig(str(tmp_path / "table.csv"), "", source="csv"))


@pytest.mark.parametrize(("first", "flags"), [((48, 40), ("0", "0")), ((128, 96), ("0", "default"))])
def test_the_stream_that_players_choose_is_read(first, flags, tmp_path):
    for name, size in (("first", first), ("second", (96, 64))):
        footage.write(tmp_path / f"{name}.mp4", footage.pan(0, 40, (1, 0), size))
    options = ["-disposition:v:0", flags[0], "-disposition:v:1", flags[1]]
    inputs = ["-i", tmp_path / "first.mp4", "-i", tmp_path / "second.mp4", "-map", "0", "-map", "1"]
    ffmpeg(*inputs, "-c", "copy", *options, tmp_path / "both.mkv")
    assert {p.shape for _, p in read_frames(tmp_path / "both.mkv", same, LIMITS)} == {(64, 96, 3)}


def test_a_cover_is_not_read_in_place_of_the_video(tmp_path):
    footage.write(tmp_path / "video.mp4", footage.pan(0, 40, (1, 0), (96, 64)))
    cv2.imwrite(str(tmp_path / "cover.png"), footage.pan(0, 1, (0, 0))[0])
    inputs = ["-i", tmp_path / "cover.png", "-i", tmp_path / "video.mp4", "-map", "0", "-map", "1"]
    ffmpeg(*inputs, "-c", "copy", "-disposition:v:0", "attached_pic", tmp_path / "both.mp4")
    assert [p.shape for _, p in read_frames(tmp_path / "both.mp4", same, LIMITS)] == [(64, 96, 3)] * 40


@pytest.mark.parametrize("order", ["tff=1", "bff=1"])
def test_interlaced_footage_is_read_without_combs(order, tmp_path):
    frames = np.full((25, 96, 160, 3), 40, np.uint8)
    for number in range(25):
        for row in range(96):
            field = row % 2 if order == "tff=1" else 1 - row % 2
            left = 4 * number + 2 * field
            frames[number, row, left : left + 24] = 220
    x264 = {"x264-params": f"interlaced=1:{order}", "flags": "+ilme+ildct"}
    footage.write(tmp_path / "tv.mp4", frames, **x264)
    times, pictures = zip(*read_frames(tmp_path / "tv.mp4", same, LIMITS), strict=True)
    decoded = np.stack(pictures).astype(float)
    assert decoded.shape == frames.shape
    assert np.abs(decoded[:, 1:-1] - (decoded[:, :-2] + decoded[:, 2:]) / 2).mean() < 0.3
    combed = frames.astype(float)
    assert np.abs(combed[:, 1:-1] - (combed[:, :-2] + combed[:, 2:]) / 2).mean() > 2
    again = read_frames_at(tmp_path / "tv.mp4", times[3:9], same, LIMITS)
    assert np.array_equal(again, np.stack(pictures[3:9]))
