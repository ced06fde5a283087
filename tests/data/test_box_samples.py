"""Windows of clips with boxes: their order, crops and flips, held-out clips, and files that are damaged."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import write_shard
from PIL import Image

from imageconductor.conditioning import Boxes
from imageconductor.data.box_datasets import read_youtube_vis
from imageconductor.data.box_samples import BoxSamples, keep_largest
from imageconductor.data.clip_index import Shard
from imageconductor.data.clip_records import CorruptClipError
from imageconductor.training import samples as training_samples
from imageconductor.training.stage_configs import ObjectGatesConfig

FIXTURES = Path(__file__).parents[1] / "data" / "parity_smcd" / "fixtures"
VIDEOS = FIXTURES / "youvis" / "train" / "instances.json"


def test_windows_of_both_data_sets_come_with_their_boxes():
    samples = BoxSamples([FIXTURES / "youvis"], "train", (32, 24), 4, max_objects=2)
    found = [samples[position] for position in range(8)]
    assert {sample["pixel_values"].shape for sample in found} == {(3, 4, 24, 32)}
    assert {sample["boxes"].size for sample in found} == {(32, 24)}
    assert max(sample["boxes"].num_objects for sample in found) == 2
    assert all(sample["boxes"].num_frames == 4 for sample in found)
    again = BoxSamples([FIXTURES / "youvis"], "train", (32, 24), 4, max_objects=2)[5]
    assert torch.equal(again["pixel_values"], found[5]["pixel_values"])
    got = BoxSamples([FIXTURES / "got-10k"], "val", (32, 18), 8, max_objects=8)[0]
    assert got["boxes"].num_objects == 1
    assert got["points"].shape == (0, 8, 2)


def test_boxes_go_with_their_pixels_through_crop_and_flip(tmp_path):
    """A white rectangle on black, cropped at random: its pixels are where its box is."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[20:44, 30:62] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    line = {"image": "a.png", "caption": "white", "objects": [{"name": "box", "box": [30, 20, 62, 44]}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(line) + "\n")
    settings = {"horizontal_flip": 0.5, "random_crop": 0.7}
    samples = BoxSamples([tmp_path / "d.jsonl"], "train", (64, 64), 1, 4, **settings)
    centres = set()
    for position in range(12):
        sample = samples[position]
        frame, (x1, y1, x2, y2) = sample["pixel_values"][0, 0], sample["boxes"].xyxy[0, 0].tolist()
        rows, columns = (frame > 127).any(1).nonzero()[:, 0], (frame > 127).any(0).nonzero()[:, 0]
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert [float(value) for value in found] == pytest.approx([x1, y1, x2, y2], abs=1.0)
        centres.add(round(x1 + x2))
    assert len(centres) > 6


def test_a_held_out_clip_that_cannot_be_read_is_left_out(monkeypatch, caplog):
    class Held:
        def __init__(self, *_, **__): ...

        def __getitem__(self, position):
            if position in unreadable:
                raise CorruptClipError(f"clip {position} is damaged")
            return {"key": position}

    monkeypatch.setattr(training_samples, "BoxSamples", Held)
    config = ObjectGatesConfig(data=["x"], held_out_clips=3)
    unreadable = {1}
    assert [one["key"] for one in training_samples.read_held_out_boxes(config)] == [0, 2]
    assert "a held-out clip is left out: clip 1 is damaged" in caplog.text
    unreadable = {0, 1, 2}
    with pytest.raises(CorruptClipError, match="none of 3 held-out clips can be read; the first: clip 0"):
        training_samples.read_held_out_boxes(config)


def test_held_out_clips_are_never_trained_on():
    data = FIXTURES / "youvis"
    held = BoxSamples([data], "train", (16, 16), 4, 8, held_out_clips=1, shows_held_out=True)[0]["key"]
    trained = BoxSamples([data], "train", (16, 16), 4, 8, held_out_clips=1)
    assert held not in {trained[position]["key"] for position in range(6)}
    with pytest.raises(ValueError, match="none is left"):
        BoxSamples([data], "train", (16, 16), 4, 8, held_out_clips=9)


def test_clips_of_an_evaluation_are_never_trained_on():
    data = FIXTURES / "youvis"
    listed = [Path(video["file_names"][0]).parent.name for video in json.loads(VIDEOS.read_text())["videos"]]

    def keys(num_frames, **settings):
        return {entry.key for entry in BoxSamples([data], "train", (16, 16), num_frames, 8, **settings).entries}

    assert keys(1, reserved_clips=1) == set(listed[1:])
    assert keys(8, reserved_clips=1) == {listed[1]}, "the last one is too short"
    held = {"held_out_clips": 1, "shows_held_out": True}
    assert keys(1, reserved_clips=len(listed) - 1, **held) == set(listed[-1:])
    config = ObjectGatesConfig(data=[str(data)], size=(16, 16), reserved_clips=len(listed) - 1, held_out_clips=1)
    assert [one["key"] for one in training_samples.read_held_out_boxes(config)] == listed[-1:]
    config.held_out_clips = 0
    assert training_samples.build_box_samples(config)[5]["key"] == listed[-1]
    with pytest.raises(ValueError, match="reserved_clips must not be negative, got -1"):
        ObjectGatesConfig(data=["x"], reserved_clips=-1)


def test_an_epoch_has_every_clip_once_and_any_sample_may_come_first():
    samples = BoxSamples([FIXTURES / "youvis"], "train", (16, 16), 1, 8, seed=3)
    count = len(samples.entries)
    keys = [samples[position]["key"] for position in range(3 * count)]
    for epoch in range(3):
        assert len(set(keys[epoch * count : (epoch + 1) * count])) == count
    backwards = [samples[position]["key"] for position in reversed(range(3 * count))]
    assert backwards == keys[::-1]
    order = samples._permutation(1)
    assert samples._permutation(1) is order, "that of ten million clips takes a second"


def test_records_keep_the_order_of_their_keys_and_are_made_as_they_are_asked_for(tmp_path, monkeypatch):
    boxed, plain = {"json": b"{}", "boxes.json": b"{}"}, {"json": b"{}"}
    keys = [f"clip-{number}" for number in range(40)]
    for shard in range(4):
        of_shard = keys[shard::4]
        records = {key: plain if int(key[5:]) % 3 == 0 else boxed for key in of_shard}
        write_shard(tmp_path / f"clips-{shard}.tar", records)
    write_shard(tmp_path / "clips-4.tar", {"none": plain})
    expected = sorted(
        [key for key in keys if int(key[5:]) % 3] + [clip.key for clip in read_youtube_vis(FIXTURES / "youvis")],
        key=lambda key: hashlib.sha256(key.encode()).digest(),
    )
    made = []
    make = Shard.__getitem__
    monkeypatch.setattr(Shard, "__getitem__", lambda shard, number: made.append(number) or make(shard, number))
    sources = [FIXTURES / "youvis", tmp_path]
    held = BoxSamples(sources, "train", (16, 16), 1, 8, held_out_clips=5, shows_held_out=True)
    trained = BoxSamples(sources, "train", (16, 16), 1, 8, held_out_clips=5)
    assert not made, "objects of ten million clips are 11 GB in each process"
    assert [entry.key for entry in held.entries] == expected[:5]
    assert [entry.key for entry in trained.entries] == expected[5:]
    assert len(trained) == len(expected) - 5


def test_the_largest_objects_are_kept_in_their_order():
    xyxy = torch.tensor([[[0.0, 0, 4, 4]], [[0.0, 0, 9, 9]], [[0.0, 0, 1, 1]], [[0.0, 0, 6, 6]]])
    present = torch.tensor([[True], [True], [True], [False]])
    kept = keep_largest(Boxes(xyxy, present, ("a", "b", "c", "d"), (16, 16)), 2)
    assert kept.names == ("a", "b")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 must be"),
        ('{"caption": "a"}', "line 1 must be"),
        ('{"image": "a.png", "objects": [{"name": "a", "box": [0, 0, 99, 9]}]}', "leaves the 8x8 frame"),
        ('{"image": "b.png", "objects": []}', "no picture at"),
        ('{"image": "a.png", "objects": [], "labels": 1}', "unknown key 'labels'"),
        ("", "holds no picture"),
    ],
)
def test_detections_that_are_malformed(tmp_path, line, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        BoxSamples([tmp_path / "d.jsonl"], "train", (8, 8), 1, 4)


def test_of_many_detections_only_the_first_picture_is_opened_at_the_start(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    boxes = {"a.png": [0, 0, 4, 4], "b.png": [0, 0, 4, 4], "c.png": [0, 0, 4, 4]}
    lines = [{"image": name, "objects": [{"name": "x", "box": box}]} for name, box in boxes.items()]
    lines.append({"image": "a.png", "objects": [{"name": "x", "box": [0, 0, 99, 4]}]})
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = BoxSamples([tmp_path / "d.jsonl"], "train", (8, 8), 1, 4)
    found = [samples[position] for position in range(4)]
    assert {sample["key"] for sample in found} == {"a.png"}
    told = "\n".join(reason for sample in found for reason in sample["skipped"])
    for reason in ("line 2: cannot identify", f"line 3: no picture at {tmp_path}/c.png", "line 4: ", "leaves the 8x8"):
        assert reason in told


def test_damaged_clips_are_left_out_and_told(tmp_path):
    shutil.copytree(FIXTURES / "youvis", tmp_path / "data")
    for path in (tmp_path / "data" / "train" / "JPEGImages" / "ffee001122").glob("*.jpg"):
        path.write_bytes(b"no picture")
    samples = BoxSamples([tmp_path / "data"], "train", (16, 16), 8, 8)
    found = [samples[position] for position in range(4)]
    assert {sample["key"] for sample in found} == {"00a1b2c3d4"}
    assert any("ffee001122" in reason for sample in found for reason in sample["skipped"])
