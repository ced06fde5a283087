"""Class names of boxes that the text encoder cannot read, which gates would learn from as if they were others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from imageconductor.conditioning import Boxes
from imageconductor.data.batches import collate
from imageconductor.training.run import run_stage

YOUTUBE_VIS = Path(__file__).parents[1] / "data" / "parity_smcd" / "fixtures" / "youvis"
UNREAD = {
    "<|endoftext|>": r"the model's tokenizer does not know the class name '<\|endoftext\|>'; name it otherwise",
    "star " * 99: r"the class name 'star star .*' has \d+ tokens, at most \d+ are read",
}


def write_detections(folder, name):
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    lines = ({"image": "a.png", "objects": [{"name": one, "box": [4, 4, 20, 20]}]} for one in ("star", name))
    path = folder / "pictures.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def write_youtube_vis(folder, name):
    shutil.copytree(YOUTUBE_VIS, folder / "vis")
    path = folder / "vis" / "train" / "instances.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = name
    path.write_text(json.dumps(content))
    return folder / "vis"


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("write", [write_detections, write_youtube_vis])
def test_names_that_are_known_are_refused_before_the_first_step(configure, tmp_path, write, name):
    config = configure("object_gates", data=[str(write(tmp_path, name))], size=(32, 32))
    with pytest.raises(ValueError, match=rf"^clip \S+: {UNREAD[name]}"):
        run_stage(config)
    assert not (Path(config.output) / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", UNREAD)
def test_a_name_that_comes_with_its_clip_is_refused_with_the_clip(configure, build, name):
    stage, data = build(configure("object_gates"))
    boxes = Boxes(torch.tensor([[[4.0, 4.0, 16.0, 20.0]]]), torch.ones(1, 1, dtype=torch.bool), (name,), (32, 32))
    batch = collate([{**data.samples[0], "boxes": boxes, "key": "one"}])
    with pytest.raises(ValueError, match=f"^clip one: {UNREAD[name]}"):
        stage.encode(batch, [torch.Generator().manual_seed(0)])
