"""Summary of an evaluation of learned motions, its table, and a contact sheet for each motion.

OUTPUT/results.json     figures with intervals by method and motion, differences to the first method, settings
OUTPUT/table.md         one line for each method
OUTPUT/same_MOTION.png  a reference clip, and the same request by each method
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imageconductor.evaluation.scores import collect_failures, list_failures, summarise_scores, to_json_values
from imageconductor.evaluation.statistics import MIN_SOURCES
from imageconductor.evaluation.tables import format_scaled, format_tables
from imageconductor.files import write_text
from imageconductor.sampling.video import contact_sheet

if TYPE_CHECKING:
    from imageconductor.evaluation.learned_motion.protocol import LearnedMotionEvaluation

_COLUMNS = {  # metric -> heading, factor, digits
    "motion_fidelity": ("motion fidelity", 1, 3),
    "tracked_fraction": ("tracked fraction", 1, 2),
    "clip_text": ("text alignment, 100 x CLIP", 100, 2),
    "clip_consistency": ("frame consistency, 100 x CLIP", 100, 2),
    "pick_score": ("PickScore", 1, 2),
}
_NOTE = (
    "Motion fidelity: for each moving track of reference or video the best cosine with a track of the other, mean of "
    "both directions, in [-1, 1]; 0 where nothing moves. Tracked fraction: the part of its points' steps that the "
    "tracker could follow; where it is low, few tracks speak for the motion. Text alignment: cosine of prompt and "
    "frame, mean over frames. PickScore: mean over frames. Mean over videos, bootstrap 95 % interval over {sources} "
    "(none for fewer than {fewest}, where it would be too narrow)."
)


def summarise_learned_motion(evaluation: LearnedMotionEvaluation) -> dict[str, Any]:
    """The record, which is written as results.json."""
    config, motions = evaluation.config, list(evaluation.requests)
    scores = {name: {motion: evaluation.read_scores(name, motion) for motion in motions} for name in config.methods}
    first, *_ = scores
    methods = {}
    for name, by_motion in scores.items():
        methods[name] = {
            **asdict(config.methods[name]),
            "figures": _summarise(_join(by_motion)),
            "differences": {} if name == first else _summarise(_join(by_motion), _join(scores[first])),
            "motions": {motion: _summarise(own) for motion, own in by_motion.items()},
            "failed": collect_failures(_join(by_motion)),
        }
    described = {
        motion: {
            "prompts": len({request.prompt for request in evaluation.requests[motion]}),
            "videos": len(evaluation.requests[motion]),
            "reference_clips": len({clip.key for clip in evaluation.references[motion]}),
            "reference_windows": len(evaluation.references[motion]),
        }
        for motion in motions
    }
    settings = {
        **asdict(config),
        "size": evaluation.size,
        "num_frames": evaluation.num_frames,
        "tracker": f"{evaluation.tracker.name} {evaluation.tracker.version}",
        "num_processes": evaluation.state.num_processes,
    }
    record = to_json_values({"methods": methods, "motions": described, "settings": settings})
    write_text(evaluation.output / "results.json", json.dumps(record, indent=1))
    return record


def write_learned_motion_report(evaluation: LearnedMotionEvaluation, record: dict[str, Any], folder: Path) -> None:
    """Writes table.md and same_MOTION.png into a folder."""
    write_text(folder / "table.md", format_learned_motion(record))
    for motion, (request, *_) in evaluation.requests.items():
        rows = [
            (f"{motion}: reference {evaluation.references[motion][0].path.name}", evaluation.read_reference(motion))
        ]
        rows += [(f"{name}: {request.prompt}", evaluation.read_frames(name, request)) for name in record["methods"]]
        contact_sheet(folder / f"same_{motion}.png", rows)


def format_learned_motion(record: dict[str, Any]) -> str:
    """Tables of all methods, of their differences to the first one and of single motions, and notes."""
    methods = record["methods"]
    first, *others = methods
    tables = [_build_table(["method"], {(name,): method["figures"] for name, method in methods.items()})]
    if others:
        differences = {(name,): methods[name]["differences"] for name in others}
        tables.append(_build_table([f"difference to {first}"], differences, "+"))
    if len(record["motions"]) > 1:
        by_motion = {
            (motion, name): methods[name]["motions"][motion] for motion in record["motions"] for name in methods
        }
        tables.append(_build_table(["motion", "method"], by_motion))
    sources = "motions" if len(record["motions"]) > 1 else "prompts"
    pairs = "every two frames" if record["settings"]["frame_pairs"] == "all" else "frame and next frame"
    choice = "the most similar one" if record["settings"]["reference_choice"] == "best" else "mean over all"
    counts = "; ".join(
        f"{motion} {found['videos']} videos of {found['prompts']} prompts, {found['reference_windows']} windows of "
        f"{found['reference_clips']} clips"
        for motion, found in record["motions"].items()
    )
    notes = [
        f"{_NOTE.format(sources=sources, fewest=MIN_SOURCES)} Frame consistency: cosine of {pairs}. "
        f"Reference windows: {choice}. Tracker: {record['settings']['tracker']}.",
        f"Motions: {counts}.",
        *(f"NOT MEASURED: {failure}" for failure in list_failures(record)),
    ]
    return "\n\n".join([format_tables(tables), *notes]) + "\n"


def _join(by_motion: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [score for scores in by_motion.values() for score in scores]


def _summarise(scores: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Each metric's mean and interval, `Figure` as a dict.

    The bootstrap draws motions with all of their videos, which resemble each other, or, where there is one motion,
    prompts.
    """
    kind = "motion" if len({score["motion"] for score in scores}) > 1 else "prompt"
    metrics = [
        {**{key: value for key, value in score.items() if key not in ("motion", "prompt")}, "source": score[kind]}
        for score in scores
    ]
    return summarise_scores(metrics, scale=1, baseline=baseline)


def _build_table(heading: list[str], lines: dict[tuple[str, ...], dict[str, Any]], sign: str = "") -> list[list[str]]:
    """Cells, the heading first; a figure that was not measured is a dash."""
    table = [[*heading, *(title for title, _, _ in _COLUMNS.values()), "videos"]]
    for names, figures in lines.items():
        count = max((figure["n"] for figure in figures.values()), default=0)
        cells = [
            format_scaled(figures.get(metric), factor, digits, sign, count)
            for metric, (_, factor, digits) in _COLUMNS.items()
        ]
        table.append([*names, *cells, str(count)])
    return table
