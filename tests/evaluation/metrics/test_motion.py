"""Metrics against cases worked out by hand."""

import numpy as np
import pytest

from imageconductor.data.trackers import LucasKanadeTracker
from imageconductor.evaluation.metrics.motion import (
    background_displacement,
    colour_error,
    psnr,
    still_error,
    tracked_fraction,
    trajectory_error,
)


def line(dx: float, dy: float, frames: int = 5) -> np.ndarray:
    return np.arange(frames)[:, None] * np.array([dx, dy], float)


def test_a_shifted_track_scores_its_shift():
    requested = np.stack([line(1, 0), line(0, 2)])
    tracked = requested + np.array([3.0, 4.0])
    assert trajectory_error(requested, tracked, np.ones((2, 5), bool)) == pytest.approx(5)


def test_frame_zero_and_uncounted_points_do_not_count():
    requested = np.stack([line(1, 0), line(0, 2)])
    tracked = requested.copy()
    tracked[:, 0] += 100
    tracked[1] += 7
    counted = np.ones((2, 5), bool)
    counted[1] = False
    assert trajectory_error(requested, tracked, counted) == 0
    assert np.isnan(trajectory_error(requested, tracked, np.zeros((2, 5), bool)))


def test_a_motionless_video_scores_the_analytic_mean():
    requested = line(3, 4)[None]
    assert still_error(requested, np.ones((1, 5), bool)) == pytest.approx(5 * (1 + 2 + 3 + 4) / 4)


def test_a_shorter_video_is_an_error():
    with pytest.raises(ValueError, match="shapes differ"):
        trajectory_error(np.zeros((1, 5, 2)), np.zeros((1, 4, 2)), np.ones((1, 5), bool))


def test_background_displacement_is_the_median_over_points():
    tracks = np.stack([line(0, 0), line(1, 0), line(100, 0)])
    assert background_displacement(tracks, np.ones((3, 5), bool)) == pytest.approx(2.5)


def test_tracked_fraction_counts_wanted_pairs_after_frame_zero():
    followed = np.array([[True, True, False], [True, False, False]])
    wanted = np.array([[True, True, True], [False, True, False]])
    assert tracked_fraction(followed, wanted) == pytest.approx(1 / 3)


def test_psnr():
    assert psnr(np.full((4, 4), 0.6), np.full((4, 4), 0.5)) == pytest.approx(20)


def test_a_colour_is_where_most_of_its_nearest_pixels_are():
    path = np.array([[[8.0, 8.0], [12.0, 16.0], [20.0, 20.0]]])
    image = np.full((32, 32, 3), 90, np.uint8)
    video = np.repeat(image[None], 3, axis=0)
    for frame, (x, y) in zip(video, path[0].astype(int), strict=True):
        frame[y - 3 : y + 4, x - 3 : x + 4] = (240, 20, 30)
        frame[:2, :6] = (225, 40, 40)  # fewer pixels of the colour than the square's
    red, every = np.array([[228.0, 32.0, 44.0]]), np.ones((1, 3), bool)
    first = video[0]
    assert colour_error(path, every, video, red, first) < 1.5
    assert colour_error(path + np.array([3, 4]), every, video, red, first) == pytest.approx(5, abs=1.5)
    faint = (0.9 * 90 + 0.1 * video).astype(np.uint8)  # a blurred video still shows where it is
    assert colour_error(path, every, faint, red, first) < 1.5
    still = np.repeat(video[:1], 3, axis=0)
    expected = still_error(path, every)
    assert colour_error(path, every, still, red, first) == pytest.approx(expected, abs=1.5)


def test_tracker_follows_a_shift_and_loses_what_vanishes():
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.stack([canvas[20:84, 20 + t : 84 + t] for t in range(6)])
    tracks, followed = LucasKanadeTracker().track(frames, np.array([[40.0, 30.0], [2.0, 30.0]]))
    np.testing.assert_allclose(tracks[0], [[40 - t, 30] for t in range(6)], atol=0.15)
    assert followed[0].all()
    assert not followed[1, -1], "it left the frame"
