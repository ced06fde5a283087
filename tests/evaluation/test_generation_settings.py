"""Folders of videos go on with the settings that they were made with, and with no others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from imageconductor.data.sprite_world import SpriteWorldConfig
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig, Method
from imageconductor.evaluation.drawn_motion.generation_settings import list_attached_files
from imageconductor.evaluation.drawn_motion.protocol import Evaluation
from imageconductor.evaluation.drawn_motion.reference_statistics import describe_reference
from imageconductor.evaluation.drawn_motion.video_format import VideoFormat
from imageconductor.evaluation.generation_settings import locate_record, merge_with_record


@pytest.mark.parametrize(
    ("recorded", "device", "asked", "is_refused"),
    [
        ("float32", "cpu", None, False),
        ("float16", "cpu", None, True),
        ("float16", "cpu", "float16", False),
        ("float32", "cuda", None, True),
        (None, "cpu", None, False),
        (None, "cpu", "bfloat16", True),
    ],
)
def test_a_folder_goes_on_in_its_precision(tiny_model, tmp_path, recorded, device, asked, is_refused):
    """Whatever machine it is; where earlier versions recorded null, the default of a machine that is not known."""
    config = EvaluateConfig(model=str(tiny_model), num_scenes=1, dtype=asked, device=device)
    record = locate_record(tmp_path, "tiny")
    settings = Evaluation(replace(config, device="cpu"), tmp_path)._settings["tiny"]
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps(settings | {"dtype": recorded}))
    given = "float16" if device == "cuda" else "float32"
    if is_refused:
        with pytest.raises(
            ValueError, match=f"made with other settings: dtype was {recorded} and now {asked or given}; name"
        ):
            Evaluation(config, tmp_path)
    else:
        assert Evaluation(config, tmp_path)._settings["tiny"]["dtype"] == (asked or "float32")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"motions": "own", "strength": 2.0}, "strength goes with motions=presets; leave it out"),
        ({"motions": "own", "camera_presets": ["roll"]}, "camera_presets goes with motions=presets"),
        ({"num_points": 8}, "num_points goes with motions=own"),
        ({"images": "i", "num_scenes": 2}, "num_scenes goes with sprite scenes, and images takes their place"),
        ({"images": "i", "style": "ink"}, "style goes with sprite scenes"),
        ({"images": "i", "world": SpriteWorldConfig(max_sprites=2)}, "world goes with sprite scenes"),
        ({"cotracker": "clone"}, "cotracker goes with tracker=cotracker"),
    ],
)
def test_what_does_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        EvaluateConfig(model="m", **settings)


def test_a_folder_of_what_did_nothing_goes_on(tiny_model, tmp_path):
    """Another number of points does nothing here; another strength does."""
    config = EvaluateConfig(model=str(tiny_model), num_scenes=1, device="cpu")
    record = locate_record(tmp_path, "tiny")
    record.parent.mkdir(parents=True)
    (tmp_path / "scores").mkdir()
    settings = Evaluation(config, tmp_path)._settings["tiny"]
    record.write_text(json.dumps(settings | {"num_points": 9}))
    assert Evaluation(config, tmp_path)._settings["tiny"] == settings
    record.write_text(json.dumps(settings | {"strength": 2.0}))
    with pytest.raises(ValueError, match=r"strength was 2\.0 and now 1\.0"):
        Evaluation(config, tmp_path)


def test_the_stride_of_footage_says_nothing_of_sprites():
    config, wanted = EvaluateConfig(model="m", frechet=["frechet_small"]), VideoFormat((64, 64), 16)
    described = describe_reference(config, "frechet_small", wanted)
    assert describe_reference(replace(config, reference_stride=3), "frechet_small", wanted) == described


def test_what_has_changed_is_told_with_both_values(tmp_path):
    record = tmp_path / "made_with.json"
    old = {"seed": 0, "size": [64, 64], "weights": {"a": [1, 5], "b": [2, 5]}}
    record.write_text(json.dumps(old))
    for new, said in (
        ({"seed": 1}, "settings: seed was 0 and now 1; name another --output"),
        ({"seed": 1, "size": [32, 64]}, r"settings: seed was 0 and now 1, and size; name"),
        ({"weights": {"a": [1, 5], "b": [2, 6]}}, r"settings: weights.b was \[2, 5\] and now \[2, 6\]; name"),
    ):
        with pytest.raises(ValueError, match=said):
            merge_with_record(record, old | new)


def test_loras_may_be_folders_and_runs(tmp_path):
    name = "pytorch_lora_weights.safetensors"
    for folder in ("style", "run/motion_lora"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).touch()
    (tmp_path / "run" / "config.yaml").write_text("stage: motion_director\n")
    (tmp_path / "file.safetensors").touch()
    method = Method(
        model="m",
        lora=[f"{tmp_path / 'style'}:0.5", str(tmp_path / "file.safetensors")],
        motion_lora=[str(tmp_path / "run")],
    )
    files = [Path(file).relative_to(tmp_path).as_posix() for file in list_attached_files(method)]
    assert files == [f"style/{name}", "file.safetensors", f"run/motion_lora/{name}"]
