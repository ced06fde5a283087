"""Summary of an evaluation, the record of results.json: figures, differences between methods, Fréchet distances.

A distance that fails is a reason in the record; everything that was computed before it is written by then, and the next
run computes what is missing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from imageconductor.evaluation.drawn_motion.distances import load_distance
from imageconductor.evaluation.drawn_motion.fixed_requests import FixedRequests
from imageconductor.evaluation.drawn_motion.scores import select_headlines
from imageconductor.evaluation.scores import collect_failures, read_metric, summarise_scores, to_json_values
from imageconductor.evaluation.statistics import summarise
from imageconductor.files import write_text

if TYPE_CHECKING:
    from imageconductor.evaluation.drawn_motion.protocol import Evaluation


def summarise_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """The record, which is written as results.json before the Fréchet distances are computed, and then completed."""
    record = _summarise_scores(evaluation)
    write_text(evaluation.output / "results.json", json.dumps(record, indent=1))
    for name in evaluation.methods:
        for distance in evaluation.config.frechet:
            record["methods"][name]["frechet"][distance] = load_distance(evaluation, name, distance)
    write_text(evaluation.output / "results.json", json.dumps(record, indent=1))
    return record


def summarise_true_clips(evaluation: Evaluation) -> dict[str, Any]:
    """The tracker's own error in px of the request, by set and metric, from the requests whose true clip is known."""
    summary: dict[str, Any] = {}
    for kind in evaluation.requests:
        scores = evaluation.read_true_scores(kind)
        for metric in ("error", "colour_error", "background_displacement", "tracked_fraction") if scores else ():
            values = [read_metric(score, metric) for score in scores]
            summary[f"{kind}_{metric}"] = asdict(summarise(values, [score["source"] for score in scores]))
    everything = [score for kind in evaluation.requests for score in evaluation.read_true_scores(kind)]
    return {**summary, **({"failed": failed} if (failed := collect_failures(everything)) else {})}


def _summarise_scores(evaluation: Evaluation) -> dict[str, Any]:
    scales = {name: wanted.scale for name, wanted in evaluation.formats.items()}
    tasks = list(evaluation.config.tasks)
    scores = {name: {task: evaluation.read_scores(name, task) for task in tasks} for name in evaluation.methods}
    first = next(iter(scores))
    methods = {}
    for name, method in evaluation.methods.items():
        methods[name] = {
            **asdict(method),
            **asdict(evaluation.formats[name]),
            "px_at_384x256_per_px": scales[name],
            "tasks": {task: summarise_scores(scores[name][task], scales[name]) for task in tasks},
            "differences": {}
            if name == first
            else {
                task: summarise_scores(scores[name][task], scales[name], scores[first][task], scales[first])
                for task in tasks
            },
            "frechet": {},
            "failed": collect_failures([score for task in tasks for score in scores[name][task]]),
        }
    headlines = select_headlines(methods[first]["tasks"], scores[first])
    return to_json_values(
        {
            **{key: figure["mean"] for key, figure in headlines.items()},
            "intervals": headlines,
            "methods": methods,
            "tracker_on_the_true_clips": summarise_true_clips(evaluation),
            "requests": _describe_requests(evaluation),
            "settings": {
                **asdict(evaluation.config),
                "size": evaluation.drawn.size,
                "num_frames": evaluation.drawn.num_frames,
                "tracker": f"{evaluation.tracker.name} {evaluation.tracker.version}",
                "num_processes": evaluation.state.num_processes,
            },
        }
    )


def _describe_requests(evaluation: Evaluation) -> dict[str, Any]:
    """The file of fixed requests and its checksum, and by set the number of requests and a checksum of them all."""
    path = evaluation.config.fixed_requests
    fixed = None if path is None else {"file": path, "sha256": FixedRequests.load(path).sha256}
    sets = {}
    for kind, requests in evaluation.requests.items():
        checksum = hashlib.sha256("".join(f"{r.key} {r.seed} {r.sha256}\n" for r in requests).encode()).hexdigest()
        sets[kind] = {"requests": len(requests), "images": len({r.source for r in requests}), "sha256": checksum}
    return {"fixed": fixed, **sets}
