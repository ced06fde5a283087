"""Scores of videos and their summary over many: means and differences with intervals, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from imageconductor.evaluation.statistics import summarise, summarise_differences

PAPER_DIAGONAL_PX = math.hypot(384, 256)
"""Diagonal of the frame in whose pixels errors are given."""

_NOT_METRICS = ("key", "source", "tracked", "followed", "failed", "measured_with")
_IN_PIXELS = ("error", "error_all_points", "still", "colour_error", "background_displacement")


def run_instruments(instruments: Mapping[str, Callable[[], None]]) -> dict[str, dict[str, str]]:
    """Runs each instrument, and gives {"failed": reasons by instrument}, or nothing if none fails."""
    failed: dict[str, str] = {}
    for instrument, measure in instruments.items():
        try:
            measure()
        except Exception as error:  # Networks of others fail in many ways, and what else was measured should stay.
            failed[instrument] = describe_failure(error)
    return {"failed": failed} if failed else {}


def describe_failure(error: Exception) -> str:
    """Type and first line of an error's message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


def summarise_scores(
    scores: Sequence[Mapping[str, Any]],
    scale: float,
    baseline: Sequence[Mapping[str, Any]] | None = None,
    baseline_scale: float | None = None,
) -> dict[str, dict[str, float]]:
    """Each metric's mean over the videos of a task, with its interval: `Figure` as a dict.

    Metrics in pixels are given at 384 x 256 and in percent of the frame's diagonal too; in pixels of the videos only
    where all videos have the same.

    Args:
        scores: From `measure`, one for each video, each with the `source` of its request.
        scale: Pixels at 384 x 256 that one pixel corresponds to, `VideoFormat.scale`.
        baseline: Scores of the same requests; then the differences to them are summarised.
        baseline_scale: Scale of the baseline.
    """
    summary: dict[str, dict[str, float]] = {}
    sources = [score["source"] for score in scores]
    for metric in dict.fromkeys(metric for score in scores for metric in score):
        if metric in _NOT_METRICS:
            continue
        ours, theirs = (scale, baseline_scale or scale) if metric in _IN_PIXELS else (1.0, 1.0)
        values = [read_metric(score, metric) * ours for score in scores]
        if baseline is None:
            figure = asdict(summarise(values, sources))
        else:
            others = [read_metric(score, metric) * theirs for score in baseline]
            figure = asdict(summarise_differences(values, others, sources))
        if metric not in _IN_PIXELS:
            summary[metric] = figure
            continue
        if ours == theirs:
            summary[metric] = _multiply(figure, 1 / scale)
        summary[f"{metric}_384x256"] = figure
        summary[f"{metric}_percent_of_diagonal"] = _multiply(figure, 100 / PAPER_DIAGONAL_PX)
    return summary


def _multiply(figure: dict[str, float], factor: float) -> dict[str, float]:
    return figure | {key: figure[key] * factor for key in ("mean", "low", "high")}


def to_json_values(value: Any) -> Any:
    """The same value as JSON can hold it: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {key: to_json_values(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metric(score: Mapping[str, Any], metric: str) -> float:
    """The metric's value, NaN where it could not be measured."""
    value = score.get(metric)
    return math.nan if value is None else float(value)


def collect_failures(scores: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By instrument, on how many videos it failed, and for what reason first."""
    found: dict[str, list[str]] = {}
    for score in scores:
        for instrument, reason in score.get("failed", {}).items():
            found.setdefault(instrument, []).append(reason)
    return {name: f"{len(reasons)} of {len(scores)} videos, {reasons[0]}" for name, reasons in found.items()}


def list_failures(record: dict[str, Any]) -> list[str]:
    """What could not be measured, a line each: instrument, method, reason."""
    lines = []
    for name, method in record["methods"].items():
        lines += [f"{key}, {name}: {d['failed']}" for key, d in method.get("frechet", {}).items() if "failed" in d]
        lines += [f"{instrument}, {name}: {text}" for instrument, text in method["failed"].items()]
    failed = record.get("tracker_on_the_true_clips", {}).get("failed", {})
    return [*lines, *(f"{instrument}, true clips: {text}" for instrument, text in failed.items())]
