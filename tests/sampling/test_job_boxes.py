"""The generation command with boxes: files, a run that repeats, refusals, and the overlay."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from imageconductor.commands import sample
from imageconductor.conditioning import Boxes
from imageconductor.sampling.job import SampleJob, prepare
from imageconductor.sampling.video import draw_boxes


@pytest.fixture
def model(gated_model):
    return gated_model


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "img.png"  # twice as wide as the model's video: its sides are cut off
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)).save(path)
    return path


def write(path, *objects, size=(64, 32), num_frames=4):
    entries = [{"name": name, "boxes": boxes} for name, boxes in objects]
    path.write_text(json.dumps({"width": size[0], "height": size[1], "num_frames": num_frames, "objects": entries}))
    return path


def growing(x=20):
    return [[x, 4, x + 8 + 2 * t, 20] for t in range(4)]


def test_boxes_make_a_video_and_run_yaml_repeats_it(model, image, tmp_path):
    boxes = write(tmp_path / "boxes.json", ("star", growing()), ("red circle", [None, *growing(30)[1:]]))
    common = ["--model", str(model), "--image", str(image), "--boxes", str(boxes), "--prompt", "a star"]
    first, second = tmp_path / "first", tmp_path / "second"
    settings = ["--scene-guidance-scale", "2", "--gated-fraction", "0.7", "--output", str(first)]
    assert sample.main([*common, *settings]) == 0
    names = {path.name for path in first.iterdir()}
    assert {"boxes.json", "video-0.mp4", "overlay-0.mp4", "first_frame.png", "run.yaml"} <= names
    assert sample.main(["--config", str(first / "run.yaml"), "--output", str(second)]) == 0
    for name in ("video-0.mp4", "overlay-0.mp4", "boxes.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    video, overlay = iio.imread(first / "video-0.mp4"), iio.imread(first / "overlay-0.mp4")
    assert not np.array_equal(video, overlay)
    # The picture's middle third is the video: x = 20 of 64 is x = 4 of 32.
    assert Boxes.load(first / "boxes.json", 4).xyxy[0, 0].tolist() == [4, 4, 12, 20]


def test_a_published_folder_names_its_object_by_an_option(model, image, tmp_path):
    (tmp_path / "bbox.txt").write_text("\n".join("20, 4, 28, 20" for _ in range(4)))
    inputs = prepare(
        SampleJob(model=str(model), image=str(image), boxes=str(tmp_path), boxes_name="star", prompt="a star")
    )
    assert inputs.boxes is not None
    assert inputs.boxes.names == ("star",)
    assert inputs.boxes.xyxy[0, 0].tolist() == [4, 4, 12, 20]
    assert inputs.job.first_frame_by == "both"


def test_what_carries_the_first_frame_is_recorded(model, tiny_model, image, tmp_path):
    boxes = str(write(tmp_path / "boxes.json", ("star", growing())))
    given = {"image": str(image), "prompt": "a star"}
    carriers = [
        prepare(SampleJob(model=str(folder), **settings)).job.first_frame_by
        for folder, settings in (
            (tiny_model, given),
            (model, given),
            (model, {**given, "boxes": boxes}),
            (model, {**given, "boxes": boxes, "first_frame_by": "gates"}),
            (model, {"prompt": "a star", "boxes": boxes}),
        )
    ]
    assert carriers == ["controlnet", "controlnet", "both", "gates", "controlnet"]


def test_an_object_that_the_crop_loses_is_warned_of(model, image, tmp_path, caplog):
    boxes = write(tmp_path / "boxes.json", ("star", growing()), ("red circle", [[0, 0, 10, 10]] * 4))
    inputs = prepare(SampleJob(model=str(model), image=str(image), boxes=str(boxes)))
    assert inputs.boxes is not None
    assert inputs.boxes.present.tolist() == [[True] * 4, [False] * 4]
    assert "object 1 (red circle) is outside of the cropped picture" in caplog.text


BAD = {
    "no gates": ([("star", growing())], ["--model", "{plain}"], "boxes need object gates"),
    "outside": ([("star", [[0, 0, 70, 10]] * 4)], [], "frame 0: the box (0, 0, 70, 10) lies outside"),
    "no area": ([("star", [[9, 0, 9, 10]] * 4)], [], "has no area; it needs x1 < x2"),
    "frames": ([("star", growing()[:3])], [], "3 boxes for 4 frames"),
    "too many": ([("star", growing())] * 5, [], "5 objects have boxes, the model takes at most 4"),
    "unknown name": ([("<|endoftext|>", growing())], [], "does not know the class name '<|endoftext|>'"),
    "long name": ([("star " * 99, growing())], [], "tokens, at most"),
    "missing": ([("star", growing())], ["--boxes", "nowhere.json"], "no boxes at nowhere.json"),
    "name alone": (None, ["--boxes-name", "star"], "boxes_name 'star' goes with boxes"),
    "fraction": ([("star", growing())], ["--gated-fraction", "1.2"], "gated_fraction must be from 0 to 1, got 1.2"),
    "scale alone": (None, ["--scene-guidance-scale", "2"], "none acts; give boxes"),
    "gates alone": (None, ["--model", "{plain}", "--first-frame-by", "gates"], "needs scene gates"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_weights_are_loaded(name, model, tiny_model, image, tmp_path, capsys, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", loaded)
    objects, options, message = BAD[name]
    given = [] if objects is None else ["--boxes", str(write(tmp_path / "boxes.json", *objects))]
    common = ["--model", str(model), "--image", str(image), "--output", str(tmp_path / "out"), *given]
    assert sample.main([*common, *(option.format(plain=tiny_model) for option in options)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_overlay_shows_where_each_object_is():
    """A box whose sides count from the picture's edge: at four times the size, 10 lies between pixels 39 and 40."""
    xyxy = torch.tensor([[[10.0, 20.0, 30.0, 50.0]] * 2])
    boxes = Boxes(xyxy, torch.tensor([[True, False]]), ("a",), (64, 64))
    drawn = draw_boxes(np.zeros((2, 256, 256, 3), np.uint8), boxes, factor=4)
    assert not drawn[1].any(), "absent"
    row, column = (drawn[0, 140].any(-1).nonzero()[0], drawn[0, :, 80].any(-1).nonzero()[0])
    assert row.mean() == pytest.approx((39.5 + 119.5) / 2, abs=0.6)
    assert (row.min(), row.max()) == (pytest.approx(39, abs=2), pytest.approx(120, abs=2))
    assert column.max() == pytest.approx(200, abs=2)
    assert not drawn[0, 140, 60:100].any(), "not filled"
