"""Summary of an evaluation, the record of results.json: figures, differences between methods, Fréchet distances.

A distance that fails is a reason in the record; everything that was computed before it is written by then, and the next
run computes what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from imageconductor.evaluation.evaluate_config import FrechetName
from imageconductor.evaluation.frechet import FrechetDistance, Statistics, collect_statistics, frechet_distance
from imageconductor.evaluation.reference_videos import list_reference_files, read_references
from imageconductor.evaluation.scores import (
    describe_failure,
    measure,
    scale_to_384x256,
    select_headlines,
    summarise_scores,
    to_json_values,
)
from imageconductor.evaluation.statistics import summarise
from imageconductor.files import write_text

if TYPE_CHECKING:
    from imageconductor.evaluation.protocol import Evaluation


def summarise_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """The record, which is written as results.json before the Fréchet distances are computed, and then completed."""
    record = _summarise_scores(evaluation)
    write_text(evaluation.output / "results.json", json.dumps(record, indent=1))
    for name in evaluation.methods:
        for distance in evaluation.config.frechet:
            record["methods"][name]["frechet"][distance] = to_json_values(_load_distance(evaluation, name, distance))
    write_text(evaluation.output / "results.json", json.dumps(record, indent=1))
    return record


def list_failures(record: dict[str, Any]) -> list[str]:
    """What could not be measured, a line each: instrument, method, reason."""
    lines = []
    for name, method in record["methods"].items():
        lines += [f"{key}, {name}: {d['failed']}" for key, d in method["frechet"].items() if "failed" in d]
        lines += [f"{instrument}, {name}: {text}" for instrument, text in method["failed"].items()]
    return lines


def _summarise_scores(evaluation: Evaluation) -> dict[str, Any]:
    scale = scale_to_384x256(evaluation.size)
    tasks = list(evaluation.config.tasks)
    scores = {name: {task: evaluation.read_scores(name, task) for task in tasks} for name in evaluation.methods}
    first = next(iter(scores))
    methods = {}
    for name, method in evaluation.methods.items():
        methods[name] = {
            **asdict(method),
            "tasks": {task: summarise_scores(scores[name][task], scale) for task in tasks},
            "differences": {}
            if name == first
            else {task: summarise_scores(scores[name][task], scale, scores[first][task]) for task in tasks},
            "frechet": {},
            "failed": _collect_failures([score for task in tasks for score in scores[name][task]]),
        }
    headlines = select_headlines(methods[first]["tasks"], scores[first])
    return to_json_values(
        {
            **{key: figure["mean"] for key, figure in headlines.items()},
            "intervals": headlines,
            "methods": methods,
            "tracker_on_the_true_clips": _measure_true_clips(evaluation),
            "settings": {
                **asdict(evaluation.config),
                "size": evaluation.size,
                "num_frames": evaluation.num_frames,
                "tracker": f"{evaluation.tracker.name} {evaluation.tracker.version}",
                "px_at_384x256_per_px": scale,
                "num_processes": evaluation.state.num_processes,
            },
        }
    )


def _collect_failures(scores: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By instrument, on how many videos it failed, and for what reason first."""
    found: dict[str, list[str]] = {}
    for score in scores:
        for instrument, reason in score.get("failed", {}).items():
            found.setdefault(instrument, []).append(reason)
    return {name: f"{len(reasons)} of {len(scores)} videos, {reasons[0]}" for name, reasons in found.items()}


def _measure_true_clips(evaluation: Evaluation) -> dict[str, Any]:
    """The tracker's own error, from the requests whose true clip is known."""
    summary: dict[str, Any] = {}
    for kind, requests in evaluation.requests.items():
        truths = [(request, request.truth) for request in requests if request.truth is not None]
        scores = [measure(request, truth, evaluation.tracker) for request, truth in truths]
        sources = [request.source for request, _ in truths]
        for metric in ("error", "background_displacement", "tracked_fraction") if scores else ():
            values = [score.get(metric, float("nan")) for score in scores]
            summary[f"{kind}_{metric}"] = asdict(summarise(values, sources))
    return summary


def _load_distance(evaluation: Evaluation, name: str, distance: FrechetName) -> dict[str, Any]:
    """A method's Fréchet distance: from a run before, or computed now; or the reason why there is none."""
    paths = [path for task in evaluation.config.frechet_tasks for path in evaluation.video_paths(name, task)]
    target = evaluation.output / "scores" / name / f"{distance}.json"
    made_of = _describe_reference(evaluation, distance) | {"videos": [_describe_file(path) for path in paths]}
    key = _digest(made_of)
    if target.exists() and (old := json.loads(target.read_text())).get("key") == key:
        return old["distance"]
    try:
        reference = _load_reference(evaluation, distance)
        bar = tqdm(paths, desc=f"{name}: {distance}", dynamic_ncols=True)
        generated = _collect(evaluation, distance, (evaluation.read_frames(path) for path in bar))
        weights = _weights(evaluation, distance)
        found: FrechetDistance = frechet_distance(distance, generated, reference, weights, evaluation.num_frames)
    except Exception as error:  # The network's file is the user's; the other figures must not be lost with it.
        return {"failed": describe_failure(error)}
    config = evaluation.config
    record = {
        **asdict(found),
        "reference": config.reference or "sprite world",
        "reference_stride": config.reference_stride if config.reference else 1,
    }
    write_text(target, json.dumps({"key": key, "distance": to_json_values(record)}))
    return record


def _load_reference(evaluation: Evaluation, distance: FrechetName) -> Statistics:
    """Statistics of the reference videos, collected once for all methods and later runs."""
    path = (
        evaluation.output / "reference" / f"{distance}-{_digest(_describe_reference(evaluation, distance))}.safetensors"
    )
    if not path.exists():
        config, size, num_frames = evaluation.config, evaluation.size, evaluation.num_frames
        videos = read_references(config, size, num_frames)
        total = config.num_reference if config.reference is None else len(list_reference_files(config))
        bar = tqdm(videos, total=total, desc=f"reference: {distance}", dynamic_ncols=True)
        _collect(evaluation, distance, bar).save(path)
    return Statistics.load(path)


def _collect(evaluation: Evaluation, distance: FrechetName, videos: Iterable[NDArray[np.uint8]]) -> Statistics:
    weights = _weights(evaluation, distance)
    return collect_statistics(distance, videos, weights, evaluation.num_frames, device=evaluation.device)


def _weights(evaluation: Evaluation, distance: FrechetName) -> Path | None:
    config = evaluation.config
    weights = {"fid": config.fid_weights, "fvd": config.fvd_weights}.get(distance)
    return None if weights is None else Path(weights)


def _describe_reference(evaluation: Evaluation, distance: FrechetName) -> dict[str, Any]:
    """All that the statistics of the reference videos depend on."""
    config, weights = evaluation.config, _weights(evaluation, distance)
    if config.reference is not None:
        videos: Any = [_describe_file(path) for path in list_reference_files(config)]
    else:
        videos = [config.world_seed, config.num_reference, config.style]
    return {
        "network": [distance, None if weights is None else _describe_file(weights)],
        "shape": [*evaluation.size, evaluation.num_frames, config.reference_stride],
        "reference": videos,
    }


def _describe_file(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
