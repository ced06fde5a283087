"""The report of a curation: one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from jinja2 import Environment
from numpy.typing import NDArray

from imageconductor.curation.footage import decode_mp4
from imageconductor.curation.steps import LOST_TRACKS, grid_points
from imageconductor.data.trackers import LucasKanadeTracker

pc: Any = pyarrow.compute  # Its functions are generated at import, which type checkers do not see.

if TYPE_CHECKING:
    from imageconductor.curation.run_folder import Run

_NUM_EXAMPLES = 12  # clips per gallery
_FRAMES_PER_EXAMPLE = 4
_TRAIL_FRAMES = 8  # length of the path drawn behind a point
_COLUMNS = ["key", "source", "caption", "accepted", "shard", "reason", "detail", "interval", "motion_score"]
_COLUMNS += ["track_length_px", "tracked_fraction", "camera_only", "scale", "num_objects"]
_BINS = 24


def render_report(index: Path, run: Run) -> str:
    """HTML page with counts, histograms and pictures of accepted and of dropped clips.

    Args:
        index: Parquet file of the rows.
        run: The curation; its shards and its clips before the motion filter are read.
    """
    table = pq.read_table(index, columns=_COLUMNS)
    table = table.append_column("chunk", pa.array(np.arange(len(table)) // run.config.clips_per_shard))
    accepted = table.filter(pc.field("accepted"))
    lost = table.filter(pc.field("reason") == LOST_TRACKS)
    dropped = table.filter(pc.field("motion_score").is_valid() & ~pc.field("accepted"))
    dropped = dropped.filter(pc.field("reason") != LOST_TRACKS)
    reasons = sorted(count_outcomes(table).items(), key=lambda entry: (-entry[1], entry[0]))
    slow = dropped.filter(pc.field("reason") == "moves least")["motion_score"]
    examples = {
        reason: table.filter(pc.field("reason") == reason).slice(0, 1).to_pylist()[0]
        for reason, _ in reasons
        if reason != "accepted"
    }
    charts = [
        (
            "Motion score (root of the sum of squared flow, px)",
            _draw_histogram(_values(table, "motion_score"), pc.max(slow).as_py()),
        ),
        ("Interval between frames", _draw_histogram(_values(table, "interval"))),
        ("Track length in accepted clips (px)", _draw_histogram(_values(accepted, "track_length_px"))),
        (
            f"Tracked fraction of the clips that move (rejected below {run.config.min_tracked_fraction:g})",
            _draw_histogram(_values(table, "tracked_fraction"), run.config.min_tracked_fraction),
        ),
    ]
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            total=len(table),
            accepted=len(accepted),
            camera_only=pc.sum(accepted["camera_only"]).as_py() or 0,
            uncaptioned=pc.sum(pc.equal(accepted["caption"], "")).as_py() or 0,
            enlarged=pc.sum(pc.greater(accepted["scale"], 1)).as_py() or 0,
            boxed=pc.sum(pc.greater(pc.fill_null(accepted["num_objects"], 0), 0)).as_py() or 0,
            reasons=reasons,
            examples=examples,
            charts=charts,
            galleries=[
                ("Accepted", [_accepted_figure(row, run) for row in _choose_examples(accepted)]),
                ("Dropped", [_dropped_figure(row, run) for row in _choose_examples(dropped)]),
                ("Lost tracks", [_dropped_figure(row, run) for row in _choose_examples(lost)]),
            ],
            settings=(run.output / "config.yaml").read_text(),
        )
    )


def count_outcomes(rows: pa.Table) -> Counter[str]:
    """Number of sources that were "accepted", and that were rejected for each reason, in a table of the reasons."""
    counts = pc.value_counts(pc.fill_null(rows["reason"], "accepted"))
    return Counter({entry["values"]: entry["counts"] for entry in counts.to_pylist()})


def _values(table: pa.Table, column: str) -> NDArray[np.float64]:
    return table[column].drop_null().to_numpy().astype(np.float64)


def _draw_histogram(values: NDArray[np.float64], mark: float | None = None) -> str:
    """An SVG histogram with a line at `mark`; values beyond the 99th percentile are counted in the last bin."""
    if not len(values):
        return "<p>none</p>"
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    high = high if high > low else low + 1
    counts, _ = np.histogram(np.clip(values, low, high), bins=_BINS, range=(low, high))
    width, height = 480, 140
    bar = width / _BINS
    shapes = [
        f'<rect x="{i * bar + 1:.1f}" y="{height - count / counts.max() * height:.1f}" width="{bar - 2:.1f}" '
        f'height="{count / counts.max() * height:.1f}"><title>{low + i * (high - low) / _BINS:.2f} to '
        f"{low + (i + 1) * (high - low) / _BINS:.2f}: {count}</title></rect>"
        for i, count in enumerate(counts)
    ]
    if mark is not None:
        x = (min(max(mark, low), high) - low) / (high - low) * width
        shapes.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"><title>dropped up to {mark:.2f}</title></line>'
        )
    axis = (
        f'<text x="0" y="{height + 16}">{low:.4g}</text>'
        f'<text x="{width}" y="{height + 16}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{width / 2}" y="{height + 16}" text-anchor="middle">median {np.median(values):.4g}</text>'
    )
    return f'<svg viewBox="0 0 {width} {height + 20}">{"".join(shapes)}{axis}</svg>'


def _choose_examples(clips: pa.Table) -> list[dict[str, Any]]:
    """A few rows with motion scores evenly spaced in rank, lowest first."""
    ranked = pc.sort_indices(clips, sort_keys=[("motion_score", "ascending"), ("key", "ascending")]).to_numpy()
    chosen = np.unique(np.linspace(0, len(ranked) - 1, min(_NUM_EXAMPLES, len(ranked))).round().astype(int))
    return clips.take(ranked[chosen]).to_pylist() if len(ranked) else []


def _accepted_figure(row: dict[str, Any], run: Run) -> dict[str, str]:
    with tarfile.open(run.output / row["shard"]) as tar:
        mp4, tracks = (_read_member(tar, f"{row['key']}.{ending}") for ending in ("mp4", "tracks.npz"))
        has_boxes = row["num_objects"] is not None
        objects = json.loads(_read_member(tar, f"{row['key']}.boxes.json"))["objects"] if has_boxes else []
    clip = decode_mp4(mp4)
    for one in objects:
        _draw_boxes(clip, one)
    with np.load(io.BytesIO(tracks)) as arrays:
        picture = _draw_strip(clip, arrays["points"].astype(np.float32), arrays["visible"])
    return _figure(row, picture, f"{row['caption'] or 'no caption'}")


def _dropped_figure(row: dict[str, Any], run: Run) -> dict[str, str]:
    with tarfile.open(run.scanned_clips(row["chunk"])) as tar:
        clip = decode_mp4(_read_member(tar, f"{row['key']}.mp4"))
    tracks = LucasKanadeTracker().track(clip, grid_points((clip.shape[2], clip.shape[1]), run.config.grid))
    return _figure(row, _draw_strip(clip, *tracks), f"{row['reason']}: {row['detail']}")


def _figure(row: dict[str, Any], picture: NDArray[np.uint8], text: str) -> dict[str, str]:
    """The template's fields for one picture."""
    _, content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    facts = f"motion {row['motion_score']:.0f}, every {row['interval']}"
    if row["tracked_fraction"] is not None:
        facts += f", tracked {row['tracked_fraction']:.2f}"
    return {
        "picture": base64.b64encode(content.tobytes()).decode(),
        "source": row["source"],
        "text": text,
        "facts": facts,
    }


def _draw_strip(clip: NDArray[np.uint8], points: NDArray[np.floating], visible: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A few frames side by side, each with the recent paths of every second point of the grid."""
    numbers = np.linspace(0, len(clip) - 1, _FRAMES_PER_EXAMPLE).round().astype(int)
    pictures = []
    for number in numbers:
        picture = clip[number].copy()
        side = int(np.sqrt(len(points)))
        for track in (n for n in range(len(points)) if n % side % 2 == 0 and n // side % 2 == 0):
            _draw_track(picture, points[track, : number + 1], visible[track, : number + 1])
        pictures.append(picture)
    return np.concatenate(pictures, axis=1)


def _draw_track(picture: NDArray[np.uint8], points: NDArray[np.floating], visible: NDArray[np.bool_]) -> None:
    if not visible[-1]:
        return
    path = np.round(points[-_TRAIL_FRAMES:]).astype(np.int32)
    cv2.polylines(picture, [path], False, (255, 210, 60), 1, cv2.LINE_AA)
    cv2.circle(picture, path[-1].tolist(), 2, (255, 70, 70), -1, cv2.LINE_AA)


def _draw_boxes(clip: NDArray[np.uint8], one: dict[str, Any]) -> None:
    """Draws an object of a `boxes.json` into the frames of its clip."""
    for frame, box in zip(clip, one["boxes"], strict=True):
        if box is not None:
            x1, y1, x2, y2 = (round(value) for value in box)
            cv2.rectangle(frame, (x1, y1), (x2 - 1, y2 - 1), (90, 230, 120), 1)
            place = (x1 + 2, y1 + 12)
            cv2.putText(frame, one["name"], place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (90, 230, 120), 1, cv2.LINE_AA)


def _read_member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise FileNotFoundError(name)
    return file.read()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Curation report</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums } .quiet { color: #777; font-size: .85rem }
.bar { background: #4a7bd0; height: .7rem; display: inline-block } .accepted .bar { background: #3a9a5b }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1.5rem }
svg { width: 100%; fill: #4a7bd0 } svg text { fill: #777; font-size: 12px }
svg line { stroke: #d0482f; stroke-width: 2 }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); gap: 1rem }
figure { margin: 0 } figure img { width: 100%; display: block; border-radius: 4px }
figcaption { overflow-wrap: anywhere } pre { background: #f6f6f6; padding: 1rem; overflow: auto; font-size: .8rem }
</style>
<h1>{{ accepted }} of {{ total }} sources became clips</h1>
<p>{{ camera_only }} of the clips show camera motion only; {{ uncaptioned }} have no caption;
{{ enlarged }} are enlarged from smaller footage{% if boxed %}; {{ boxed }} show objects with boxes{% endif %}.</p>
<h2>Outcomes</h2>
<table>
{% for reason, count in reasons %}<tr class="{{ 'accepted' if reason == 'accepted' else '' }}">
<td>{{ reason }}</td><td class="number">{{ count }}</td>
<td><span class="bar" style="width: {{ (300 * count / total) | round | int + 1 }}px"></span></td>
<td class="quiet">{% if reason in examples %}{{ examples[reason].source }}: {{ examples[reason].detail }}
{% endif %}</td></tr>
{% endfor %}</table>
<h2>Figures</h2>
<div class="charts">{% for title, chart in charts %}<div><b>{{ title }}</b>{{ chart | safe }}</div>{% endfor %}</div>
{% for title, figures in galleries %}<h2>{{ title }}</h2>
{% if not figures %}<p>none</p>{% endif %}
<div class="gallery">{% for figure in figures %}<figure>
<img src="data:image/jpeg;base64,{{ figure.picture }}" alt="frames of {{ figure.source }}">
<figcaption>{{ figure.text }} <span class="quiet">{{ figure.source }}, {{ figure.facts }}</span></figcaption>
</figure>{% endfor %}</div>{% endfor %}
<h2>Settings</h2><pre>{{ settings }}</pre>
</html>
"""
