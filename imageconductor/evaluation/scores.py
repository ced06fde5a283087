"""What is measured on one video, and the figures that come of many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imageconductor.data.trackers import Tracker
from imageconductor.evaluation import motion
from imageconductor.evaluation.appearance import ClipScorer, ssim
from imageconductor.evaluation.requests import Request

_PAPER_DIAGONAL_PX = math.hypot(384, 256)
_NOT_FIGURES = ("key", "tracked", "followed", "made_with")
# The single figures that the bundled model is judged by: name, arm, metric.
_NAMED = {
    "cam_mc": ("camera", "error"),
    "cam_mc_all_points": ("camera", "error_all_points"),
    "cam_mc_still": ("camera", "still"),
    "cam_mc_uncontrolled": ("camera_uncontrolled", "error"),
    "obj_mc": ("object", "error"),
    "obj_mc_all_points": ("object", "error_all_points"),
    "obj_mc_still": ("object", "still"),
    "obj_mc_uncontrolled": ("object_uncontrolled", "error"),
    "leak_object": ("object", "leak"),
    "leak_camera": ("object_as_camera", "leak"),
    "leak_base": ("object_as_base", "leak"),
    "leak_uncontrolled": ("object_uncontrolled", "leak"),
}


def measure(
    request: Request, video: NDArray[np.uint8], tracker: Tracker, clip: ClipScorer | None = None
) -> dict[str, Any]:
    """Metrics of one video, or of the clip itself to learn the tracker's own error.

    Returns:
        error, error_all_points, still, leak: pixels; coverage, background_coverage: shares; first_frame_psnr (dB),
        first_frame_ssim; clip_text, clip_consistency if there is a scorer; tracked (N, T, 2) and followed (N, T) lists.

    Raises:
        ValueError: The video has another shape than what was asked for.
    """
    expected = (request.trajectories.num_frames, *request.image.shape)
    if video.shape != expected:
        raise ValueError(f"{request.key}: expected a video of shape {expected}, got {video.shape}")
    wanted = request.trajectories.points.numpy()
    visible = request.trajectories.visible.numpy()
    points, seen = tracker.track(video, np.concatenate([wanted[:, 0], request.background]))
    (tracked, rest), (followed, rest_followed) = np.split(points, [len(wanted)]), np.split(seen, [len(wanted)])
    score: dict[str, Any] = {
        "error": motion.trajectory_error(wanted, tracked, visible & followed),
        "error_all_points": motion.trajectory_error(wanted, tracked, visible),
        "still": motion.still_error(wanted, visible),
        "leak": motion.displacement(rest, rest_followed),
        "coverage": motion.coverage(followed, visible),
        "background_coverage": motion.coverage(rest_followed, np.ones_like(rest_followed)),
        "first_frame_psnr": motion.psnr(video[0] / 255, request.image / 255),
        "first_frame_ssim": ssim(video[0], request.image),
    }
    if clip is not None:
        score["clip_text"], score["clip_consistency"] = clip(video, request.prompt)
    return {**score, "tracked": np.round(tracked, 2).tolist(), "followed": followed.tolist()}


def px_at_384x256(size: tuple[int, int]) -> float:
    """Pixels at 384 x 256 for one of a video of `size`, by the diagonals."""
    return _PAPER_DIAGONAL_PX / math.hypot(*size)


def figures(scores: Sequence[Mapping[str, Any]], scale: float) -> dict[str, dict[str, float]]:
    """Mean over the videos of an arm and its interval, for each metric.

    Args:
        scores: One a video.
        scale: From pixels of the videos to pixels at 384 x 256, by the diagonals.
    """
    found = {}
    for metric in scores[0]:
        if metric in _NOT_FIGURES:
            continue
        figure = asdict(motion.summarise([_number(score.get(metric)) for score in scores]))
        found[metric] = figure
        if metric in ("error", "error_all_points", "still", "leak"):
            share = {key: figure[key] * scale for key in ("mean", "low", "high")}
            found[f"{metric}_384x256"] = {**share, "n": figure["n"]}
            diagonal = {key: value / _PAPER_DIAGONAL_PX for key, value in share.items()}
            found[f"{metric}_of_diagonal"] = {**diagonal, "n": figure["n"]}
    return found


def named_figures(
    arms: Mapping[str, Mapping[str, dict[str, float]]], scores: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, float]]:
    """The figures that a single model is judged by, under short names; in pixels of its videos.

    Args:
        arms: `figures` of each arm.
        scores: What they were made of.
    """
    named = {key: arms[arm][metric] for key, (arm, metric) in _NAMED.items() if arm in arms}
    both = [score for arm in ("camera", "object") if arm in arms for score in scores[arm]]
    for metric in ("first_frame_psnr", "first_frame_ssim", "coverage") if both else ():
        named[metric] = asdict(motion.summarise([_number(score[metric]) for score in both]))
    for arm in arms:
        if arm.startswith("object_free_"):
            named[f"leak_{arm}"], named[f"obj_mc_{arm.removeprefix('object_')}"] = arms[arm]["leak"], arms[arm]["error"]
    return named


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def plain(value: Any) -> Any:
    """As JSON can say it: NaN and infinity are null."""
    if isinstance(value, Mapping):
        return {key: plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
