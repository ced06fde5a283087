"""AO, SR50 and SR75 against the toolkit's numbers, and what trackers make of a box that moves and grows."""

import json

import cv2
import numpy as np
import pytest
from parity_smcd import FOLDER

from imageconductor.data.scenes import render
from imageconductor.data.sprite_world import SpriteWorldConfig
from imageconductor.data.sprites import sample_scene
from imageconductor.evaluation.metrics.boxes import (
    BOX_TRACKERS,
    box_iou,
    build_box_tracker,
    overlaps,
    summarise_overlaps,
)

CASES = json.loads((FOLDER / "eval_cases.json").read_text())


def xyxy(rows):
    rows = np.asarray(rows, np.float64)
    return np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], axis=1)


def counted(case):
    present = np.asarray(case["cover"]) > 0
    return overlaps(xyxy(case["gt_xywh"]), xyxy(case["pred_xywh"]), present, tuple(case["resolution"]))


def summarised(*rows):
    """AO, SR50, SR75 of clips of one object each, and the number of frames that count."""
    figures = summarise_overlaps([[row] for row in rows], [str(n) for n in range(len(rows))])
    (count,) = {figure.n for figure in figures.values()}
    return [figures[metric].mean for metric in ("ao", "sr50", "sr75")], count


@pytest.mark.parametrize("case", CASES["sequences"], ids=lambda case: "x".join(map(str, case["resolution"])))
def test_one_sequence_of_the_toolkit(case):
    requested, tracked = xyxy(case["gt_xywh"]), xyxy(case["pred_xywh"])
    np.testing.assert_allclose(box_iou(requested, tracked), case["ious_unbounded_all_frames"], atol=1e-12)
    inside = box_iou(requested, tracked, tuple(case["resolution"]))
    np.testing.assert_allclose(inside[1:], case["ious_frames1_on"], atol=1e-12)
    scores, count = summarised(counted(case))
    assert scores == pytest.approx([case["AO"], case["SR50"], case["SR75"]])
    assert count == sum(cover > 0 for cover in case["cover"][1:])


def test_scores_over_all_frames_of_all_sequences():
    rows, recorded = [counted(case) for case in CASES["sequences"]], CASES["overall_over_all_frames"]
    scores, _ = summarised(*rows)
    assert scores == pytest.approx([recorded[key] for key in ("AO", "SR50", "SR75")])
    means = [summarised(row)[0][0] for row in rows]
    assert np.mean(means) == pytest.approx(CASES["mean_of_sequence_AO"])
    assert np.mean(means) != pytest.approx(scores[0]), "a mean of means is another number"


def test_an_overlap_that_equals_the_threshold_is_not_above_it():
    case = CASES["threshold_edge_case"]
    assert summarised(case["ious"])[0] == pytest.approx([case["AO"], case["SR50"], case["SR75"]], abs=1e-6)


def test_differences_are_of_the_same_frames():
    """Three clips, of which the last has two objects."""
    ours, theirs = ([[[0.9, 0.4]], [[0.6]], [[0.8], [0.2]]], [[[0.5, 0.4]], [[0.3]], [[0.9], [0.6]]])
    figures = summarise_overlaps(ours, ["a", "b", "c"], theirs)
    assert [figures[metric].mean for metric in ("ao", "sr50", "sr75")] == pytest.approx([0.2 / 5, 1 / 5, 1 / 5])
    assert (figures["ao"].n, figures["ao"].num_sources) == (5, 3)


def test_frames_that_do_not_count():
    box = np.array([[0.0, 0, 10, 10]] * 4)
    assert len(overlaps(box, box, np.array([True, False, True, True]), (20, 20))) == 2
    for rows in ([overlaps(box, box, np.zeros(4, bool), (20, 20))], []):
        scores, count = summarised(*rows)
        assert count == 0
        assert np.isnan(scores).all()
    assert box_iou(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [0]
    with pytest.raises(ValueError, match=r"boxes must be \(T, 4\) each"):
        box_iou(box, box[:3])


# -- trackers


def zooming_square(num_frames=8, side=64):
    """A textured square that moves and grows by half over a striped background, and its boxes."""
    random = np.random.default_rng(0)
    texture = cv2.resize(random.integers(0, 255, (6, 6, 3), np.uint8), (48, 48), interpolation=cv2.INTER_CUBIC)
    ground = np.broadcast_to(120 + 40 * np.sin(np.arange(side) / 5)[:, None, None], (side, side, 3))
    frames, boxes = [], []
    for t in range(num_frames):
        size, x, y = 16 + t, 6 + 3 * t, 30 - 2 * t
        frame = ground.astype(np.uint8).copy()
        frame[y : y + size, x : x + size] = cv2.resize(texture, (size, size), interpolation=cv2.INTER_AREA)
        frames.append(frame)
        boxes.append([x, y, x + size, y + size])
    return np.stack(frames), np.array(boxes, np.float64)


def score(name, frames, boxes):
    tracked = build_box_tracker(name).track(frames, boxes[0])
    assert tracked.shape == boxes.shape
    assert tracked[0].tolist() == boxes[0].tolist()
    return overlaps(boxes, tracked, np.ones(len(boxes), bool), (frames.shape[2], frames.shape[1]))


def test_median_flow_follows_place_and_size():
    frames, boxes = zooming_square()
    ious = score("median-flow", frames, boxes)
    assert ious.min() > 0.8
    kept = overlaps(boxes, np.repeat(boxes[:1], len(boxes), 0), np.ones(len(boxes), bool), (64, 64))
    assert kept[-1] < 0.2


def test_mil_keeps_the_size_of_the_first_box():
    frames, boxes = zooming_square(4)
    tracked = build_box_tracker("mil").track(frames, boxes[0])
    np.testing.assert_allclose(tracked[:, 2:] - tracked[:, :2], np.full((4, 2), 16), atol=0.5)
    assert score("mil", frames, boxes)[0] > 0.5


def test_a_box_that_is_lost_stays_where_it_was():
    frames, boxes = zooming_square()
    frames[3:] = 128
    tracked = build_box_tracker("median-flow").track(frames, boxes[0])
    assert (tracked[3:] == tracked[2]).all()
    assert box_iou(tracked[2:3], boxes[2:3])[0] > 0.85


def test_median_flow_follows_sprites_under_a_moving_camera():
    config, rows = SpriteWorldConfig(keep_clear=True, seed=5), []
    for index in range(3):
        scene = sample_scene(config, index)
        owner = scene.sources()[1].numpy()
        places = [np.nonzero(owner[t] == 0) for t in range(scene.num_frames)]
        boxes = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in places], np.float64)
        rows.append(score("median-flow", render([scene])[0].permute(1, 2, 3, 0).numpy(), boxes))
    assert summarised(*rows)[0][0] > 0.8


def test_what_is_no_tracker_is_told(monkeypatch):
    with pytest.raises(ValueError, match="no box tracker 'kcf', only csrt, median-flow, mil"):
        build_box_tracker("kcf")
    for owner, name in ((cv2, "TrackerCSRT_create"), (cv2, "legacy")):
        monkeypatch.delattr(owner, name, raising=False)
    with pytest.raises(ValueError, match="has no tracker csrt; install opencv-contrib-python-headless in place of"):
        build_box_tracker("csrt")
    assert {build_box_tracker(name).name for name in BOX_TRACKERS - {"csrt"}} == {"opencv-median-flow", "opencv-mil"}
