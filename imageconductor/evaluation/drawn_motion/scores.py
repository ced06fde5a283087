"""The metrics of one video, and the figures by which a single model is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imageconductor.data.trackers import Tracker
from imageconductor.evaluation.drawn_motion.requests import Request
from imageconductor.evaluation.metrics import motion
from imageconductor.evaluation.metrics.appearance import ClipScorer, ssim
from imageconductor.evaluation.scores import read_metric, run_instruments
from imageconductor.evaluation.statistics import summarise

# Headline figures: name -> task, metric.
_HEADLINES = {
    "cam_mc": ("camera", "error"),
    "cam_mc_all_points": ("camera", "error_all_points"),
    "cam_mc_still": ("camera", "still"),
    "cam_mc_uncontrolled": ("camera_uncontrolled", "error"),
    "obj_mc": ("object", "error"),
    "obj_mc_all_points": ("object", "error_all_points"),
    "obj_mc_still": ("object", "still"),
    "obj_mc_uncontrolled": ("object_uncontrolled", "error"),
    "background_displacement_object": ("object", "background_displacement"),
    "background_displacement_camera": ("object_as_camera", "background_displacement"),
    "background_displacement_base": ("object_as_base", "background_displacement"),
    "background_displacement_uncontrolled": ("object_uncontrolled", "background_displacement"),
}


def measure(
    request: Request, video: NDArray[np.uint8], tracker: Tracker, clip: ClipScorer | None = None
) -> dict[str, Any]:
    """Metrics of one video. Measuring the true clip of a request gives the tracker's own error.

    Returns:
        error, error_all_points, still, background_displacement: pixels of the video; error counts the points that the
        tracker followed, error_all_points the lost ones too, still is the error of a motionless video.
        colour_error: pixels, where the request knows the colours of what moves; no tracker has a part in it.
        tracked_fraction, background_tracked_fraction: fractions of the points and frames that the tracker followed.
        first_frame_psnr (dB), first_frame_ssim; clip_text, clip_consistency if there is a scorer.
        tracked: (N, T, 2) list, pixels.  followed: (N, T) list.
        failed: reason by instrument ("tracker", "clip"); the metrics of an instrument that fails are absent.

    Raises:
        ValueError: The video has not the shape that was requested.
    """
    expected = (request.trajectories.num_frames, *request.image.shape)
    if video.shape != expected:
        raise ValueError(f"{request.key}: expected a video of shape {expected}, got {video.shape}")
    score: dict[str, Any] = {
        "first_frame_psnr": motion.psnr(video[0] / 255, request.image / 255),
        "first_frame_ssim": ssim(video[0], request.image),
    }
    if request.colours is not None:
        points, visible = (x.numpy() for x in (request.trajectories.points, request.trajectories.visible))
        score["colour_error"] = motion.colour_error(points, visible, video, request.colours, request.image)

    def measure_motion() -> None:
        score.update(_measure_motion(request, video, tracker))

    def measure_clip() -> None:
        if clip is not None:
            score["clip_text"], score["clip_consistency"] = clip(video, request.prompt)

    return score | run_instruments({"tracker": measure_motion, "clip": measure_clip})


def _measure_motion(request: Request, video: NDArray[np.uint8], tracker: Tracker) -> dict[str, Any]:
    requested = request.trajectories.points.numpy()
    visible = request.trajectories.visible.numpy()
    points, seen = tracker.track(video, np.concatenate([requested[:, 0], request.background]))
    tracked, background = np.split(points, [len(requested)])
    followed, background_followed = np.split(seen, [len(requested)])
    return {
        "error": motion.trajectory_error(requested, tracked, visible & followed),
        "error_all_points": motion.trajectory_error(requested, tracked, visible),
        "still": motion.still_error(requested, visible),
        "background_displacement": motion.background_displacement(background, background_followed),
        "tracked_fraction": motion.tracked_fraction(followed, visible),
        "background_tracked_fraction": motion.tracked_fraction(background_followed, np.ones_like(background_followed)),
        "tracked": np.round(tracked, 2).tolist(),
        "followed": followed.tolist(),
    }


def select_headlines(
    summaries: Mapping[str, Mapping[str, dict[str, float]]], scores: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, float]]:
    """The figures by which a single model is judged, under short names; errors in pixels of its videos.

    Args:
        summaries: From `summarise_scores`, by task.
        scores: The scores that they summarise, by task.
    """
    wanted = dict(_HEADLINES)
    for task in summaries:
        if task.startswith("object_free_"):
            wanted[f"background_displacement_{task}"] = (task, "background_displacement")
            wanted[f"obj_mc_{task.removeprefix('object_')}"] = (task, "error")
    headlines = {
        key: summaries[task][metric]
        for key, (task, metric) in wanted.items()
        if task in summaries and metric in summaries[task]
    }
    both = [score for task in ("camera", "object") if task in summaries for score in scores[task]]
    for metric in ("first_frame_psnr", "first_frame_ssim", "tracked_fraction"):
        if not any(metric in score for score in both):
            continue
        values = [read_metric(score, metric) for score in both]
        headlines[metric] = asdict(summarise(values, [score["source"] for score in both]))
    return headlines
