"""The sprite world: pixels agree with tracks and captions, and only the intended parts move."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from imageconductor.data.backgrounds import BACKGROUND_COLOURS, Background, sample_background
from imageconductor.data.scenes import Scene, Sprite, render, rotation
from imageconductor.data.shapes import EXTENT, SHAPES, signed_distance
from imageconductor.data.sprite_world import SHAPE_NAMES, SPRITE_COLOURS, SpriteSet, SpriteWorldConfig
from imageconductor.data.sprites import SpriteDataset, caption_words, captions, sample_scene

T = 8


def crowd(**settings: Any) -> SpriteWorldConfig:
    """A world in which all that can occur does: plain sprites may cover each other, leave the frame, or be alone."""
    everything = {"shapes": SHAPE_NAMES, "colours": tuple(SPRITE_COLOURS), "patterns": (), "background_contrast": 1.0}
    places = {"size": (64, 64), "min_sprites": 1, "max_sprites": 2, "keep_clear": False, "sprite_radius": (0.09, 0.15)}
    return SpriteWorldConfig(**{**everything, **places, "still_prob": 0.15, "grid": 8, **settings})


def black() -> Background:
    return Background("flat", np.zeros((2, 3)), np.zeros(3), np.zeros((3, 4)), 1, 0.0, 1.0)


def camera_path(pan: tuple[float, float] = (0, 0), zoom: float = 1.0, roll: float = 0.0, size: int = 64) -> np.ndarray:
    centre = np.full(2, (size - 1) / 2)
    camera = np.zeros((T, 2, 3))
    for t, u in enumerate(np.linspace(0, 1, T)):
        camera[t, :, :2] = zoom**u * rotation(roll * u)
        camera[t, :, 2] = centre - camera[t, :, :2] @ (centre + u * np.array(pan))
    return camera


def sprite(path: np.ndarray, shape: str = "square", colour: str = "red", radius: float = 7.0) -> Sprite:
    rgb = SPRITE_COLOURS[colour]
    return Sprite(shape, colour, (float(rgb[0]), float(rgb[1]), float(rgb[2])), radius, 0.15, path)


def line(start: tuple[float, float], stop: tuple[float, float]) -> np.ndarray:
    return np.linspace(start, stop, T)


def centroids(video: torch.Tensor) -> torch.Tensor:
    """(T, 2) intensity-weighted mean pixel of a (3, T, H, W) clip."""
    weight = video.double().sum(0)
    y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in weight.shape[1:]], indexing="ij")
    return torch.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))], dim=-1) / weight.sum((1, 2))[:, None]


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_drawn_sprite_is_where_its_centre_is_said_to_be(shape):
    camera = camera_path(pan=(6, -4), zoom=1.25, roll=0.4)
    scene = Scene((64, 64), camera, (sprite(line((25.3, 33.1), (41.7, 26.4)), shape),), black(), "")
    centres, visible = scene.object_centres()
    assert visible.all()
    assert (centroids(render([scene])[0]) - centres[0]).norm(dim=-1).max() < 0.15


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_drawn_outline_is_the_outline_that_tracks_use(shape):
    item = dataclasses.replace(sprite(line((25.0, 33.0), (40.0, 28.0)), shape, radius=9.0), tilt=0.5)
    scene = Scene((64, 64), camera_path(zoom=1.2, roll=0.7), (item,), black(), "")
    red = render([scene])[0, 0]
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    grid = torch.stack([x, y], dim=-1).reshape(-1, 2)
    covered = scene.on_sprite(grid) == 0
    assert ((red[0].reshape(-1) > SPRITE_COLOURS["red"][0] / 2) == covered).all()
    points, _ = scene.track(grid[covered])
    t = torch.arange(T).expand(points.shape[:2])
    column, row = points.round().long().unbind(-1)
    assert (red[t, row, column] > 0).float().mean() > 0.98  # rounding may step off a sharp tip


@pytest.mark.parametrize("camera", [camera_path(pan=(7, -5)), camera_path(zoom=0.75), camera_path((3, 4), 1.2, -0.5)])
def test_a_background_feature_is_where_its_track_is_said_to_be(camera):
    blob, k = (34.3, 30.6), 2 * math.pi / 110  # one crest of two long waves: a single round blob
    waves = np.array([[k, 0, math.pi / 2 - k * blob[0], 1], [0, k, math.pi / 2 - k * blob[1], 1], [0, 0, 0, 0]])
    background = Background("blob", np.array([[0, 0, 0], [250, 250, 250]]), np.zeros(3), waves, 2, -1.8, 18.0)
    scene = Scene((64, 64), camera, (), background, "")
    points, visible = scene.track(torch.tensor([blob]))
    assert visible.all()
    assert (centroids(render([scene])[0]) - points[0]).norm(dim=-1).max() < 0.15


def test_visible_centres_show_their_colour_and_hidden_ones_do_not():
    config = crowd(max_sprites=3)
    agree, hidden = [], 0
    for index in range(60):
        scene = sample_scene(config, index)
        video = render([scene])[0]
        for (points, visible), owner in zip(zip(*scene.object_centres(), strict=True), scene.sprites, strict=True):
            for t, (x, y) in enumerate(points.round().long().tolist()):
                if 0 <= x < 64 and 0 <= y < 64:
                    shown = video[:, t, y, x].tolist() == list(SPRITE_COLOURS[owner.colour])
                    agree.append(shown == bool(visible[t]))
                    hidden += not visible[t]
    assert hidden > 10
    assert np.mean(agree) > 0.985  # the rest lie on an antialiased edge


def test_the_same_index_is_the_same_clip_in_any_batch():
    data = SpriteDataset(crowd(max_sprites=3, seed=5))
    batch = data.batch([3, 11, 4])
    for row, index in enumerate([3, 11, 4]):
        item = SpriteDataset(crowd(max_sprites=3, seed=5))[index]
        for name in ("pixel_values", "points", "visible"):
            assert torch.equal(item[name], batch[name][row])
        assert (item["caption"], item["key"]) == (batch["caption"][row], batch["key"][row])


def test_index_seed_and_set_each_change_the_clip():
    base = crowd()
    videos = [render([sample_scene(base, 0)]), render([sample_scene(base, 1)])]
    videos += [render([sample_scene(dataclasses.replace(base, seed=1), 0)])]
    videos += [render([sample_scene(dataclasses.replace(base, kind=SpriteSet.OBJECT), 0)])]
    assert not any(torch.equal(a, b) for a, b in combinations(videos, 2))


def test_no_global_randomness_is_used():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    SpriteDataset(crowd())[0]
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_samples_have_the_shapes_and_ranges_of_the_contract():
    config = crowd(size=(96, 64), num_frames=5, grid=4)
    batch = SpriteDataset(config, length=9).batch([0, 8])
    assert batch["pixel_values"].shape == (2, 3, 5, 64, 96)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["points"].shape == (2, 16, 5, 2)
    assert batch["points"].dtype == torch.float32
    assert batch["visible"].shape == (2, 16, 5)
    assert batch["visible"].dtype == torch.bool
    assert batch["points"][0, 0, 0].tolist() == [11.5, 7.5]  # centre of the first of 4 x 4 parts of the frame
    with pytest.raises(IndexError, match="9"):
        SpriteDataset(config, length=9)[9]


def test_in_the_camera_set_sprites_and_background_share_one_similarity():
    data = SpriteDataset(crowd(kind=SpriteSet.CAMERA))
    for index in range(20):
        scene = data.scene(index)
        points, _ = scene.track(data.grid_points)
        points = torch.cat([points, scene.object_centres()[0]]).double()
        start = torch.cat([points[:, 0], torch.ones(len(points), 1)], dim=1)
        for t in range(points.shape[1]):
            fit = torch.linalg.lstsq(start, points[:, t]).solution
            assert (start @ fit - points[:, t]).abs().max() < 1e-4
            assert fit[:2].T @ fit[:2] == pytest.approx((torch.eye(2) * fit[:2].det()).numpy(), abs=1e-5)


def test_the_camera_is_the_identity_in_frame_0_and_moves_plainly_after_it():
    for kind in SpriteSet:
        for index in range(40):
            scene = sample_scene(crowd(kind=kind), index)
            assert (scene.camera[0] == np.eye(2, 3)).all()
            if kind == SpriteSet.OBJECT:
                assert (scene.camera == np.eye(2, 3)).all()
            if kind == SpriteSet.CAMERA:
                corners, _ = scene.track([[0.0, 0.0], [63.0, 0.0], [0.0, 63.0], [63.0, 63.0]])
                assert (corners - corners[:, :1]).norm(dim=-1).max() > 5


def test_in_the_object_set_pixels_away_from_the_sprites_never_change():
    for index in range(10):
        scene = sample_scene(crowd(kind=SpriteSet.OBJECT, max_sprites=3), index)
        video = render([scene])[0]
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        far = torch.ones(64, 64, dtype=torch.bool)
        for centres, item in zip(scene.object_centres()[0], scene.sprites, strict=True):
            for cx, cy in centres.tolist():
                far &= torch.hypot(x - cx, y - cy) > EXTENT * item.radius + 1
        assert far.sum() > 500
        assert (video[:, :, far] == video[:, :1, far]).all()
        assert (video != video[:, :1]).any()


def test_a_moving_camera_is_visible_in_every_part_of_the_frame():
    for index in range(40):
        scene = sample_scene(crowd(kind=SpriteSet.CAMERA), index)
        video = render([dataclasses.replace(scene, sprites=())])[0].float()
        change = (video - video[:, :1]).abs().amax((0, 1))
        blocks = torch.nn.functional.max_pool2d(change[None], 16)
        assert blocks.min() > 10, index


def test_a_sprite_that_passes_in_front_hides_points_and_only_then():
    behind = sprite(np.tile((32.0, 32.0), (T, 1)), "circle", "blue")
    front = sprite(line((10.0, 32.0), (54.0, 32.0)))
    scene = Scene((64, 64), camera_path(), (behind, front), black(), "")
    _, visible = scene.track([[32.0, 32.0], [32.0, 45.0], [10.0, 32.0], [50.0, 32.0]])
    assert scene.on_sprite(torch.tensor([[32.0, 32.0], [32.0, 45.0], [10.0, 32.0]])).tolist() == [0, -1, 1]
    assert visible[0].tolist() == [True, True, True, False, False, True, True, True]
    assert visible[1].all()  # background beside the way
    assert visible[2].all()  # on the sprite in front
    assert visible[3].tolist() == [True] * 6 + [False] * 2  # background on the way
    swapped = dataclasses.replace(scene, sprites=(front, behind))
    _, centres_visible = swapped.object_centres()
    assert centres_visible[1].all()
    assert not centres_visible[0].all()


def test_leaving_the_frame_hides_a_point_and_coming_back_shows_it():
    path = np.concatenate([line((50.0, 20.0), (90.0, 20.0))[: T // 2], line((90.0, 20.0), (50.0, 20.0))[T // 2 :]])
    scene = Scene((64, 64), camera_path(), (sprite(path),), black(), "")
    points, visible = scene.track([[50.0, 20.0]])
    assert visible[0].tolist() == [bool(-0.5 <= x < 63.5) for x in points[0, :, 0]]
    assert not visible.all()
    panned = Scene((64, 64), camera_path(pan=(20, 0)), (), black(), "")
    assert panned.track([[10.0, 30.0]])[1][0].tolist() == [True] * 4 + [False] * 4


def test_sprites_start_inside_the_frame_and_apart():
    for index in range(200):
        scene = sample_scene(crowd(max_sprites=3), index)
        assert 1 <= len(scene.sprites) <= 3
        y, x = np.mgrid[-1:65, -1:65]
        pixels = torch.from_numpy(np.stack([x, y], axis=-1).reshape(-1, 2)).double()
        cover = [
            signed_distance(
                s.shape, (pixels - torch.from_numpy(s.path[0])) @ torch.from_numpy(rotation(s.tilt)) / s.radius
            )
            < 0
            for s in scene.sprites
        ]
        assert torch.stack(cover).sum(0).max() == 1
        edge = ((pixels < 0) | (pixels > 63)).any(-1)
        assert not torch.stack(cover)[:, edge].any()


def test_most_sprites_stay_in_view():
    scenes = [sample_scene(crowd(kind=kind), index) for kind in SpriteSet for index in range(60)]
    inside = [((c > 0) & (c < 63)).all() for scene in scenes for c in scene.object_centres()[0]]
    assert np.mean(inside) > 0.95


@pytest.mark.parametrize("kind", list(SpriteSet))
def test_captions_name_exactly_what_is_in_the_scene(kind):
    config = crowd(kind=kind, max_sprites=3, caption_motion_prob=1.0)
    vocabulary = set(caption_words())
    for index in range(200):
        scene = sample_scene(config, index)
        content, motion = scene.caption.split(" background")
        things, ground = content.split(" on a", 1)
        words = things.replace(",", "").split()
        named = [(words[i - 1], word) for i, word in enumerate(words) if word in SHAPES]
        assert named == [(item.colour, item.shape) for item in scene.sprites]
        assert scene.background.pattern in ground
        assert f"the camera {scene.camera_motion}" in motion
        assert set(scene.caption.replace(",", "").split()) <= vocabulary
        assert scene.caption == scene.caption.lower()


def test_motion_words_are_stated_as_often_as_asked_and_change_nothing_else():
    silent, chatty = (crowd(caption_motion_prob=p) for p in (0.0, 1.0))
    assert not any("camera" in text for text in captions(silent, 50))
    assert all("camera" in text for text in captions(chatty, 50))
    assert torch.equal(render([sample_scene(silent, 7)]), render([sample_scene(chatty, 7)]))


def test_motion_words_tell_the_truth():
    config = crowd(kind=SpriteSet.CAMERA)
    seen = set()
    for index in range(300):
        scene = sample_scene(config, index)
        middle = scene.camera[config.num_frames // 2]
        centre, _ = scene.track([[31.5, 31.5]])
        shift = (centre[0, config.num_frames // 2] - 31.5).tolist()
        words = scene.camera_motion
        truths = {
            "left": shift[0] > 1,  # the camera goes left, so the picture goes right
            "right": shift[0] < -1,
            "up": shift[1] > 1,
            "down": shift[1] < -1,
            "in": middle[0, 0] ** 2 + middle[1, 0] ** 2 > 1,
            "out": middle[0, 0] ** 2 + middle[1, 0] ** 2 < 1,
            "clockwise": middle[1, 0] < 0,  # the camera turns clockwise, so the picture turns against the clock
            "counterclockwise": middle[1, 0] > 0,
        }
        for word in truths.keys() & set(words.split()):
            assert truths[word], words
            seen.add(word)
        if "returns" in words:
            assert scene.camera[-1] == pytest.approx(np.eye(2, 3), abs=1e-9)
    assert len(seen) == 8
    moving = [item for i in range(60) for item in sample_scene(crowd(kind=SpriteSet.OBJECT), i).sprites]
    for item in moving:
        shift = item.path[-1] - item.path[0]
        if item.motion in ("moves left", "moves right"):
            assert (shift[0] > 0) == (item.motion == "moves right")
        if item.motion in ("moves up", "moves down"):
            assert (shift[1] > 0) == (item.motion == "moves down")


def test_backgrounds_stay_apart_from_any_sprite_colours():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3):
        for names in combinations(SPRITE_COLOURS, count):
            _, (low, high) = sample_background(rng, 64.0, {name: SPRITE_COLOURS[name] for name in names})
            assert low != high
            assert not {low, high} & set(names)
            assert {low, high} <= set(BACKGROUND_COLOURS)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_sprites", 4, "max_sprites must be 1, 2 or 3, got 4"),
        ("size", (64, 8), "size must be at least 16 x 16 pixels, got (64, 8)"),
        ("camera_zoom", (0.8, 1.2), "camera_zoom is a ratio of at least 1, got (0.8, 1.2)"),
        ("camera_pan", (0.4, 0.2), "camera_pan must be a range with 0 <= low <= high, got (0.4, 0.2)"),
        ("sprite_radius", (0.0, 0.1), "sprite_radius must lie in (0, 0.3], got (0.0, 0.1)"),
        ("caption_motion_prob", 1.5, "caption_motion_prob must lie in [0, 1], got 1.5"),
        ("kind", "zoo", "'zoo' is not a valid SpriteSet"),
        ("min_sprites", 4, "min_sprites must lie in 1..max_sprites=3, got 4"),
        ("shapes", (), "shapes must name at least one"),
        ("shapes", ("blob",), "shapes: there is no 'blob', only "),
        ("colours", ("red",), "colours must name at least max_sprites=3, got ('red',)"),
        ("patterns", ("tartan",), "patterns: there is no 'tartan', only "),
        ("background_contrast", 0.0, "background_contrast must lie in (0, 1], got 0.0"),
        ("grid", 0, "grid must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused_by_value(field, value, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        SpriteWorldConfig(**{field: value})


def test_render_refuses_scenes_of_different_sizes():
    with pytest.raises(ValueError, match="one size"):
        render([sample_scene(crowd(), 0), sample_scene(crowd(size=(32, 32)), 0)])


def test_ink_keeps_the_brightness_and_has_two_colours():
    scene = sample_scene(crowd(), 3)
    coloured, ink = (render([dataclasses.replace(scene, style=style)])[0].double() for style in ("colour", "ink"))
    brightness = 0.299 * coloured[0] + 0.587 * coloured[1] + 0.114 * coloured[2]
    expected = [low + (high - low) * brightness / 255 for low, high in ((28, 246), (36, 238), (84, 216))]
    assert (ink - torch.stack(expected)).abs().max() < 1.6
    drawn = SpriteDataset(crowd(style="ink"), 4)[3]["pixel_values"]
    assert torch.equal(drawn.double(), ink)


def test_a_sprite_that_leaves_is_absent():
    path = line((30, 32), (130, 32))
    scene = Scene((64, 64), camera_path(), (sprite(path),), black(), "a red square")
    boxes = scene.boxes()
    assert boxes.present[0].tolist() == sorted(boxes.present[0].tolist(), reverse=True)
    assert boxes.present[0, 0]
    assert not boxes.present[0, -1]
    assert boxes.xyxy[0, boxes.present[0]][:, 2].max() <= 64
