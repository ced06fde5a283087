"""Summary of an evaluation of boxes, its table, and a contact sheet.

OUTPUT/results.json    figures with intervals by method, differences to the first method, settings
OUTPUT/table.md        one line for each method, the true clips and the box of frame 0 kept
OUTPUT/same_clips.png  the first clips, and what each method makes of them, with the requested boxes
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from imageconductor.evaluation.input_checks import network_file
from imageconductor.evaluation.metrics.boxes import summarise_overlaps
from imageconductor.evaluation.metrics.frechet import Statistics, collect_statistics, frechet_distance
from imageconductor.evaluation.metrics.frechet_names import FrechetName
from imageconductor.evaluation.scores import (
    collect_failures,
    describe_failure,
    list_failures,
    summarise_scores,
    to_json_values,
)
from imageconductor.evaluation.statistics import MIN_SOURCES
from imageconductor.evaluation.tables import format_scaled, format_tables
from imageconductor.files import write_text
from imageconductor.sampling.video import contact_sheet, draw_boxes, upscale_for_viewing

if TYPE_CHECKING:
    from imageconductor.evaluation.boxes.protocol import BoxEvaluation

_COLUMNS = {  # metric -> heading, factor, digits
    "ao": ("AO", 1, 3),
    "sr50": ("SR50", 1, 3),
    "sr75": ("SR75", 1, 3),
    "first_frame_psnr": ("first frame, dB", 1, 1),
    "first_frame_clip": ("first-frame fidelity, CLIP", 1, 3),
    "first_frame_dino": ("first-frame fidelity, DINO", 1, 3),
    "clip_text": ("text alignment, 100 x CLIP", 100, 2),
}
_KEPT = "box of frame 0"
_SHOWN = 3  # clips of the contact sheet
_NOTE = (
    "AO: overlap (IoU) of a tracked box with the requested one, mean over frames; SR50 and SR75: fraction of frames "
    "whose overlap is above 0.5 and 0.75. Frame 0, in which the tracker starts, and frames without the object do not "
    "count; all frames of all clips count alike. True clips: what the tracker reaches on the clips themselves. Box of "
    "frame 0: what a box that stays has. First-frame fidelity: cosine of each frame with the first frame of the clip. "
    f"Mean and bootstrap 95 % interval over clips (none for fewer than {MIN_SOURCES}, where it would be too narrow)."
)


def summarise_boxes(evaluation: BoxEvaluation) -> dict[str, Any]:
    """The record, which is written as results.json."""
    from imageconductor.evaluation.boxes.protocol import TRUE_CLIPS

    scores = {name: evaluation.read_scores(name) for name in (TRUE_CLIPS, *evaluation.config.methods)}
    first = next(iter(evaluation.config.methods))
    lines = {name: {"figures": _summarise(own), "failed": collect_failures(own)} for name, own in scores.items()}
    distances = _measure_frechet(evaluation)
    for name, method in evaluation.config.methods.items():
        lines[name] |= {**asdict(method), "frechet": distances[name]}
        lines[name]["differences"] = {} if name == first else _summarise(scores[name], scores[first])
    kept = [
        {"overlaps": score["kept_overlaps"], "source": score["source"]}
        for score in scores[TRUE_CLIPS]
        if "kept_overlaps" in score
    ]
    settings = {
        **asdict(evaluation.config),
        "size": evaluation.size,
        "num_frames": evaluation.num_frames,
        "num_clips": len(evaluation.requests),
        "num_objects": sum(request.boxes.num_objects for request in evaluation.requests),
        "tracker": f"{evaluation.tracker.name} {evaluation.tracker.version}",
        "num_processes": evaluation.state.num_processes,
    }
    record = {"methods": {_KEPT: {"figures": _summarise(kept), "failed": {}}, **lines}, "settings": settings}
    record = to_json_values(record)
    write_text(evaluation.output / "results.json", json.dumps(record, indent=1))
    return record


def write_box_report(evaluation: BoxEvaluation, record: dict[str, Any], folder: Path) -> None:
    """Writes table.md and same_clips.png into a folder."""
    from imageconductor.evaluation.boxes.protocol import TRUE_CLIPS

    write_text(folder / "table.md", format_boxes(record))
    rows = []
    for request in evaluation.requests[:_SHOWN]:
        for name in (TRUE_CLIPS, *evaluation.config.methods):
            large, factor = upscale_for_viewing(evaluation.read_frames(name, request))
            rows.append((f"{request.key}, {name}: {request.prompt}"[:110], draw_boxes(large, request.boxes, factor)))
    contact_sheet(folder / "same_clips.png", rows)


def format_boxes(record: dict[str, Any]) -> str:
    """The table of all methods, that of their differences to the first one, and notes."""
    methods, settings = record["methods"], record["settings"]
    named = {name: line for name, line in methods.items() if "differences" in line}
    first, *others = named
    tables = [_build_table("method", {name: line["figures"] for name, line in methods.items()})]
    if others:
        tables.append(
            _build_table(f"difference to {first}", {name: named[name]["differences"] for name in others}, "+")
        )
    distances = [
        f"{distance} of {name}: {found['value']:.2f} ({found['num_generated']} and {found['num_reference']})"
        for name, line in named.items()
        for distance, found in line["frechet"].items()
        if "value" in found
    ]
    notes = [
        f"{_NOTE} Tracker: {settings['tracker']}. {settings['num_clips']} clips of {settings['dataset']} with "
        f"{settings['num_objects']} objects.",
        *([f"Distances to the true clips: {'; '.join(distances)}."] if distances else []),
        *(f"NOT MEASURED: {failure}" for failure in list_failures(record)),
    ]
    return "\n\n".join([format_tables(tables), *notes]) + "\n"


def _summarise(scores: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Each metric's mean and interval, `Figure` as a dict; overlaps by the frame, as the toolkit counts them."""
    found: dict[str, Any] = summarise_scores(
        _leave_out_overlaps(scores), scale=1, baseline=None if baseline is None else _leave_out_overlaps(baseline)
    )
    tracked = [n for n, one in enumerate(scores) if "overlaps" in one and "overlaps" in (baseline or scores)[n]]
    rows = [[one[n]["overlaps"] for n in tracked] for one in (scores, baseline) if one is not None]
    figures = summarise_overlaps(rows[0], [scores[n]["source"] for n in tracked], *rows[1:])
    return found | {metric: asdict(figure) for metric, figure in figures.items()}


def _leave_out_overlaps(scores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    left_out = ("overlaps", "kept_overlaps")
    return [{key: value for key, value in one.items() if key not in left_out} for one in scores]


def _measure_frechet(evaluation: BoxEvaluation) -> dict[str, dict[str, Any]]:
    """By method each asked-for distance between its videos and the true clips, or the reason why there is none."""
    from imageconductor.evaluation.boxes.protocol import TRUE_CLIPS

    found: dict[str, dict[str, Any]] = {name: {} for name in evaluation.config.methods}
    for distance in evaluation.config.frechet:
        weights, reference = network_file(evaluation.config, distance), None
        for name, own in found.items():
            try:
                reference = reference or _collect_statistics(evaluation, distance, TRUE_CLIPS)
                generated = _collect_statistics(evaluation, distance, name)
                own[distance] = asdict(frechet_distance(distance, generated, reference, weights, evaluation.num_frames))
            except Exception as error:  # The network's file is the user's; the other figures must not be lost with it.
                own[distance] = {"failed": describe_failure(error)}
    return found


def _collect_statistics(evaluation: BoxEvaluation, distance: FrechetName, name: str) -> Statistics:
    """Statistics of a method's videos, or of the true clips."""
    bar = tqdm(evaluation.requests, desc=f"{name}: {distance}", dynamic_ncols=True)
    videos = (evaluation.read_frames(name, request) for request in bar)
    weights = network_file(evaluation.config, distance)
    return collect_statistics(distance, videos, weights, evaluation.num_frames, evaluation.device)


def _build_table(title: str, lines: dict[str, dict[str, Any]], sign: str = "") -> list[list[str]]:
    """Cells, the heading first; a figure that was not measured is a dash."""
    measured = [metric for metric in _COLUMNS if any(metric in figures for figures in lines.values())]
    table = [[title, *(_COLUMNS[metric][0] for metric in measured)]]
    for name, figures in lines.items():
        table.append([name, *(format_scaled(figures.get(key), *_COLUMNS[key][1:], sign) for key in measured)])
    return table
