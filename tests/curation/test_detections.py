"""A detector's boxes, from its file through the curation to training samples."""

import json
import re

import footage
import numpy as np
import pytest

from imageconductor.commands import curate
from imageconductor.conditioning.boxes import Boxes
from imageconductor.curation import curate as curate_module
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.detections import BoxesError, find_detections, read_detections
from imageconductor.curation.footage import decode_mp4
from imageconductor.curation.sources import Source
from imageconductor.curation.steps import scan
from imageconductor.data.box_samples import BoxSamples
from imageconductor.data.clip_index import find_clips

NUM_FRAMES, FPS = 60, 25
SIDE = 24


def corner(t):
    """Top left corner of the square in frame t; it leaves a frame of 192 pixels at t = 50."""
    return 40 + 3 * t, 30 + t // 2


def moving_square():
    """Footage (T, 128, 192, 3) of a white square before a dim texture that moves a little."""
    frames = (footage.pan(1, NUM_FRAMES, (0.6, 0)) // 3).copy()
    for t in range(NUM_FRAMES):
        x, y = corner(t)
        frames[t, y : y + SIDE, x : x + SIDE] = 255
    return frames


def detections(step=1, scale=1.0, **changes):
    """The file of a detector that saw every `step`-th frame, at `scale` times its size."""
    boxes = []
    for t in range(0, NUM_FRAMES, step):
        x, y = corner(t)
        boxes.append([scale * value for value in (x, y, x + SIDE, y + SIDE)])
    content = {"fps": FPS / step, "width": round(192 * scale), "height": round(128 * scale), "num_frames": len(boxes)}
    return {**content, "objects": [{"name": "square", "boxes": boxes}], **changes}


@pytest.fixture
def videos(tmp_path):
    """A folder with the footage, once with boxes, once without."""
    for name in ("square.mp4", "other.mp4"):
        footage.write(tmp_path / "videos" / name, moving_square())
    (tmp_path / "videos" / "square.txt").write_text("a white square")
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes" / "square.mp4.json").write_text(json.dumps(detections(2, 0.5)))
    return tmp_path


def settings(root, **changes):
    return CurateConfig(str(root / "videos"), str(root / "out"), size=(128, 128), boxes=str(root / "boxes"), **changes)


def bright_box(frame):
    """x1, y1, x2, y2 of what is bright in a picture (H, W, 3); None if nothing is."""
    y, x = np.nonzero(frame.min(-1) > 160)
    return (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) > 20 else None


@pytest.mark.parametrize(("step", "scale"), [(1, 1.0), (3, 1.0), (2, 0.5)])
def test_boxes_follow_the_pixels_of_the_clip(step, scale, videos):
    (videos / "boxes" / "square.mp4.json").write_text(json.dumps(detections(step, scale)))
    row, files = scan(Source("square.mp4", str(videos / "videos" / "square.mp4")), settings(videos))
    assert row.num_objects == 1
    clip = decode_mp4(files["mp4"])
    (videos / "clip.json").write_bytes(files["boxes.json"])
    boxes = Boxes.load(videos / "clip.json", len(clip))
    assert (boxes.size, boxes.names) == ((128, 128), ("square",))
    seen = [bright_box(frame) for frame in clip]
    assert sum(box is None for box in seen) > 2  # The square has left the crop in the middle of the frame.
    for t, box in enumerate(seen):
        if box is not None and box[2] - box[0] > 8:
            # Between detections the square's y moves in steps of a pixel, and coding blurs the edges.
            assert boxes.xyxy[0, t].numpy() == pytest.approx(box, abs=2.1)
            assert boxes.present[0, t]
    assert not boxes.present[0, -1]


def test_behind_the_last_detection_nothing_is_known(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(detections()))
    content, _ = read_detections(path, [1.0, 2.3, 2.37, 2.4, 3.0], (192, 128), (192, 128))
    assert [box is not None for box in json.loads(content)["objects"][0]["boxes"]] == [True, False, False, False, False]
    still = {"name": "dog", "boxes": [[0, 0, 9, 9]] * NUM_FRAMES}
    path.write_text(json.dumps(detections(objects=[still])))
    content, _ = read_detections(path, [1.0, 2.3, 2.37, 2.4, 3.0], (192, 128), (192, 128))
    assert [box is not None for box in json.loads(content)["objects"][0]["boxes"]] == [True, True, True, False, False]


def test_a_box_that_reaches_out_of_the_frame_is_cut_and_one_outside_is_absent(tmp_path):
    boxes = [[-5, 10, 20, 30.5], [180, 120, 200, 140], [-30, 0, -10, 20], None]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(detections(num_frames=4, objects=[{"name": "dog", "boxes": boxes}])))
    content, count = read_detections(path, [0, 1 / FPS, 2 / FPS, 3 / FPS], (192, 128), (192, 128))
    assert json.loads(content)["objects"][0]["boxes"] == [[0, 10, 20, 30.5], [180, 120, 192, 128], None, None]
    assert count == 1
    path.write_text(json.dumps(detections(num_frames=1, objects=[{"name": "dog", "boxes": [None]}])))
    assert read_detections(path, [0.0], (192, 128), (192, 128))[1] == 0


def test_an_object_is_where_the_detector_lists_it_and_nowhere_else(tmp_path):
    """Listed frames are no key boxes as those that someone draws, which stay and are joined by curves."""
    path = tmp_path / "a.json"
    dog = {"name": "dog", "boxes": [[0, 0, 9, 9], [10, 0, 19, 9], None, [50, 0, 59, 9]], "frames": [10, 11, 12, 20]}
    path.write_text(json.dumps(detections(objects=[{**dog, "id": 7, "score": 0.9}])))
    frames = [9, 10, 10.5, 11, 12, 15, 20, 21, 59]
    content, count = read_detections(path, [t / FPS for t in frames], (192, 128), (192, 128))
    half = [5, 0, 14, 9]
    expected = [None, [0, 0, 9, 9], half, [10, 0, 19, 9], None, None, [50, 0, 59, 9], None, None]
    assert json.loads(content)["objects"][0]["boxes"] == expected
    assert count == 1


def test_the_footage_may_have_more_objects_than_a_clip(tmp_path):
    path = tmp_path / "a.json"
    short = [{"name": "car", "boxes": [[0, 0, 9, 9]], "frames": [t % NUM_FRAMES]} for t in range(1000)]
    path.write_text(json.dumps(detections(objects=short)))
    assert read_detections(path, [t / FPS for t in range(8)], (192, 128), (192, 128))[1] == 8 * 17
    crowd = [{"name": "bird", "boxes": [[0, 0, 9, 9]] * NUM_FRAMES}] * 257
    path.write_text(json.dumps(detections(objects=crowd)))
    with pytest.raises(BoxesError, match=r"a\.json: 257 objects in the clip, at most 256 are accepted"):
        read_detections(path, [0.0], (192, 128), (192, 128))


def test_curated_clips_with_boxes_are_trained_on(videos, capsys):
    out = videos / "out"
    arguments = [f"input={videos / 'videos'}", f"output={out}", f"boxes={videos / 'boxes'}", "size=[128, 128]"]
    arguments += ["drop_fraction=0", "min_motion=0", "min_tracked_fraction=0", "workers=1"]
    assert curate.main(arguments) == 0
    assert "1 show objects with boxes" in (out / "report.html").read_text()
    records = [record for shard in find_clips([out]) for record in shard]
    assert len(records) == 2
    assert sum("boxes.json" in record.parts for record in records) == 1
    samples = BoxSamples([out], "train", (96, 96), 16, 4, seed=3)
    assert len(samples.entries) == 1
    sample = samples[0]
    assert sample["caption"] == "a white square"
    pixels, boxes = sample["pixel_values"], sample["boxes"]
    assert pixels.shape == (3, 16, 96, 96)
    shown = [(t, box) for t in range(16) if (box := bright_box(pixels[:, t].permute(1, 2, 0).numpy())) is not None]
    assert shown
    for t, box in shown:
        assert boxes.xyxy[0, t].numpy() == pytest.approx(box, abs=2.5)
    assert curate.main([one for one in arguments if not one.startswith("boxes=")]) == 2
    assert "was begun with boxes=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "no JSON"),
        ("[]", "a detector's boxes are read as"),
        (json.dumps(detections(fps=0)), "fps must be the rate of the detector's frames, a positive number, got 0"),
        (json.dumps(detections(num_frames=None)), "lacks num_frames"),
        (json.dumps(detections(num_frames=7)), "60 boxes for 7 frames"),
        (json.dumps(detections(objects=[{"name": "", "boxes": []}])), "name must be the class"),
    ],
)
def test_a_malformed_file_costs_its_source_and_says_why(content, message, videos):
    (videos / "boxes" / "square.mp4.json").write_text(content)
    row, files = scan(Source("square.mp4", str(videos / "videos" / "square.mp4")), settings(videos))
    assert (row.reason, files) == ("bad boxes", {})
    assert "square.mp4.json" in row.detail
    assert message in row.detail
    with pytest.raises(BoxesError, match=re.escape(message)):
        curate_module.curate(settings(videos))
    assert not (videos / "out").exists()


def test_a_folder_without_boxes_of_any_source_is_refused_first(videos, capsys):
    (videos / "boxes" / "square.mp4.json").rename(videos / "boxes" / "square.json")
    assert find_detections(videos / "boxes", "square.mp4") is None
    arguments = [f"input={videos / 'videos'}", f"output={videos / 'out'}", f"boxes={videos / 'boxes'}"]
    assert curate.main(arguments) == 2
    assert "holds no file for any source, such as" in capsys.readouterr().err
    assert not (videos / "out").exists()
    (videos / "shards").mkdir()
    with pytest.raises(FileNotFoundError, match="no clips with boxes"):
        BoxSamples([videos / "shards"], "train", (96, 96), 16, 4)
