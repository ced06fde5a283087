"""What the miniature of MotionDirector measures: true clips have all that is asked, reference clips all that leaks."""

from dataclasses import replace
from pathlib import Path

import pytest

from imageconductor.config import load
from imageconductor.data.scenes import render
from imageconductor.evaluation.learned_motion.config import LearnedMotionConfig
from scripts import motion_director_sprites as miniature

MOTIONS = list(miniature.MOTIONS)


def measure(filmed, asked, motion):
    return miniature.measure_video(render([filmed])[0].permute(1, 2, 3, 0).numpy(), asked, motion, count=4)


@pytest.mark.parametrize("motion", MOTIONS)
def test_true_clips_of_the_prompts_have_all_that_is_asked_and_nothing_of_the_reference(motion):
    for scene in miniature.prompt_scenes(12, motion)[::2]:
        found = measure(scene, scene, motion)
        assert found.pop("cosine") > 0.99
        assert found.pop("clip_pixels") < 0.01
        assert found == {"prompt_colour": 1, "prompt_shape": 1, "clip_colour": 0, "clip_background": 0}
        others = [measure(scene, scene, other)["cosine"] for other in MOTIONS if other != motion]
        assert max(map(abs, others)) < 0.25


def test_a_reference_clip_is_all_leak():
    asked = miniature.prompt_scenes(1)[0]
    for number in range(4):
        found = measure(miniature._clip_scene(number, "zigzag"), asked, "zigzag")
        assert found.pop("cosine") > 0.99
        assert found.pop("clip_pixels") > 0.99
        assert found == {"prompt_colour": 0, "prompt_shape": 0, "clip_colour": 1, "clip_background": 1}


def test_prompts_share_neither_shape_nor_colour_nor_background_with_the_clips():
    clips = [miniature._clip_scene(number, "loop") for number in range(4)]
    for scene in miniature.prompt_scenes(12):
        for clip in clips:
            assert scene.sprites[0].colour != clip.sprites[0].colour
            assert scene.sprites[0].shape != clip.sprites[0].shape
            assert not set(scene.caption.split()) & set(clip.caption.split()) & miniature._CLIP_BACKGROUNDS


def test_captions_name_no_colour_where_clips_are_recoloured(tmp_path):
    config = miniature.MiniatureConfig(output=str(tmp_path))
    folders = [miniature.write_clips(config, "loop", 1, names_colours) for names_colours in (True, False)]
    named, plain = ((folder / "clip0.txt").read_text() for folder in folders)
    assert plain == "a dotted star"
    assert named.startswith("a dotted red star on a ")
    assert len(set(folders)) == 2


def test_the_evaluation_reads_what_the_script_writes(tmp_path):
    plan = load(LearnedMotionConfig, Path("configs/evaluate/motion_director_sprites.yaml"), [])
    config = miniature.MiniatureConfig()
    for name, motion in plan.motions.items():
        written = miniature.write_first_frames(replace(config, output=str(tmp_path)), name)
        images = [str(Path(config.output) / Path(path).relative_to(tmp_path)) for path in written]
        assert motion.images == images[: len(motion.images)]
        assert motion.prompts == [
            " ".join(scene.caption.split()[:4]) for scene in miniature.prompt_scenes(len(motion.images))
        ]
