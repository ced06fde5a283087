"""Report of an evaluation: tables, contact sheets, and a page of videos with the largest errors first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from jinja2 import Environment
from numpy.typing import NDArray

from imageconductor.evaluation.drawn_motion.requests import Request
from imageconductor.evaluation.scores import list_failures
from imageconductor.evaluation.statistics import MIN_SOURCES
from imageconductor.evaluation.tables import format_figure, format_tables
from imageconductor.evaluation.video_files import write_video
from imageconductor.files import write_text
from imageconductor.sampling.video import contact_sheet, draw_trajectories, upscale_for_viewing

if TYPE_CHECKING:
    from imageconductor.evaluation.drawn_motion.protocol import Evaluation

PAPER_TABLE_1 = {
    "DragNUWA (paper)": {"fid": 237.26, "fvd": 1283.85, "cam_mc": 48.72, "obj_mc": 51.24},
    "DragAnything (paper)": {"fid": 243.17, "fvd": 1287.15, "cam_mc": 66.54, "obj_mc": 60.97},
    "Image Conductor (paper)": {"fid": 209.74, "fvd": 1116.17, "cam_mc": 33.49, "obj_mc": 42.38},
}
"""The automatic metrics of the paper's Table 1."""

_PAPER_COLUMNS: tuple[str, ...] = ("fid", "fvd", "cam_mc", "obj_mc")
_TABLE_1: tuple[str, ...] = (
    "method",
    "frame",
    "FID",
    "FVD",
    "CamMC",
    "ObjMC",
    "CamMC, % of diagonal",
    "ObjMC, % of diagonal",
    "CamMC, all points",
    "ObjMC, all points",
    "tracked fraction",
)
_TASK_COLUMNS = {
    "error_384x256": "error, px at 384x256",
    "error_percent_of_diagonal": "error, % of the diagonal",
    "error_all_points_384x256": "error with lost points",
    "still_384x256": "error of a motionless video",
    "colour_error_384x256": "error of the sprites' colours, px at 384x256",
    "background_displacement_384x256": "background displacement, px at 384x256",
    "tracked_fraction": "tracked fraction",
    "first_frame_psnr": "first frame PSNR, dB",
    "first_frame_ssim": "first frame SSIM",
    "original_psnr": "PSNR to the original's videos, dB",
    "clip_text": "CLIP text",
    "clip_consistency": "CLIP frames",
    "seconds": "seconds per video",
}
_DIGITS = {  # 2 for all other columns
    "first_frame_ssim": 3,
    "clip_text": 3,
    "clip_consistency": 3,
}
_NOTE = (
    "CamMC and ObjMC: mean distance between requested and tracked points that could be followed, each method in its "
    "own frame (width x height x frames), in pixels at 384x256 by the ratio of the diagonals and in percent of the "
    "diagonal; mean over videos, bootstrap 95 % interval over the images that they come from (none for fewer than "
    f"{MIN_SOURCES}, where it would be too narrow). "
    "Tracked fraction: fraction of the requested points and frames that the tracker could follow. The paper states "
    "neither its tracker nor its tracked fraction nor how lost points count, so its lines stand beside ours for "
    "orientation; videos of the sprite world are of another world and size."
)


def write_report(evaluation: Evaluation, record: dict[str, Any], folder: Path) -> None:
    """Writes table.md, table.tex, same_SET.png and report.html with its videos into a folder."""
    write_text(folder / "table.md", format_markdown(record))
    write_text(folder / "table.tex", format_latex(record))
    for kind, requests in evaluation.requests.items():
        contact_sheet(folder / f"same_{kind}.png", _collect_answers(evaluation, kind, requests))
    sections = [
        {"method": name, "task": task, "videos": _write_worst_videos(evaluation, name, task, folder)}
        for name in evaluation.methods
        for task in evaluation.config.tasks
    ]
    page = Environment(autoescape=True).from_string(_PAGE)
    html = page.render(
        sections=sections, tables=_build_tables(record), notes=_list_notes(record), settings=record["settings"]
    )
    write_text(folder / "report.html", html)


def format_markdown(record: dict[str, Any]) -> str:
    """Table 1 with the paper's lines, a table of all methods and tasks, and notes."""
    return "\n\n".join([format_tables(_build_tables(record)), *_list_notes(record)]) + "\n"


def format_latex(record: dict[str, Any]) -> str:
    """Table 1, or all methods and tasks where there is no Table 1, as a tabular for booktabs."""
    lines = _build_tables(record)[0]
    body = [" & ".join(_escape_latex(cell) for cell in line) + r" \\" for line in lines]
    rules = [r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}", *rules, r"\end{tabular}", ""])


def _build_tables(record: dict[str, Any]) -> list[list[list[str]]]:
    """Cells of each table, line by line, the heading first: Table 1 if it can be filled, all tasks, differences."""
    tables = (_build_table_1(record), _build_task_table(record), _build_difference_table(record))
    return [table for table in tables if table]


def _build_table_1(record: dict[str, Any]) -> list[list[str]]:
    """The paper's Table 1 with our methods; empty unless there are tasks named camera and object."""
    methods = record["methods"]
    if not all({"camera", "object"} <= method["tasks"].keys() for method in methods.values()):
        return []
    lines = [list(_TABLE_1)]
    for name, figures in PAPER_TABLE_1.items():
        lines.append([name, "–", *(f"{figures[key]:.2f}" for key in _PAPER_COLUMNS), *["–"] * 5])
    for name, method in methods.items():
        tasks = [method["tasks"][task] for task in ("camera", "object")]
        distances = [_format_distance(method["frechet"].get(key)) for key in ("fid", "fvd")]
        errors = [
            format_figure(summary.get(metric))
            for metric in ("error_384x256", "error_percent_of_diagonal", "error_all_points_384x256")
            for summary in tasks
        ]
        fractions = " and ".join(_format_mean(summary.get("tracked_fraction")) for summary in tasks)
        lines.append([name, _format_frame(method), *distances, *errors, fractions])
    return lines


def _build_difference_table(record: dict[str, Any]) -> list[list[str]]:
    """Each method's mean difference to the first one on the same requests; empty for a single method."""
    first, *others = record["methods"]
    summaries = [
        (name, task, summary) for name in others for task, summary in record["methods"][name]["differences"].items()
    ]
    one_sided = ("seconds", "original_psnr")
    columns = [key for key in _TASK_COLUMNS if key not in one_sided and any(key in found for *_, found in summaries)]
    lines = [[f"difference to {first}", "task", *(_TASK_COLUMNS[key] for key in columns)]]
    for name, task, summary in summaries:
        cells = [format_figure(summary.get(key), _DIGITS.get(key, 2), "+") for key in columns]
        lines.append([name, task, *cells])
    return lines if others else []


def _build_task_table(record: dict[str, Any]) -> list[list[str]]:
    """One line for each method and task, one column for each metric that was measured."""
    summaries = [
        (name, task, summary) for name, method in record["methods"].items() for task, summary in method["tasks"].items()
    ]
    columns = [key for key in _TASK_COLUMNS if any(key in summary for _, _, summary in summaries)]
    lines = [["method", "task", *(_TASK_COLUMNS[key] for key in columns), "videos"]]
    for name, task, summary in summaries:
        count = max(figure["n"] for figure in summary.values())
        cells = [format_figure(summary.get(key), _DIGITS.get(key, 2), count=count) for key in columns]
        lines.append([name, task, *cells, str(count)])
    return lines


def _list_notes(record: dict[str, Any]) -> list[str]:
    """Meaning of the figures, what the tracker does on true clips, each Fréchet distance and its samples."""
    names = {"fid": "FID", "fvd": "FVD", "frechet_small": "Fréchet distance of the embedded extractor"}
    return [
        _NOTE,
        _describe_requests(record["requests"]),
        *_describe_true_clips(record["tracker_on_the_true_clips"], record["requests"]),
        *(
            f"{name}: {names[key]} {distance['value']:.4g}, {distance['num_generated']} samples against "
            f"{distance['num_reference']} of {distance['reference']}."
            for name, method in record["methods"].items()
            for key, distance in method["frechet"].items()
            if "failed" not in distance
        ),
        *(f"NOT MEASURED: {failure}" for failure in list_failures(record)),
    ]


def _describe_requests(requests: dict[str, Any]) -> str:
    """Which requests were answered, so that tables can be compared."""
    sets = [
        f"{kind} {found['requests']} of {found['images']} images or scenes (sha256 {found['sha256'][:12]})"
        for kind, found in requests.items()
        if kind != "fixed"
    ]
    fixed = requests["fixed"]
    source = "by the settings" if fixed is None else f"fixed by {fixed['file']}, sha256 {fixed['sha256']}"
    return f"Requests, {source}: {'; '.join(sets)}."


def _describe_true_clips(found: dict[str, Any], requests: dict[str, Any]) -> list[str]:
    """What the tracker itself loses and errs, where true clips are known; no method can be measured to do better."""
    sets = [
        f"{kind} {_format_mean(found[f'{kind}_tracked_fraction'])} of the points with an error of "
        f"{_format_mean(found[f'{kind}_error'])} px"
        for kind in requests
        if f"{kind}_tracked_fraction" in found
    ]
    return [f"On the true clips of these requests the tracker follows: {'; '.join(sets)}."] if sets else []


def _format_frame(method: dict[str, Any]) -> str:
    """Format of a method's videos, e.g. 576x320x14."""
    return f"{method['size'][0]}x{method['size'][1]}x{method['num_frames']}"


def _format_distance(distance: dict[str, Any] | None) -> str:
    if distance is None:
        return "–"
    return "failed" if "failed" in distance else f"{distance['value']:.2f}"


def _format_mean(figure: dict[str, Any] | None) -> str:
    return "–" if figure is None or figure["mean"] is None else f"{figure['mean']:.2f}"


def _escape_latex(text: str) -> str:
    for character, escape in (
        ("\\", r"\textbackslash{}"),
        ("_", r"\_"),
        ("%", r"\%"),
        ("&", r"\&"),
        ("#", r"\#"),
        ("–", "--"),
    ):
        text = text.replace(character, escape)
    return text


def _collect_answers(evaluation: Evaluation, kind: str, requests: list[Request]) -> list[tuple[str, NDArray[np.uint8]]]:
    """The first two requests of a set under every method and task, after the true clip where it is known."""
    sheet = []
    for number, request in enumerate(requests[:2]):
        if request.truth is not None:
            sheet.append((f"{request.key}: {request.prompt}", _draw_request(request, request.truth)))
        for name in evaluation.methods:
            for task_name, task in evaluation.config.tasks.items():
                if task.requests == kind:
                    fitted = evaluation.requests_for(name, task_name)[number]
                    frames = evaluation.read_frames(name, evaluation.video_path(name, task_name, request))
                    sheet.append((f"{request.key}: {name}, {task_name}", _draw_request(fitted, frames)))
    return sheet


def _draw_request(request: Request, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    large, factor = upscale_for_viewing(frames)
    return draw_trajectories(large, request.trajectories, factor)


def _write_worst_videos(evaluation: Evaluation, name: str, task: str, folder: Path) -> list[dict[str, Any]]:
    """The videos of a task with the largest error over all points, written with requested and tracked points drawn."""
    scores = {score["key"]: score for score in evaluation.read_scores(name, task)}
    worst = sorted(evaluation.requests_for(name, task), key=lambda r: -(scores[r.key].get("error_all_points") or 0))
    videos = []
    for request in worst[: evaluation.config.shown]:
        score = scores[request.key]
        frames = _draw_request(request, evaluation.read_frames(name, evaluation.video_path(name, task, request)))
        factor = frames.shape[1] // request.image.shape[0]
        for t, frame in enumerate(frames if "tracked" in score else ()):
            _draw_tracked(frame, np.asarray(score["tracked"])[:, t], np.asarray(score["followed"])[:, t], factor)
        path = folder / "report" / name / task / f"{request.key}.mp4"
        write_video(path, frames)
        facts = {
            key: score.get(key) for key in ("error", "error_all_points", "background_displacement", "tracked_fraction")
        }
        videos.append(
            {"key": request.key, "prompt": request.prompt, "src": str(path.relative_to(folder)), "facts": facts}
        )
    return videos


def _draw_tracked(frame: NDArray[np.uint8], tracked: NDArray, followed: NDArray, factor: int) -> None:
    """Draws a ring around each tracked point, white while the tracker follows it and black once it is lost."""
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
<p>In the videos, coloured lines and dots are the requested trajectories; a white ring is where the tracker sees the
point, a black one where it lost it. The largest errors come first; they are in pixels of the video.</p>
{% for section in sections %}<h2>{{ section.method }}: {{ section.task }}</h2>
<div class="videos">{% for video in section.videos %}<figure>
<video src="{{ video.src }}" loop muted autoplay playsinline controls preload="metadata"></video>
<figcaption>{{ video.key }} <span class="quiet">{{ video.prompt }}</span><br>
{% for name, value in video.facts.items() %}{{ name | replace("_", " ") }}
{{ "%.2f" | format(value) if value is not none else "–" }}{{ ", " if not loop.last }}{% endfor %}</figcaption>
</figure>{% endfor %}</div>{% endfor %}
<h2>Settings</h2><pre>{{ settings | tojson(indent=1) }}</pre>
</html>
"""
