"""The sprite world's settings: what occurs in a clip, patterns on the sprites, calm backgrounds; and its defaults."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch

from imageconductor.data.batches import SpriteSamples, sample_frames
from imageconductor.data.scenes import render, rotation
from imageconductor.data.shapes import EXTENT, SPRITE_PATTERNS, pattern_distance, signed_distance
from imageconductor.data.sprite_world import SPRITE_COLOURS, SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import SpriteDataset, caption_words, sample_scene

PATTERNED = SpriteWorldConfig(
    size=(64, 64),
    min_sprites=2,
    max_sprites=3,
    shapes=("circle", "star"),
    colours=("red", "green", "blue"),
    patterns=tuple(SPRITE_PATTERNS),
    sprite_radius=(0.1, 0.18),
    keep_clear=True,
    background_contrast=0.5,
)


def test_the_defaults_draw_the_clips_that_the_bundled_model_was_trained_and_measured_on():
    scene = sample_scene(SpriteWorldConfig(), 4)
    expected = "a dotted orange circle and a checked purple heart on a navy and gray cloudy background"
    assert scene.caption == expected
    assert [item.radius for item in scene.sprites] == pytest.approx([23.0117, 22.0556], abs=1e-4)
    ends = [item.path[-1] for item in scene.sprites]
    assert np.array(ends) == pytest.approx(np.array([[95.960, 41.430], [32.184, 90.305]]), abs=1e-3)


@pytest.mark.parametrize("kind", list(SpriteSet))
def test_sprites_are_as_many_and_as_the_settings_say_and_keep_clear(kind):
    for index in range(60):
        scene = sample_scene(dataclasses.replace(PATTERNED, kind=kind), index)
        assert 2 <= len(scene.sprites) <= 3
        assert all(item.shape in PATTERNED.shapes and item.pattern in SPRITE_PATTERNS for item in scene.sprites)
        assert len({item.colour for item in scene.sprites} & set(PATTERNED.colours)) == len(scene.sprites)
        assert all(item.name in scene.caption for item in scene.sprites)
        assert set(scene.caption.replace(",", "").split()) <= set(caption_words())
        zoom = np.hypot(scene.camera[:, 0, 0], scene.camera[:, 1, 0])
        for centres, item in zip(scene.object_centres()[0].numpy(), scene.sprites, strict=True):
            assert (centres > item.radius * zoom[:, None]).all()
            assert (centres < 64 - item.radius * zoom[:, None]).all()
        for a, b in combinations(scene.sprites, 2):
            assert np.linalg.norm(a.path - b.path, axis=-1).min() > EXTENT * (a.radius + b.radius)


@pytest.mark.parametrize(("spacing", "seen"), [(1, {1}), (2, {1, 2}), (None, {1, 2, 3, 4, 5}), (9, {1, 2, 3, 4, 5})])
def test_frames_lie_at_most_as_far_apart_as_asked(spacing, seen):
    drawn = [sample_frames(16, 4, np.random.default_rng(seed), spacing) for seed in range(80)]
    assert {gap for frames in drawn for gap in np.diff(frames).tolist()} == seen
    assert all(len(frames) == 4 for frames in drawn)


def test_a_source_of_samples_draws_frames_as_far_apart_as_asked():
    config = SpriteWorldConfig(size=(16, 16), kind=SpriteSet.MIXED)
    near = SpriteSamples(config, [SpriteSet.MIXED], num_frames=4, max_frame_spacing=1)
    for position in range(4):
        whole = SpriteDataset(config)[position]["pixel_values"]
        clip = near[position]["pixel_values"]
        assert any(torch.equal(clip, whole[:, first : first + 4]) for first in range(13))


@pytest.mark.parametrize("pattern", list(SPRITE_PATTERNS))
def test_a_pattern_is_drawn_where_it_is_said_to_be_and_moves_with_its_sprite(pattern):
    config = dataclasses.replace(PATTERNED, patterns=(pattern,), size=(128, 128), num_frames=4)
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    pixels = torch.stack([x, y], dim=-1).double()
    for index in range(4):
        scene = sample_scene(config, index)
        video = render([scene])[0].movedim(0, -1).double()  # (T, H, W, 3)
        for t, camera in enumerate(torch.from_numpy(scene.camera)):
            world = (pixels - camera[:, 2]) @ torch.linalg.inv(camera[:, :2]).T
            for item in scene.sprites:
                turn = torch.from_numpy(rotation(-item.tilt)).T / item.radius
                local = (world - torch.from_numpy(item.path[t])) @ turn
                inner = signed_distance(item.shape, local) < -0.25
                edge = pattern_distance(pattern, local) * item.radius
                fill, outline = (torch.tensor(c).double() for c in (SPRITE_COLOURS[item.colour], item.outline))
                assert (video[t][inner & (edge > 1)] - fill).abs().max() < 2
                assert (video[t][inner & (edge < -1)] - outline).abs().max() < 2
                assert 0.2 < (edge[inner] < 0).double().mean() < 0.75


def test_contrast_scales_the_difference_of_the_background_colours_alone():
    full, half = (dataclasses.replace(PATTERNED, background_contrast=value) for value in (1.0, 0.5))
    bright, calm = (sample_scene(config, 3).background for config in (full, half))
    assert calm.colours[1] - calm.colours[0] == pytest.approx((bright.colours[1] - bright.colours[0]) / 2)
    assert calm.colours.mean(0) == pytest.approx(bright.colours.mean(0))
    assert (calm.waves == bright.waves).all()


def test_sprites_that_find_no_room_are_told():
    config = SpriteWorldConfig(min_sprites=2, sprite_radius=(0.3, 0.3))
    with pytest.raises(ValueError, match="no room for 2 sprites"):
        sample_scene(config, 0)
