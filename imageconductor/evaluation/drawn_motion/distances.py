"""Fréchet distances of an evaluation's methods, each kept in scores/METHOD/NAME.json until what it is of changes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from imageconductor.evaluation.drawn_motion.reference_statistics import (
    compute_digest,
    describe_reference,
    load_reference,
)
from imageconductor.evaluation.drawn_motion.video_format import VideoFormat
from imageconductor.evaluation.input_checks import network_file
from imageconductor.evaluation.metrics.frechet import FrechetDistance, collect_statistics, frechet_distance
from imageconductor.evaluation.metrics.frechet_names import FrechetName
from imageconductor.evaluation.score_files import identify_file
from imageconductor.evaluation.scores import describe_failure, to_json_values
from imageconductor.files import write_text

if TYPE_CHECKING:
    from imageconductor.evaluation.drawn_motion.protocol import Evaluation


def list_missing_references(evaluation: Evaluation) -> list[tuple[FrechetName, VideoFormat]]:
    """The distances that are to be computed, each with the formats in which it needs the reference videos."""
    needed: list[tuple[FrechetName, VideoFormat]] = [
        (distance, evaluation.formats[name])
        for name in evaluation.methods
        for distance in evaluation.config.frechet
        if _read_distance(evaluation, name, distance) is None
    ]
    return list(dict.fromkeys(needed))


def load_distance(evaluation: Evaluation, name: str, distance: FrechetName) -> dict[str, Any]:
    """A method's Fréchet distance: from a run before, or computed now; or the reason why there is none."""
    if (old := _read_distance(evaluation, name, distance)) is not None:
        return old
    config, wanted = evaluation.config, evaluation.formats[name]
    weights = network_file(config, distance)
    try:
        reference = load_reference(evaluation, distance, wanted)
        bar = tqdm(_list_videos(evaluation, name), desc=f"{name}: {distance}", dynamic_ncols=True)
        videos = (evaluation.read_frames(name, path) for path in bar)
        generated = collect_statistics(distance, videos, weights, wanted.num_judged, evaluation.device)
        found: FrechetDistance = frechet_distance(distance, generated, reference, weights, wanted.num_judged)
    except Exception as error:  # The network's file is the user's; the other figures must not be lost with it.
        return {"failed": describe_failure(error)}
    record = to_json_values(
        {
            **asdict(found),
            "reference": config.reference or "sprite world",
            "reference_stride": config.reference_stride if config.reference else 1,
        }
    )
    key = _compute_key(evaluation, name, distance)
    write_text(_locate(evaluation, name, distance), json.dumps({"key": key, "distance": record}))
    return record


def _read_distance(evaluation: Evaluation, name: str, distance: FrechetName) -> dict[str, Any] | None:
    target = _locate(evaluation, name, distance)
    old = json.loads(target.read_text()) if target.exists() else {}
    return old["distance"] if old and old.get("key") == _compute_key(evaluation, name, distance) else None


def _compute_key(evaluation: Evaluation, name: str, distance: FrechetName) -> str:
    """Digest of all that the distance depends on."""
    made_of = describe_reference(evaluation.config, distance, evaluation.formats[name])
    return compute_digest(made_of | {"videos": [identify_file(path) for path in _list_videos(evaluation, name)]})


def _list_videos(evaluation: Evaluation, name: str) -> list[Path]:
    return [path for task in evaluation.config.frechet_tasks for path in evaluation.video_paths(name, task)]


def _locate(evaluation: Evaluation, name: str, distance: FrechetName) -> Path:
    return evaluation.output / "scores" / name / f"{distance}.json"
