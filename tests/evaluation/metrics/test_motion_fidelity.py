"""Motion fidelity of paths and videos whose motion is known."""

import numpy as np
import pytest

from imageconductor.data.trackers import LucasKanadeTracker
from imageconductor.evaluation.metrics.motion_fidelity import (
    TrackSet,
    displacement_cosine,
    fidelity_to_references,
    motion_fidelity,
    track_grid,
    track_similarities,
)

T = 9


def tracks(*directions, size=(100, 100), reach=30.0):
    """Straight tracks of `reach` px in directions given in degrees; None stands still."""
    times = np.linspace(0, reach, T)[:, None]
    points = [
        np.full((T, 2), 50.0) + (0 if d is None else times * [np.cos(np.deg2rad(d)), np.sin(np.deg2rad(d))])
        for d in directions
    ]
    return TrackSet(np.stack(points), np.ones((len(points), T), bool), size)


def test_fidelity_is_the_mean_of_both_directions_of_best_cosines():
    assert motion_fidelity(tracks(0, 90), tracks(90, 0)) == pytest.approx(1), "sets have no order"
    assert motion_fidelity(tracks(0), tracks(180)) == pytest.approx(-1)
    # Both motions of the result are in the reference, one of the reference's two is not in the result.
    assert motion_fidelity(tracks(0, 90), tracks(0)) == pytest.approx((0.5 + 1) / 2)
    assert motion_fidelity(tracks(0), tracks(0, 90)) == pytest.approx((1 + 0.5) / 2)
    assert motion_fidelity(tracks(0, 0, 0, 90), tracks(0)) == pytest.approx((0.75 + 1) / 2)


def test_still_tracks_have_no_say_and_a_still_result_scores_nothing():
    assert motion_fidelity(tracks(0, None, None), tracks(None, 0)) == pytest.approx(1)
    assert motion_fidelity(tracks(0), tracks(None, None)) == 0
    assert np.isnan(motion_fidelity(tracks(None), tracks(0)))
    noise = np.random.default_rng(0).normal(0, 0.3, (1, T, 2))
    trembling = tracks(None)
    trembling = TrackSet(trembling.points + noise - noise[:, :1], trembling.followed, trembling.size)
    assert motion_fidelity(tracks(0), trembling) == 0, "0.3 px of noise in a frame of 100 px is no motion"
    assert motion_fidelity(tracks(0), trembling, still_fraction=0) != 0


def test_reach_counts_in_diagonals_and_neither_size_nor_speed_changes_a_cosine():
    assert motion_fidelity(tracks(20), tracks(20, size=(1000, 400), reach=300)) == pytest.approx(1)
    small = tracks(20, reach=3.0)
    assert motion_fidelity(small, small) == pytest.approx(1), "2 % of the diagonal"
    assert np.isnan(motion_fidelity(tracks(20, size=(1000, 1000), reach=3.0), small)), "0.2 %"
    # Diagonal is diagonal in a wide frame: dividing x and y by different lengths would turn it.
    assert motion_fidelity(tracks(45), tracks(45, size=(400, 100))) == pytest.approx(1)


def test_a_step_counts_by_its_length():
    reference = tracks(0)
    points = reference.points.copy()
    points[0, 1:, 0] += 20  # one step of 23.75 px, then seven of 3.75
    points[0, -1] = points[0, -2] + [0, 0.1]  # and a last one aside, of 0.1
    result = TrackSet(points, reference.followed, reference.size)
    steps, other = np.diff(reference.points[0], axis=0), np.diff(points[0], axis=0)
    expected = (steps * other).sum() / np.linalg.norm(steps) / np.linalg.norm(other)
    assert track_similarities(reference, result)[0, 0] == pytest.approx(expected)
    assert displacement_cosine(reference.points[0], points[0]) == pytest.approx(expected)


def test_only_steps_that_both_tracks_have_are_compared():
    reference, result = tracks(0), tracks(0)
    result.points[0, 6:] = 1e6  # where the tracker ended up after it had lost the point
    result.followed[0, 6:] = False
    assert motion_fidelity(reference, result) == pytest.approx(1)
    result.followed[0, 4:] = False
    assert result.known.sum() == 3
    assert motion_fidelity(reference, result) == 0, "followed in less than half of the steps"
    wandering = tracks(None, 0)
    wandering.points[:, 7:] += 50
    wandering.followed[:, 7:] = False
    assert wandering.moving(0.01).tolist() == [False, True], "what stood still while it was followed"
    reference.points[0, 0] = np.nan
    assert np.isfinite(motion_fidelity(tracks(0), TrackSet(reference.points, reference.followed, (100, 100))))


def test_the_best_reference_or_all_of_them():
    references = [tracks(0), tracks(180), tracks(None)]
    assert fidelity_to_references(references, tracks(0)) == pytest.approx(1)
    assert fidelity_to_references(references, tracks(0), "mean") == pytest.approx(0), "the still one does not count"
    assert np.isnan(fidelity_to_references([tracks(None)], tracks(0)))


def test_motions_of_another_length_are_refused():
    long = tracks(0)
    short = TrackSet(long.points[:, :-1], long.followed[:, :-1], long.size)
    with pytest.raises(ValueError, match="9 and 8 frames"):
        motion_fidelity(long, short)
    with pytest.raises(ValueError, match=r"\(9, 2\) and \(8, 2\)"):
        displacement_cosine(long.points[0], short.points[0])


def test_displacement_cosine_of_paths_with_gaps_and_without_motion():
    path = np.cumsum(np.random.default_rng(0).normal(size=(T, 2)), axis=0)
    turned = path @ np.array([[0, 1], [-1, 0]])
    assert displacement_cosine(path, 3 * path + 100) == pytest.approx(1)
    assert displacement_cosine(path, -path) == pytest.approx(-1)
    assert displacement_cosine(path, turned) == pytest.approx(0, abs=1e-9)
    gap = path.copy()
    gap[4] = np.nan
    assert displacement_cosine(path, gap) == pytest.approx(1)
    assert displacement_cosine(path, np.zeros_like(path)) == 0
    assert np.isnan(displacement_cosine(np.zeros_like(path), path))
    assert np.isnan(displacement_cosine(path, np.full_like(path, np.nan)))


def moving_texture(dx, dy, seed=0, size=64):
    """Frames of a texture that moves by (dx, dy) px a frame."""
    canvas = np.random.default_rng(seed).integers(0, 255, (60, 60, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    return np.stack([canvas[80 - t * dy : 80 - t * dy + size, 80 - t * dx : 80 - t * dx + size] for t in range(8)])


def test_tracked_videos_of_other_looks_and_equal_motion_agree():
    reference = track_grid(moving_texture(2, 1), LucasKanadeTracker(), side=4)
    assert reference.points.shape == (16, 8, 2)
    np.testing.assert_allclose(reference.points[[0, 3, 12], 0], [[7.5, 7.5], [55.5, 7.5], [7.5, 55.5]])
    same = track_grid(moving_texture(2, 1, seed=1, size=96), LucasKanadeTracker(), side=4)
    across = track_grid(moving_texture(-1, 2, seed=2), LucasKanadeTracker(), side=4)
    still = track_grid(moving_texture(0, 0, seed=3), LucasKanadeTracker(), side=4)
    assert motion_fidelity(reference, same) > 0.98
    assert abs(motion_fidelity(reference, across)) < 0.2
    assert motion_fidelity(reference, still) == 0
    assert reference.tracked_fraction > 0.8
