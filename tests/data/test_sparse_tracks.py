"""Sampling of the sparse tracks that a training step shows."""

import torch

from imageconductor.data.sparse_tracks import motion_intensity, sample_sparse


def tracks(*lengths):
    points = torch.zeros(1, len(lengths), 5, 2)
    for i, length in enumerate(lengths):
        points[0, i, :, 0] = torch.linspace(0, length, 5)
    return points, torch.ones(1, len(lengths), 5, dtype=torch.bool)


def generator(seed=0):
    return [torch.Generator().manual_seed(seed)]


def test_intensity_is_the_largest_visible_distance_from_the_start():
    points, visible = tracks(8.0, -4.0, 0.4, 8.0)
    visible[0, 0, 3:] = False
    visible[0, 3, 0] = False
    points[~visible] = torch.nan
    expected = torch.tensor([[4.0, 4.0, 0.0, 0.0]])  # the third stays within the noise floor
    torch.testing.assert_close(motion_intensity(points, visible), expected)
    there_and_back = torch.tensor([0.0, 3.0, 6.0, 3.0, 0.0])
    points, visible = there_and_back.view(1, 1, 5, 1) * torch.tensor([0.6, 0.8]), torch.ones(1, 1, 5, dtype=torch.bool)
    torch.testing.assert_close(motion_intensity(points, visible), torch.tensor([[6.0]]))


def test_a_track_that_is_hidden_in_the_first_frame_is_never_drawn():
    points, visible = tracks(20.0, 5.0)
    visible[0, 0, :3] = False
    for seed in range(50):
        assert sample_sparse(points, visible, 8, generator(seed)).tolist() == [[False, True]]


def test_a_jittering_tracker_does_not_hide_what_moves():
    """12 of 256 tracks move by 22 px in 16 frames; by the lengths of their paths they would get 45 % of the draws."""
    random = torch.Generator().manual_seed(0)
    points = (torch.rand(1, 256, 1, 2, generator=random) * 256).repeat(1, 1, 16, 1)
    points[0, :12, :, 0] += torch.linspace(0, 22, 16)
    points += 0.05 * torch.randn(points.shape, generator=random)
    visible = torch.ones(points.shape[:3], dtype=torch.bool)
    drawn = torch.cat([sample_sparse(points, visible, 8, generator(seed)) for seed in range(200)])
    assert drawn[:, :12].sum() == drawn.sum()
    assert drawn[:, :12].any(0).all()


def test_rounding_to_float16_is_not_motion():
    still = torch.rand(1, 256, 1, 2, generator=generator()[0], dtype=torch.float64) * 0.2 + torch.linspace(
        256, 500, 256, dtype=torch.float64
    ).view(1, 256, 1, 1)
    points = (still + 0.01 * torch.arange(8).view(8, 1)).half().double()
    assert (points != points[:, :, :1]).any()
    assert not motion_intensity(points, torch.ones(points.shape[:3], dtype=torch.bool)).any()


def test_one_to_eight_moving_tracks():
    points, visible = tracks(*[1.0] * 20, *[0.0] * 20)
    counts = set()
    for seed in range(80):
        keep = sample_sparse(points, visible, 8, generator(seed))
        assert not keep[0, 20:].any(), "still tracks are never drawn while others move"
        counts.add(int(keep.sum()))
    assert counts == set(range(1, 9))


def test_the_probability_is_proportional_to_motion():
    points, visible = tracks(1.0, 3.0)
    drawn = torch.stack([sample_sparse(points, visible, 1, generator(seed))[0] for seed in range(600)])
    assert abs(drawn[:, 1].float().mean().item() - 0.75) < 0.06


def test_a_still_clip_shows_visible_tracks_and_draws_repeat():
    points, visible = tracks(0.0, 0.0, 0.0)
    visible[0, 2] = False
    drawn = [sample_sparse(points, visible, 8, generator(seed)) for seed in range(20)]
    assert all(keep.any() and not keep[0, 2] for keep in drawn)
    assert torch.equal(drawn[3], sample_sparse(points, visible, 8, generator(3)))
    visible[:] = False
    assert not sample_sparse(points, visible, 8, generator()).any()


def told(points, visible, count, *, distinct):
    """Fraction of 200 draws of `count` tracks at most that hold one of the last ten tracks, which move apart."""
    drawn = [sample_sparse(points, visible, count, generator(seed), distinct=distinct)[0] for seed in range(200)]
    return torch.stack([keep[-10:].any() for keep in drawn]).float().mean().item()


def test_distinct_tracks_tell_a_small_motion_beside_a_large_one():
    points, visible = tracks(*[20.0] * 90, *[12.0] * 10)
    assert told(points, visible, 4, distinct=False) < 0.25
    assert told(points, visible, 4, distinct=True) > 0.7  # all but a quarter of the draws have two tracks or more


def test_a_track_that_is_covered_or_leaves_is_not_taken_for_another_motion():
    points, visible = tracks(*[20.0] * 90, *[12.0] * 10)
    visible[0, :60, 1:] = False
    points[~visible] = torch.nan
    points[0, 60:, 0] = 0.0
    assert told(points, visible, 4, distinct=True) > 0.7


def test_distinct_tracks_are_as_many_as_others_and_never_still_ones():
    points, visible = tracks(*[1.0] * 20, *[0.0] * 20)
    for seed in range(80):
        plain, keep = (sample_sparse(points, visible, 8, generator(seed), distinct=d)[0] for d in (False, True))
        assert keep.sum() == plain.sum()
        assert not keep[20:].any()
    assert sample_sparse(points[:, :5], visible[:, :5], 64, generator(1), distinct=True).all()
