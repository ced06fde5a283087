"""Reference clips of MotionDirector: what is found in files and folders, what is refused, and the samples."""

import json
import math
import re
from pathlib import Path
from random import Random

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from imageconductor.data.batches import Batches, scale_pixels
from imageconductor.data.reference_clips import ReferenceClips, read_frames
from imageconductor.data.reference_files import find_reference_clips
from imageconductor.data.reference_windows import choose_bucket, fit_bucket

CASES = json.loads((Path(__file__).parent / "parity_md" / "data_cases.json").read_text())
STEP = 4  # gray levels from one frame to the next


def find(*data, **changes):
    settings = {"prompt": "a thing", "captions": None, "size": (32, 32), "num_frames": 4, "fps": None, "frame_step": 1}
    return find_reference_clips([str(entry) for entry in data], **{**settings, **changes})


def write_video(path, num_frames, fps=8, size=(32, 32)):
    """A video whose frame i is of the gray level STEP * i."""
    levels = (STEP * np.arange(num_frames)).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (num_frames, size[1], size[0], 3))
    return write_frames(path, np.ascontiguousarray(frames), fps)


def write_frames(path, frames, fps=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, frames, plugin="FFMPEG", fps=fps, codec="libx264", quality=10, macro_block_size=2)
    return path


def write_picture(path, size=(32, 32), colour=(0, 0, 0), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def disc(size):
    """A white disc, (H, W, 3), whose diameter is half the shorter side."""
    y, x = np.mgrid[: size[1], : size[0]]
    inside = np.hypot(x - (size[0] - 1) / 2, y - (size[1] - 1) / 2) < min(size) / 4
    return np.where(inside[..., None], 255, 0).astype(np.uint8).repeat(3, axis=-1)


def shrink(size):
    """A smaller even size of the same aspect ratio; decord cannot read some widths below 80 px."""
    ratio = tuple(side // math.gcd(*size) for side in size)
    return tuple(2 * math.ceil(40 / min(ratio)) * side for side in ratio)


def numbers_of(levels):
    """Numbers of frames by their gray levels."""
    return [round(level / STEP) for level in levels]


class Encoder:
    """Stands in for the autoencoder: the latent of a frame is its mean level."""

    def __init__(self):
        self.calls = []

    def __call__(self, pixels):
        assert pixels.dtype == torch.uint8
        self.calls.append(pixels)
        mean = pixels.double().mean(dim=(0, 2, 3)).float().view(1, -1, 1, 1)
        return mean, mean / 2

    def levels(self):
        return [level for pixels in self.calls for level in pixels.double().mean(dim=(0, 2, 3)).tolist()]


def encode(clips, encoder=None, **options):
    samples = ReferenceClips(clips, **{"seed": 0, **options})
    samples.encode(encoder or Encoder())
    return samples


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("reference") / "walk.mp4", 41, fps=16)


def write_json(path, video_path, *entries):
    path.write_text(json.dumps({"name": "mine", "data": [{"video_path": str(video_path), "data": list(entries)}]}))
    return path


def test_json_clips_get_the_bucket_of_their_aspect_ratio(tmp_path):
    """The release reads (H, W, 3) as (C, H, W), so that all of its clips become landscape."""
    for case in CASES["json_bucket_defect"]:
        native, target = ((case[f"{name}_w"], case[f"{name}_h"]) for name in ("input", "target"))
        intended = tuple(reversed(case["intended_resize_hw"]))
        assert choose_bucket(native, target) == intended
        size = shrink(native)
        path = tmp_path / f"{size[0]}x{size[1]}.mp4"
        path = path if path.is_file() else write_video(path, 1, size=size)
        listed = write_json(tmp_path / "clips.json", path, {"frame_index": 0, "prompt": "one"})
        [clip] = find(listed, size=target, num_frames=1)
        assert clip.size == fit_bucket(native, target)
        assert clip.size in (intended, target)


def test_captions_of_pictures_are_the_published_ones(tmp_path):
    """A prompt comes first, then NAME.txt, then the JSON of captions, in the place of the one fallback prompt."""
    for number, (setting, rows) in enumerate(CASES["image_dataset"].items()):
        folder, captions = tmp_path / str(number), tmp_path / f"{number}.json"
        [prompt] = re.findall(r"single(?:_img_prompt)?='([^']*)'", setting)
        for row in rows:
            write_picture(folder / row["file"])
        (folder / rows[0]["file"]).with_suffix(".txt").write_text(f"{rows[0]['prompt']}\n")
        captions.write_text(
            json.dumps({rows[0]["file"]: "not this", **{row["file"]: row["prompt"] for row in rows[1:]}})
        )
        if prompt:
            (folder / rows[0]["file"]).with_suffix(".txt").write_text("not this either")
        clips = find(folder, prompt=prompt, captions=str(captions), num_frames=rows[0]["frames"])
        assert [(clip.path.name, clip.caption) for clip in clips] == [(row["file"], row["prompt"]) for row in rows]
        assert all(clip.draw_window(Random(0)) == [0] * row["frames"] for clip, row in zip(clips, rows, strict=True))


def test_captions_are_found_by_stem_too_and_a_json_of_clips_has_its_own(tmp_path, video):
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"walk": "a  man\nwalks"}))
    assert find(video, prompt=None, captions=str(captions))[0].caption == "a man walks"
    listed = write_json(tmp_path / "clips.json", video, {"frame_index": 3, "prompt": "its own"}, {"frame_index": 9})
    assert [clip.caption for clip in find(listed)] == ["its own", "a thing"]
    assert [clip.caption for clip in find(listed, prompt=" ", captions=str(captions))] == ["its own", "a man walks"]


def test_pixels_are_scaled_as_published(tmp_path):
    [(setting, expected)] = [item for item in CASES["pixel_range"].items() if item[0].startswith("rgb_")]
    colour = tuple(int(level) for level in re.findall(r"\d+", setting))
    encoder = Encoder()
    encode(find(write_picture(tmp_path / "a.png", colour=colour)), encoder)
    assert encoder.calls[0].shape == (3, 1, 32, 32)
    assert scale_pixels(encoder.calls[0])[:, 0, 5, 9].tolist() == pytest.approx(expected, abs=1e-7)


def test_clips_come_in_natural_order_whatever_the_folder_says(tmp_path, monkeypatch):
    [table] = [names for title, names in CASES.items() if title.startswith("sort_order")]
    names = [Path(name).stem for name in table]
    natural = sorted(names, key=lambda name: int(re.findall(r"\d+", name)[0]))
    for name in names:
        write_picture(tmp_path / f"{name}.png")
    for order in (sorted, lambda paths: sorted(paths, reverse=True)):
        listed = order(tmp_path.iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(Path, "iterdir", lambda _, listed=listed: iter(listed))
            assert [clip.key for clip in find(tmp_path)] == natural


def test_keys_are_unique_and_fit_for_file_names(tmp_path, video):
    files = ["x/a.png", "y/a.jpg", "y/A.png", "z/a-1.png", "z/naïve walk (2).png", "z/蝶.png", "z/!.png"]
    keys = [clip.key for clip in find(*(write_picture(tmp_path / name) for name in files))]
    assert keys == ["a-0", "a-2", "A-3", "a-1", "na-ve-walk-2", "clip-0", "clip-1"]
    for num_frames, names in ((16, ["walk-0", "walk-1"]), (32, ["walk"])):
        assert [clip.key for clip in find(video, num_frames=num_frames)] == names


def test_copies_in_other_colours_follow_their_clip(tmp_path):
    frames = np.broadcast_to(np.array([220, 120, 20], np.uint8), (8, 32, 32, 3))
    path = write_frames(tmp_path / "a.mp4", np.ascontiguousarray(frames))
    clips = find(path, recolour=True)
    assert [clip.key for clip in clips[:3] + clips[6:8]] == ["a-0", "a-rbg-0", "a-grb-0", "a-1", "a-rbg-1"]
    assert [clip.is_recoloured for clip in clips] == 2 * [False, True, True, True, True, True]
    levels, *colours = (next(read_frames(clip)).float().mean((1, 2, 3)).tolist() for clip in clips[:6])
    assert levels[0] > levels[1] + 60 > levels[2] + 120
    for colour, order in zip(colours, ("rbg", "grb", "gbr", "brg", "bgr"), strict=True):
        assert colour == [levels["rgb".index(channel)] for channel in order]
    pictures = [write_picture(tmp_path / f"{name}.png") for name in ("a", "a-rbg")]
    keys = [clip.key for clip in find(*pictures, recolour=True)]
    assert len(set(keys)) == 12
    assert {"a", "a-bgr", "a-rbg-0", "a-rbg-1", "a-rbg-rbg"} < set(keys)


def test_a_single_video_is_cut_and_its_short_end_left_out(video):
    clips = find(video, num_frames=8, frame_step=2)
    assert [clip.draw_window(Random(seed)) for clip in clips for seed in (0, 1)] == [
        list(range(first, first + 16, 2)) for first in (0, 0, 16, 16)
    ]
    assert [clip.frames for clip in find(video, num_frames=8, frame_step=5, fps=8)] == [clip.frames for clip in clips]
    assert [clip.frames[-1] for clip in find(video, num_frames=41)] == [40]


def test_windows_of_folders_lie_inside_and_start_everywhere(video):
    [clip] = find(video.parent, num_frames=8, fps=8)
    windows = [clip.draw_window(Random(seed)) for seed in range(200)]
    assert {frames[1] - frames[0] for frames in windows} == {2}
    assert {frames[0] for frames in windows} == set(range(0, 26, 2))
    assert max(frames[-1] for frames in windows) == 38
    assert {tuple(frames) for frames in windows} == {tuple(range(first, first + 16, 2)) for first in range(0, 26, 2)}
    assert find(video.parent, frame_step=3)[0].frames == range(0, 39, 3)


def test_json_clips_are_where_their_entries_say(tmp_path, video, monkeypatch):
    entries = [{"frame_index": 5, "prompt": "b"}, {"frame_index": -2, "prompt": "a"}]
    entries.append({"frame_index": 30, "prompt": "c", "clip_path": "cut.mp4"})
    write_video(tmp_path / "cut.mp4", 7)
    monkeypatch.chdir(video.parent)  # the video is in the working folder, the cut one beside the JSON
    clips = find(write_json(tmp_path / "clips.json", "walk.mp4", *entries), frame_step=2, fps=1)
    assert [clip.draw_window(Random(0)) for clip in clips] == [[5, 7, 9, 11], [0, 2, 4, 6], [0, 2, 4, 6]]
    assert [(clip.key, clip.caption) for clip in clips] == [("walk-0", "b"), ("walk-1", "a"), ("cut", "c")]


def test_pictures_and_videos_may_be_mixed(tmp_path, video):
    write_picture(tmp_path / "b.png")
    (tmp_path / "a.mp4").write_bytes(video.read_bytes())
    (tmp_path / "notes.md").write_text("not a clip")
    (tmp_path / "._a.mp4").write_text("of another system")
    assert [(clip.key, clip.is_image) for clip in find(tmp_path)] == [("a", False), ("b", True)]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (400, 390)])
def test_frames_keep_their_aspect_ratio(tmp_path, size):
    picture = tmp_path / "a.png"
    iio.imwrite(picture, disc(size))
    clips = find(picture, size=(384, 384), num_frames=2)
    clips += find(write_frames(tmp_path / "b.mp4", disc(shrink(size))[None].repeat(2, 0)), num_frames=2)
    assert clips[0].size == fit_bucket(size, (384, 384))
    for clip in clips:
        [pixels] = read_frames(clip)
        assert pixels.shape == (3, 1 if clip.is_image else 2, clip.size[1], clip.size[0])
        is_white = pixels[0, 0] > 127
        width, height = is_white.any(0).sum().item(), is_white.any(1).sum().item()
        assert abs(width - height) <= 1, (width, height)


def test_a_picture_that_exif_turns_gets_the_bucket_of_what_is_seen(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    [clip] = find(write_picture(tmp_path / "a.jpg", (160, 90), exif=exif), size=(384, 384))
    assert clip.size == (256, 384)
    assert next(read_frames(clip)).shape == (3, 1, 384, 256)


def test_each_frame_that_windows_hold_is_encoded_once(video, tmp_path):
    encoder = Encoder()
    clips = find(video.parent, num_frames=8, fps=8) + find(video, num_frames=4, frame_step=5)
    clips += find(write_picture(tmp_path / "a.png", colour=(8, 8, 8)))
    encode(clips, encoder, horizontal_flip=0.0)
    assert [pixels.shape[1] for pixels in encoder.calls] == [16, 4, 4, 4, 1]
    assert numbers_of(encoder.levels()) == [*range(0, 40, 2), *range(0, 40, 5), 2]


def test_samples_hold_the_latents_of_the_window(video):
    samples = encode(find(video.parent, num_frames=8, fps=8) + find(video, num_frames=8, frame_step=5), seed=7)
    starts = set()
    for position in range(40):
        sample = samples[position]
        assert sample["key"] == samples.clips[position % 2].key  # one after the other
        numbers = numbers_of(sample["latent_mean"].flatten().tolist())
        starts.add((position % 2, numbers[0]))
        assert numbers == list(range(numbers[0], numbers[0] + 8 * (2, 5)[position % 2], (2, 5)[position % 2]))
        assert torch.equal(sample["latent_std"], sample["latent_mean"] / 2)
        assert sample["latent_mean"].dtype == torch.float32
    assert len({start for clip, start in starts if clip == 0}) > 5, "a window is drawn for each sample"
    assert {start for clip, start in starts if clip == 1} == {0}


def test_samples_depend_on_seed_and_position_alone(video):
    clips = find(video.parent, num_frames=8, fps=8)
    first, second = (encode(clips, seed=3) for _ in range(2))
    forward = [first[position]["latent_mean"] for position in range(12)]
    backward = [second[position]["latent_mean"] for position in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    other = encode(clips, seed=4)
    assert not all(torch.equal(a, other[position]["latent_mean"]) for position, a in enumerate(forward))


def test_samples_are_batches_of_a_cache_without_tracks(video, tmp_path):
    clips = find(video, write_picture(tmp_path / "a.png", (48, 32), (40, 40, 40)), num_frames=32)
    batches = Batches(encode(clips), 1)
    for index, clip in enumerate(clips):
        batch = batches[index]
        assert batch["latent_mean"].shape == batch["latent_std"].shape == (1, 1, 32, 1, 1)
        assert batch["size"].tolist() == [[32, 32]]
        assert batch["points"].shape == (1, 0, 32, 2)
        assert batch["visible"].shape == (1, 0, 32)
        assert (batch["caption"], batch["key"], batch["skipped"]) == (["a thing"], [clip.key], [[]])
    assert (batches[1]["latent_mean"] == 40).all()


def test_only_pictures_whose_captions_allow_it_are_mirrored(tmp_path):
    left = np.zeros((32, 32, 3), np.uint8)
    left[:, :8] = 200
    for name, caption in (("a", "a wall"), ("b", "a wall on the left")):
        iio.imwrite(tmp_path / f"{name}.png", left)
        (tmp_path / f"{name}.txt").write_text(caption)

    def encode_sides(pixels):
        columns = pixels.float().mean(dim=(0, 2))[None, :, None]  # (1, T, 1, W)
        return columns, columns

    clips = find(tmp_path, prompt=None) + find(write_frames(tmp_path / "c.mp4", left[None].repeat(4, 0)))
    for probability, expected in ((0.0, {False}), (0.5, {False, True}), (1.0, {True})):
        samples = ReferenceClips(clips, seed=0, horizontal_flip=probability)
        samples.encode(encode_sides)
        means = [[samples[p]["latent_mean"] for p in range(k, 400, len(clips))] for k in range(len(clips))]
        seen = [{bool(mean[0, 0, 0, 0] < mean[0, 0, 0, -1]) for mean in of_clip} for of_clip in means]
        assert seen == [expected, {False}, {False}]


def test_damage_that_shows_only_in_training_names_the_file(tmp_path, video):
    path = tmp_path / "walk.mp4"
    path.write_bytes(video.read_bytes())
    samples = ReferenceClips(find(path), seed=0)
    with pytest.raises(RuntimeError, match="must be encoded"):
        samples[0]
    write_video(path, 2)
    with pytest.raises(ValueError, match=r"walk\.mp4: frames 0 to 3 cannot be decoded"):
        samples.encode(Encoder())
    path.write_bytes(video.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"walk\.mp4 is not a readable video"):
        samples.encode(Encoder())
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"walk\.mp4 is gone"):
        samples.encode(Encoder())
    with pytest.raises(ValueError, match="no reference clips"):
        ReferenceClips([], seed=0)


WRONG = {
    "nothing": ([], {}, "data names no reference clips"),
    "no file": (["nowhere.mp4"], {}, r"no such file or folder: .*nowhere\.mp4"),
    "an empty folder": (["empty"], {}, "no videos or pictures in .*empty; .* subfolders"),
    "another kind of file": (["notes.md"], {}, r"notes\.md is neither .*\.mp4"),
    "no video": (["bad.mp4"], {}, r"bad\.mp4 is not a readable video; convert it"),
    "no picture": (["bad.png"], {}, r"bad\.png is not a readable picture; give a PNG"),
    "a picture that is cut": (["cut.png"], {}, r"cut\.png is not a readable picture"),
    "a short video": (
        ["walk.mp4"],
        {"num_frames": 9, "frame_step": 6},
        "41 frames, 49 are needed .*frame_step=6; lower",
    ),
    "a short video in a folder": (
        ["videos"],
        {"num_frames": 16, "fps": 4},
        "walk.mp4 has 41 frames, 64 are needed for num_frames=16 with fps=4 of its 16, so one in 4; .*raise fps",
    ),
    "a short end of a video": (["late.json"], {}, r"41 frames, 44 are needed .*frame_index 40 on in .*late\.json"),
    "no prompt": (["walk.mp4"], {"prompt": None}, r"walk\.mp4 has no prompt; set prompt .*walk\.txt.*as captions"),
    "no captions": (["walk.mp4"], {"prompt": None, "captions": "none.json"}, r"captions: no such file: none\.json"),
    "a list of captions": (["walk.mp4"], {"captions": "list.json"}, r"list\.json must hold captions by file name"),
    "no JSON": (["bad.json"], {}, r"bad\.json is not valid JSON: Expecting"),
    "a list of clips": (["list.json"], {}, r'list\.json must hold \{"data"'),
    "a video without entries": (["no_entries.json"], {}, r"no_entries\.json: data\[0\] must hold a video_path and"),
    "an entry without a video": (["no_video.json"], {}, r"data\[0\]\.data\[0\]: needs a clip_path, or the video_path"),
    "an entry of a lost video": (["lost.json"], {}, r"data\[0\]\.data\[0\]: no such video: gone\.mp4"),
    "no number of a frame": (["text.json"], {}, r"frame_index must be the number of a frame, got '3'"),
    "a prompt that is none": (["prompt.json"], {}, r"prompt must be text, got 3"),
    "no frames": (["walk.mp4"], {"num_frames": 0}, "num_frames=0"),
    "no rate": (["videos"], {"fps": 0}, "fps=0"),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, video):
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("empty/inside", "videos"):
        (folder / name).mkdir(parents=True)
    write_picture(folder / "empty" / "inside" / "a.png")
    for name in ("walk.mp4", "videos/walk.mp4"):
        (folder / name).write_bytes(video.read_bytes())
    Image.effect_noise((64, 64), 90).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    for name in ("notes.md", "bad.mp4", "bad.png", "bad.json"):
        (folder / name).write_text("not what it seems")
    (folder / "list.json").write_text('["a thing"]')
    (folder / "no_entries.json").write_text('{"data": [{"video_path": "walk.mp4"}]}')
    (folder / "no_video.json").write_text('{"data": [{"data": [{"frame_index": 0, "prompt": "a"}]}]}')
    write_json(folder / "lost.json", "gone.mp4", {"frame_index": 0, "prompt": "a"})
    write_json(folder / "late.json", "walk.mp4", {"frame_index": 40, "prompt": "a"})
    write_json(folder / "text.json", "walk.mp4", {"frame_index": "3", "prompt": "a"})
    write_json(folder / "prompt.json", "walk.mp4", {"frame_index": 3, "prompt": 3})
    return folder


@pytest.mark.parametrize(("data", "changes", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_used_is_told_in_one_line(data, changes, said, wrong, monkeypatch):
    monkeypatch.chdir(wrong)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as raised:
        find(*data, **changes)
    assert "\n" not in str(raised.value)


def test_a_video_without_a_frame_rate_is_told(video, monkeypatch):
    monkeypatch.setattr("imageconductor.data.videos.Video.fps", property(lambda _: math.nan))
    with pytest.raises(ValueError, match=r"walk\.mp4 does not state its frame rate; set fps=null"):
        find(video.parent, fps=8)
    assert find(video.parent)[0].frames == range(41)
