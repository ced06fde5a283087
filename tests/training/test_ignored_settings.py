"""Settings that do nothing beside the others are refused, with what to set; what is shipped has none of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY_WORLD

from imageconductor.training.ignored_settings import check_ignored
from imageconductor.training.record import RunRecord, check_continuation
from imageconductor.training.stage_configs import load_config
from imageconductor.training.train_config import TrainConfig
from scripts.train_sprites import SpriteRecipe, stage_config

RECIPES = ("sprites", "sprites_text", "smoke")
SHIPPED = [path for path in sorted(Path("configs/train").rglob("*.yaml")) if path.stem not in RECIPES]

IGNORED = [  # stage, settings beside which others do nothing, those others, why, and what to set
    ("camera_lora", {"data": ["a"]}, {"sets": ["camera"]}, 'on clips of data; set sets=["mixed"]'),
    ("camera_lora", {"data": ["a"]}, {"world": TINY_WORLD}, "on clips of data; set world.size=[128, 128]"),
    ("object_gates", {"data": ["a"]}, {"shuffle_shards": 4}, "object_gates, which mixes all of its clips; set shuffle"),
    ("scene_gates", {}, {"shuffle_shards": 4}, "in stage scene_gates, which mixes all of its clips; set shuffle"),
    ("object_gates", {}, {"image_dropout": 0.5}, "set first_frame=true, or image_dropout=0.0"),
    ("scene_gates", {"first_frame_by": "gates"}, {"image_dropout": 0.5}, "set first_frame_by=both, or image_dropout="),
    ("foundation", {}, {"motion_dropout": 0.5}, "set train_motion_controlnet=true, or motion_dropout=0.25"),
    ("foundation", {}, {"trajectories": "dense"}, 'set train_motion_controlnet=true, or trajectories="sparse"'),
    ("foundation", {}, {"max_tracks": 4}, "set train_motion_controlnet=true, or max_tracks=8"),
    ("foundation", {}, {"motion_controlnet": "a"}, "set train_motion_controlnet=true, or motion_controlnet=null"),
    ("motion_controlnet", {"trajectories": "dense"}, {"max_tracks": 4}, "set trajectories=sparse, or max_tracks=8"),
    ("object_lora", {"orthogonal_weight": 0.0}, {"orthogonal_target": "zero"}, "set a weight, or orthogonal_target="),
    ("object_lora", {"orthogonal_weight": 0.0}, {"orthogonal_linear_only": False}, "or orthogonal_linear_only=true"),
    ("motion_director", {"learns_motion": False}, {"debiasing_beta": None}, "set debiasing_beta=1.0"),
    ("motion_director", {}, {"inversion_steps": 9}, "set noise_prior, or inversion_steps=50"),
    ("motion_director", {"data": ["a.mp4"], "fps": 8.0}, {"frame_step": 2}, "set fps=null, or frame_step=1"),
    ("motion_director", {"prompt": "a"}, {"captions": "a.json"}, "set prompt=null, or captions=null"),
]


@pytest.mark.parametrize(("stage", "beside", "changes", "words"), IGNORED)
def test_what_does_nothing_is_refused_but_not_in_records(configure, stage, beside, changes, words):
    without = configure(stage, **beside)
    check_ignored(without)
    before = replace(without, **changes)
    with pytest.raises(ValueError, match="does nothing") as refusal:
        check_ignored(before)
    assert words in str(refusal.value)
    assert str(refusal.value).startswith(next(iter(changes)))
    folder = Path(before.output)
    folder.mkdir()
    RunRecord(folder, before, 0).close()
    (folder / "checkpoint-00000001").mkdir()
    check_continuation(without)


def test_the_entries_of_a_json_are_frame_step_apart_beside_fps(configure):
    check_ignored(configure("motion_director", data=["a.mp4", "b.JSON"], fps=8.0, frame_step=2))


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_nothing_that_is_shipped_does_nothing(path, tmp_path):
    config = load_config(path)
    check_ignored(config)
    if isinstance(config, TrainConfig) and not config.data:
        check_ignored(stage_config(str(path), SpriteRecipe(), 0.01, tmp_path, tmp_path / "model"))
