"""Requests of an evaluation: sprite scenes in their own motions or in presets, and pictures with captions."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from imageconductor.data.scenes import render
from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import sample_scene
from imageconductor.evaluation.drawn_motion.config import EvaluateConfig
from imageconductor.evaluation.drawn_motion.reference_videos import read_references
from imageconductor.evaluation.drawn_motion.requests import build_requests

SIZE, FRAMES = (64, 64), 16
SCENES = EvaluateConfig(videos="mine", motions="own", num_scenes=3, size=SIZE, num_frames=FRAMES)


def test_requests_are_held_out_and_repeat():
    first, second = (build_requests(SCENES, "object", SIZE, FRAMES) for _ in range(2))
    assert [r.key for r in first] == [r.key for r in second]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert "moves" not in first[0].prompt
    more = build_requests(replace(SCENES, num_scenes=5), "object", SIZE, FRAMES)
    assert [(r.key, r.seed) for r in more[:3]] == [(r.key, r.seed) for r in first]
    index = int(first[0].key.removeprefix("object-"))
    (reference,) = read_references(SCENES, SIZE, FRAMES, [index])

    def frames(seed, kind):
        world = SpriteWorldConfig(size=SIZE, num_frames=FRAMES, kind=kind, seed=seed, caption_motion_prob=0)
        return render([sample_scene(world, index)])[0].permute(1, 2, 3, 0).numpy()

    assert np.array_equal(first[0].truth, frames(10_000, SpriteSet.OBJECT)), "training has seed 0"
    assert np.array_equal(first[0].image, first[0].truth[0])
    assert np.array_equal(reference, frames(10_001, SpriteSet.MIXED)), "no request shows a reference clip"
    others = frames(0, SpriteSet.OBJECT), frames(10_000, SpriteSet.MIXED), reference
    assert not any(np.array_equal(first[0].image, other[0]) for other in others)


@pytest.mark.parametrize("motions", ["own", "presets"])
def test_scenes_are_of_the_stated_world(motions):
    world = SpriteWorldConfig(shapes=("heart",), patterns=("dotted",), max_sprites=2, caption_motion_prob=1.0, seed=5)
    config = replace(SCENES, motions=motions, world=world)
    for kind in ("camera", "object"):
        for request in build_requests(config, kind, SIZE, FRAMES):
            assert request.prompt.count("dotted") >= 2
            assert request.prompt.count("heart") == 2
            assert not any(word in request.prompt for word in ("camera", "moves"))
            assert request.image.shape == (*SIZE[::-1], 3)


def test_presets_on_sprite_scenes_keep_the_background_off_the_dragged_path():
    config = EvaluateConfig(model="m", num_scenes=2)
    camera = build_requests(config, "camera", SIZE, FRAMES)
    assert len(camera) == len({request.key for request in camera}) == 20
    dragged = build_requests(config, "object", SIZE, FRAMES)
    assert len(dragged) == 20
    for request in dragged:
        path = request.trajectories.points.numpy().reshape(-1, 2)
        distance = np.linalg.norm(request.background[:, None] - path, axis=-1).min()
        assert distance > 8
        assert len(request.background) > 10


def test_images_with_captions_and_objects(tmp_path):
    Image.new("RGB", (128, 64), "red").save(tmp_path / "a.png")
    config = EvaluateConfig(model="m", images=str(tmp_path), object_presets=["line-right", "shake"])
    with pytest.raises(FileNotFoundError, match="each image needs its JSON"):
        build_requests(config, "camera", SIZE, FRAMES)
    described = tmp_path / "a.json"
    described.write_text('{"caption": "red", "objects": [[64, 32], [80, 20]]}')
    requests = build_requests(config, "object", SIZE, FRAMES)
    assert [r.key for r in requests] == ["a_line-right", "a_shake"]
    # The middle half of the picture is left: x loses 32.
    np.testing.assert_allclose(requests[0].trajectories.points[:, 0], [[32, 32], [48, 20]], atol=0.01)
    assert requests[0].prompt == "red"
    assert len(build_requests(config, "camera", SIZE, FRAMES)) == 10
    for text, match in (
        ('{"caption": "red", "objects": [[10, 32]]}', "outside the 64x64 crop"),
        ('{"caption": "red", "objects": [[64, 99]]}', "outside the 128x64 image"),
        ('{"objects": []}', "expected"),
        ('{"caption": "red"}', "names an object"),
    ):
        described.write_text(text)
        with pytest.raises(ValueError, match=match):
            build_requests(config, "object", SIZE, FRAMES)
