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


def test_intensity_is_the_visible_path():
    points, visible = tracks(8.0, 4.0)
    visible[0, 0, 3:] = False
    torch.testing.assert_close(motion_intensity(points, visible), torch.tensor([[4.0, 4.0]]))


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
