"""The fixed set of requests: it is what it says, and an evaluation answers it or refuses."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imageconductor.commands.evaluate import main
from imageconductor.conditioning.preset_names import CAMERA_PRESETS, OBJECT_PRESETS
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.drawn_motion.fixed_requests import FixedRequests
from imageconductor.evaluation.drawn_motion.requests import build_requests
from imageconductor.evaluation.drawn_motion.video_format import resolve_formats

PUBLIC = Path(__file__).parents[3] / "configs" / "evaluate" / "table1_requests.json"


def test_the_public_set_is_the_papers_protocol():
    fixed = FixedRequests.load(PUBLIC)
    assert (fixed.size, fixed.num_frames, fixed.strength, fixed.num_images) == ((384, 256), 16, 1, 10)
    assert (tuple(fixed.presets["camera"]), tuple(fixed.presets["object"])) == (CAMERA_PRESETS, OBJECT_PRESETS)
    seeds = np.array([fixed.seeds["camera"], fixed.seeds["object"]])
    assert sorted(seeds.ravel()) == list(range(200)), "no seed twice"
    assert fixed.sha256 == hashlib.sha256(PUBLIC.read_bytes()).hexdigest()
    # Who changes this number changes the set that published tables name.
    assert fixed.sha256.startswith("0a0eb032a192")


@pytest.fixture
def small(tmp_path) -> Path:
    """A set of two images and three presets at 64 x 48 and 4 frames."""
    content = json.loads(PUBLIC.read_text()) | {"size": [64, 48], "num_frames": 4}
    content |= {"camera_presets": ["pan-left", "roll"], "object_presets": ["arc"]}
    content |= {"seeds": {"camera": [[5, 6], [7, 8]], "object": [[9], [4]]}}
    presets = {kind: content[f"{kind}_presets"] for kind in ("camera", "object")}
    fixed = FixedRequests("", "", (64, 48), 4, 1.0, presets, content["seeds"])
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content | {"trajectories_sha256": fixed.digest_trajectories()}))
    return path


def write_images(folder: Path, *names: str) -> str:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (128, 96), "red").save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text('{"caption": "", "objects": [[64, 48]]}')
    return str(folder)


def test_images_take_their_places_and_seeds(small, tmp_path):
    settings = {"model": "m", "fixed_requests": str(small), "images": write_images(tmp_path / "images", "b", "a")}
    config = EvaluateConfig(**settings)
    camera = build_requests(config, "camera", (64, 48), 4)
    expected = [("a_pan-left", 5), ("a_roll", 6), ("b_pan-left", 7), ("b_roll", 8)]
    assert [(request.key, request.seed) for request in camera] == expected
    assert [r.seed for r in build_requests(config, "object", (64, 48), 4)] == [9, 4]
    (tmp_path / "images" / "b.json").write_text('{"caption": ""}')
    with pytest.raises(ValueError, match=r"places for 2 images, and .* holds 1 images that name an object"):
        build_requests(config, "object", (64, 48), 4)
    write_images(tmp_path / "images", "c")
    with pytest.raises(ValueError, match=r"places for 2 images, and .* holds 3 images; fixed_requests=null"):
        build_requests(config, "camera", (64, 48), 4)


def test_what_it_fixes_cannot_be_set(small):
    settings = {"videos": "v", "images": "i", "fixed_requests": str(small)}
    for setting in ({"strength": 2.0}, {"seed": 1}, {"camera_presets": ["roll"]}):
        with pytest.raises(ValueError, match=f"fixes {next(iter(setting))}: leave it out"):
            EvaluateConfig(**settings, **setting)
    with pytest.raises(ValueError, match=r"fixes size at \(64, 48\), got \(384, 256\)"):
        resolve_formats(EvaluateConfig(**settings, size=(384, 256)))
    assert str(resolve_formats(EvaluateConfig(**settings))[0]) == "64x48x4"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strength": 1.5}, "draws the presets in another way"),
        ({"camera_presets": ["dolly"]}, "must be names among"),
        ({"seeds": {"camera": [[1]], "object": [[1]]}}, "rows of 2 whole numbers"),
        ({"seeds": {"camera": [[1, 2]], "object": [[1], [2]]}}, "equally many images, got 1 and 2"),
        ({"num_frames": "4"}, "is no positive number"),
        (None, "it lacks size"),
        ("{", "not a JSON file"),
    ],
)
def test_a_file_that_is_no_set_is_refused(small, tmp_path, capsys, change, said):
    content = json.loads(small.read_text())
    small.write_text(change if isinstance(change, str) else json.dumps([] if change is None else content | change))
    assert main([f"fixed_requests={small}", "videos=v", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_the_checksum_is_in_results_and_tables(small, tmp_path, write_videos):
    settings = [f"fixed_requests={small}", f"videos={tmp_path / 'v'}", "device=cpu", "shown=1"]
    settings += [f"images={write_images(tmp_path / 'images', 'a', 'b')}"]
    config = EvaluateConfig(
        videos="v", images=str(tmp_path / "images"), fixed_requests=str(small), size=(64, 48), num_frames=4
    )
    write_videos(tmp_path / "v", config, lambda request: np.repeat(request.image[None], 4, axis=0))
    assert main([*settings, "--output", str(tmp_path / "out")]) == 0
    checksum = hashlib.sha256(small.read_bytes()).hexdigest()
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["requests"]["fixed"] == {"file": str(small), "sha256": checksum}
    assert record["requests"]["camera"]["requests"] == 4
    assert f"fixed by {small}, sha256 {checksum}" in (tmp_path / "out" / "table.md").read_text()
