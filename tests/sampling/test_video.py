"""Trajectories drawn over a video."""

import numpy as np
import pytest
import torch

from imageconductor.conditioning import Trajectories
from imageconductor.sampling.video import draw_trajectories

RED, BLUE, YELLOW, WHITE = [255, 64, 64], [64, 160, 255], [255, 200, 40], [255, 255, 255]
BLACK = [0, 0, 0]


def overlay(points, visible=None, **fields):
    tracks = torch.tensor([points], dtype=torch.float64)
    seen = torch.ones(tracks.shape[:2], dtype=torch.bool) if visible is None else torch.tensor([visible])
    frames = np.zeros((tracks.shape[1], 256, 256, 3), np.uint8)
    return draw_trajectories(frames, Trajectories(tracks, seen, (256, 256), **fields))


def test_a_dot_marks_each_frame_so_that_distance_is_speed():
    xs = [20, 60, 100, 180]
    last = overlay([[x, 100] for x in xs])[-1]
    assert [last[100, x].tolist() for x in xs[:-1]] == [WHITE] * 3
    assert [last[100, x].tolist() for x in (40, 80, 140)] == [RED] * 3
    first = overlay([[x, 100] for x in xs])[0]
    assert first[102, 100].tolist() == RED, "what is to come has dots too"
    assert first[102, 140].tolist() == BLACK, "and a thin path between them"


def test_what_is_hidden_is_not_drawn():
    drawn = overlay([[20, 100], [60, 100], [100, 100], [140, 100]], [True, True, False, False])
    assert not drawn[:, :, 70:].any()
    assert drawn[0, :, :50].any()
    assert not overlay([[float("nan"), 3], [20, 20]], [False, True])[0, 40:].any()


@pytest.mark.parametrize(("code", "colour"), [(0, BLUE), (1, RED), (-1, YELLOW)])
def test_colours_say_what_a_track_moves(code, colour):
    last = overlay([[20, 100], [200, 100]], control=torch.tensor([code]))[-1]
    assert last[100, 110].tolist() == colour
