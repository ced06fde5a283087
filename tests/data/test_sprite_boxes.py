"""Boxes of the sprite world, and sprites that grow or shrink."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from imageconductor.data.sprite_world import SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import sample_scene


@pytest.mark.parametrize("growth", [(1.0, 1.0), (1.5, 2.0)], ids=["as-they-are", "growing"])
def test_boxes_are_where_the_sprites_pixels_are(growth):
    """Each side within 1.5 pixels of what is drawn (tips are thinner than a pixel), of sprites that nothing covers."""
    world = SpriteWorldConfig(size=(96, 80), keep_clear=True, min_sprites=2, max_sprites=3, sprite_growth=growth)
    compared, sizes = 0, []
    for index in range(12):
        scene = sample_scene(world, index)
        boxes, (_, owner) = scene.boxes(), scene.sources()
        assert boxes.names == tuple(sprite.name for sprite in scene.sprites)
        for s in range(len(scene.sprites)):
            assert boxes.present[s].all()
            for t in range(scene.num_frames):
                rows, columns = (owner[t] == s).nonzero().unbind(1)
                drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                torch.testing.assert_close(torch.stack(drawn).double(), boxes.xyxy[s, t], atol=1.5, rtol=0)
                compared += 1
            sides = boxes.xyxy[s, :, 2] - boxes.xyxy[s, :, 0]
            camera = np.hypot(scene.camera[:, 0, 0], scene.camera[:, 1, 0])
            sizes.append(float(sides[-1] / sides[0] / camera[-1]))
    assert compared > 300
    grown = np.abs(np.log(sizes))
    assert grown.max() < 0.2 if growth[1] == 1 else (grown > np.log(1.4)).mean() > 0.5


def test_points_of_a_growing_sprite_stay_on_its_pattern():
    """The colour under a track is the same in every frame, and sources lead back to where a track began."""
    world = SpriteWorldConfig(
        size=(128, 128),
        kind=SpriteSet.OBJECT,
        min_sprites=1,
        max_sprites=1,
        patterns=("striped",),
        sprite_growth=(1.5, 1.8),
        sprite_radius=(0.12, 0.15),
    )
    scene = sample_scene(world, 3)
    assert scene.sprites[0].growth is not None
    last = int(np.abs(scene.sprites[0].growth - 1).argmax())  # where it is largest, or smallest
    y, x = torch.meshgrid(torch.arange(0, 128, 3.0), torch.arange(0, 128, 3.0), indexing="ij")
    points = torch.stack([x, y], -1).reshape(-1, 2)
    points = points[scene.on_sprite(points) >= 0]
    tracks, visible = scene.track(points)
    assert visible.all()
    sources, owner = scene.sources()
    near = tracks[:, last].round().long()
    back = sources[last, near[:, 1], near[:, 0]]
    on_sprite = owner[last, near[:, 1], near[:, 0]] >= 0
    assert on_sprite.float().mean() > 0.8
    assert (back - points)[on_sprite].norm(dim=-1).max() < 1.0
    still = dataclasses.replace(scene.sprites[0], growth=None)
    plain = dataclasses.replace(scene, sprites=(still,))
    assert (plain.track(points)[0][:, last] - tracks[:, last]).norm(dim=-1).max() > 2
