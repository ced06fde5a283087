"""What an evaluation shows: the tables, contact sheets, and a page with the videos, worst first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment
from numpy.typing import NDArray

from imageconductor.evaluation.protocol import Evaluation
from imageconductor.evaluation.requests import Request
from imageconductor.evaluation.video_files import write_text, write_video
from imageconductor.sampling.video import contact_sheet, draw_trajectories, upscale_for_viewing

PAPER_TABLE_1 = {
    "DragNUWA, as the paper has it": {"fid": 237.26, "fvd": 1283.85, "cam_mc": 48.72, "obj_mc": 51.24},
    "DragAnything, as the paper has it": {"fid": 243.17, "fvd": 1287.15, "cam_mc": 66.54, "obj_mc": 60.97},
    "Image Conductor, as the paper has it": {"fid": 209.74, "fvd": 1116.17, "cam_mc": 33.49, "obj_mc": 42.38},
}
"""The automatic metrics of the paper's Table 1."""

_COLUMNS = {"fid": "FID", "fvd": "FVD", "cam_mc": "CamMC", "obj_mc": "ObjMC"}
_ARM_COLUMNS = {
    "error_384x256": "error, px at 384x256",
    "error_of_diagonal": "error / diagonal",
    "error_all_points_384x256": "error, lost points too",
    "still_384x256": "a motionless video's",
    "leak_384x256": "leak, px at 384x256",
    "coverage": "coverage",
    "first_frame_psnr": "first frame, dB",
    "first_frame_ssim": "SSIM",
    "clip_text": "CLIP text",
    "clip_consistency": "CLIP frames",
    "seconds": "s a video",
}
_NOTE = (
    "CamMC and ObjMC: mean distance in pixels at 384x256 between requested and tracked points that could be followed; "
    "mean over videos, bootstrap 95 % interval. The paper does not say its tracker, its coverage or how lost points "
    "count, so its rows stand beside ours for orientation; videos of the sprite world are of another world and size."
)


def write_report(evaluation: Evaluation, record: dict[str, Any], folder: Path) -> None:
    """Writes results.json, table.md, table.tex, same_SET.png and report.html with its videos into a folder."""
    write_text(folder / "table.md", markdown(record))
    write_text(folder / "table.tex", latex(record))
    for kind, requests in evaluation.requests.items():
        contact_sheet(folder / f"same_{kind}.png", _compared(evaluation, kind, requests))
    sections = [
        {"row": row, "arm": arm, "videos": _worst(evaluation, row, arm, folder)}
        for row in evaluation.config.table
        for arm in evaluation.config.arms
    ]
    page = Environment(autoescape=True).from_string(_PAGE)
    tables = [_table_1(record), _arms(record)]
    html = page.render(
        sections=sections,
        tables=[table for table in tables if table],
        notes=_notes(record),
        settings=record["settings"],
    )
    write_text(folder / "report.html", html)
    write_text(folder / "results.json", json.dumps(record, indent=1))


def markdown(record: dict[str, Any]) -> str:
    """Table 1 with the paper's rows, and a table of all rows and arms."""
    tables = [table for table in (_table_1(record), _arms(record)) if table]
    return (
        "\n\n".join(
            "\n".join(["| " + " | ".join(lines[0]) + " |", "|---" * len(lines[0]) + "|"])
            + "\n"
            + "\n".join("| " + " | ".join(line) + " |" for line in lines[1:])
            for lines in tables
        )
        + "\n\n"
        + "\n\n".join(_notes(record))
        + "\n"
    )


def latex(record: dict[str, Any]) -> str:
    """Table 1, or all arms where the two sets were not both asked for, as a tabular for booktabs."""
    lines = _table_1(record) or _arms(record)
    body = [" & ".join(_escaped(cell) for cell in line) + r" \\" for line in lines]
    rules = [r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}", *rules, r"\end{tabular}", ""])


def _table_1(record: dict[str, Any]) -> list[list[str]]:
    """Cells, the heading first; empty unless camera and object were both asked for."""
    rows = record["rows"]
    if not all({"camera", "object"} <= row["arms"].keys() for row in rows.values()):
        return []
    lines = [["method", *_COLUMNS.values(), "coverage"]]
    lines += [[name, *(f"{row[key]:.2f}" for key in _COLUMNS), "–"] for name, row in PAPER_TABLE_1.items()]
    for name, row in rows.items():
        camera, moved = row["arms"]["camera"], row["arms"]["object"]
        distances = [_number(row["frechet"].get(key, {}).get("value")) for key in ("fid", "fvd")]
        cells = [_cell(arm["error_384x256"]) for arm in (camera, moved)]
        both = " and ".join(_number(arm["coverage"]["mean"]) for arm in (camera, moved))
        lines.append([name, *distances, *cells, both])
    return lines


def _arms(record: dict[str, Any]) -> list[list[str]]:
    shown = [
        key
        for key in _ARM_COLUMNS
        if any(key in arm for row in record["rows"].values() for arm in row["arms"].values())
    ]
    lines = [["method", "asked for", *(_ARM_COLUMNS[key] for key in shown), "videos"]]
    for name, row in record["rows"].items():
        for arm, found in row["arms"].items():
            digits = {
                "error_of_diagonal": 4,
                "coverage": 2,
                "first_frame_ssim": 3,
                "clip_text": 3,
                "clip_consistency": 3,
            }
            cells = [_cell(found[key], digits.get(key, 2)) if key in found else "–" for key in shown]
            lines.append([name, arm, *cells, str(found["coverage"]["n"])])
    return lines


def _notes(record: dict[str, Any]) -> list[str]:
    """How the figures are meant, and each Fréchet distance with its samples; the embedded one never as FID or FVD."""
    names = {"fid": "FID", "fvd": "FVD", "frechet_small": "Fréchet distance of the embedded extractor"}
    return [
        _NOTE,
        *(
            f"{name}: {names[key]} {distance['value']:.4g}, {distance['num_generated']} samples against "
            f"{distance['num_reference']} of {distance['reference']}."
            for name, row in record["rows"].items()
            for key, distance in row["frechet"].items()
        ),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cell(figure: dict[str, Any], digits: int = 2) -> str:
    if figure["mean"] is None:
        return "–"
    low, high = figure["low"], figure["high"]
    return f"{figure['mean']:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def _escaped(text: str) -> str:
    for plain, tex in (
        ("\\", r"\textbackslash{}"),
        ("_", r"\_"),
        ("%", r"\%"),
        ("&", r"\&"),
        ("#", r"\#"),
        ("–", "--"),
    ):
        text = text.replace(plain, tex)
    return text


def _compared(evaluation: Evaluation, kind: str, requests: list[Request]) -> list[tuple[str, NDArray[np.uint8]]]:
    """The first two requests of a set under every row and arm, the clips themselves first where they are known."""
    sheet = []
    for request in requests[:2]:
        if request.truth is not None:
            sheet.append((f"{request.key}: {request.prompt}", _drawn(request, request.truth)))
        for name, row in evaluation.config.table.items():
            for arm, asked in evaluation.config.arms.items():
                if asked.requests == kind:
                    frames = evaluation.read(evaluation.video_path(name, row, arm, request))
                    sheet.append((f"{request.key}: {name}, {arm}", _drawn(request, frames)))
    return sheet


def _drawn(request: Request, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    large, factor = upscale_for_viewing(frames)
    return draw_trajectories(large, request.trajectories, factor)


def _worst(evaluation: Evaluation, name: str, arm: str, folder: Path) -> list[dict[str, Any]]:
    """The videos of an arm with the largest error over all points; each written with both tracks drawn on it."""
    row, kind = evaluation.config.table[name], evaluation.config.arms[arm].requests
    scores = {score["key"]: score for score in evaluation.clip_scores(name, arm)}
    worst = sorted(evaluation.requests[kind], key=lambda r: -(scores[r.key]["error_all_points"] or 0))
    shown = []
    for request in worst[: evaluation.config.shown]:
        score = scores[request.key]
        drawn = _drawn(request, evaluation.read(evaluation.video_path(name, row, arm, request)))
        factor = drawn.shape[1] // request.image.shape[0]
        for t, frame in enumerate(drawn):
            _mark(frame, np.asarray(score["tracked"])[:, t], np.asarray(score["followed"])[:, t], factor)
        path = folder / "report" / name / arm / f"{request.key}.mp4"
        write_video(path, drawn)
        facts = {key: score[key] for key in ("error", "error_all_points", "leak", "coverage")}
        shown.append(
            {"key": request.key, "prompt": request.prompt, "src": str(path.relative_to(folder)), "facts": facts}
        )
    return shown


def _mark(frame: NDArray[np.uint8], tracked: NDArray, followed: NDArray, factor: int) -> None:
    """A white ring where the tracker sees a point; black once it has lost it."""
    for (x, y), seen in zip((tracked + 0.5) * factor - 0.5, followed, strict=True):
        if np.isfinite((x, y)).all() and abs(x) < 1e4 and abs(y) < 1e4:
            colour = (255, 255, 255) if seen else (0, 0, 0)
            cv2.circle(frame, (round(x), round(y)), 8, colour, 2, cv2.LINE_AA)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #1d2330; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: 4px 9px; border-bottom: 1px solid #d9dde5; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 14px; }
figure { margin: 0; } video { width: 100%; border-radius: 4px; background: #000; }
figcaption { font-size: 12.5px; } .quiet { color: #69707f; } pre { font-size: 12px; overflow-x: auto; }
</style>
<h1>Evaluation</h1>
{% for lines in tables %}<table>
<tr>{% for cell in lines[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for line in lines[1:] %}<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% for note in notes %}<p class="quiet">{{ note }}</p>{% endfor %}
<p>In the videos: coloured lines and dots are what was asked for; a white ring is where the tracker sees the point,
a black one where it lost it. The largest errors come first; they are in pixels of the video.</p>
{% for section in sections %}<h2>{{ section.row }}: {{ section.arm }}</h2>
<div class="videos">{% for video in section.videos %}<figure>
<video src="{{ video.src }}" loop muted autoplay playsinline controls preload="metadata"></video>
<figcaption>{{ video.key }} <span class="quiet">{{ video.prompt }}</span><br>
{% for name, value in video.facts.items() %}{{ name | replace("_", " ") }}
{{ "%.2f" | format(value) if value is not none else "–" }}{{ ", " if not loop.last }}{% endfor %}</figcaption>
</figure>{% endfor %}</div>{% endfor %}
<h2>Settings</h2><pre>{{ settings | tojson(indent=1) }}</pre>
</html>
"""
