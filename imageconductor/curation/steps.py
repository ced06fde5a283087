"""What is done to one clip: scan, score, annotate. Each is a function of the clip and the settings alone.

`scan` decodes the footage once for its cuts and once for the frames of the clip. `score` and `annotate` work on the
encoded clip, as training will see it, and take several at a time, which is how networks on a GPU want them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imageconductor.curation.captions import describe
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.cuts import choose_frames, find_scenes, longest
from imageconductor.curation.footage import (
    Limits,
    Rejected,
    decode_mp4,
    encode_mp4,
    frames,
    frames_at,
)
from imageconductor.curation.motion_score import motion_scores
from imageconductor.curation.sources import Source
from imageconductor.data.trackers import CoTracker, LucasKanadeTracker, Tracker

CUT_SIDE_PX = 96


@dataclass(frozen=True)
class Row:
    """A line of the index: one source, and what became of it. What was not reached is None.

    Attributes:
        key, source, path, caption, camera_only: Who it is; `key` names its files in the shard.
        accepted: Whether it is in a shard, `shard`.
        reason: Why it is not, one of a few; `detail` says what was found.
        width, height: Of the footage as shown, in pixels.
        num_source_frames, source_fps: Of the stretch that was looked at.
        cuts: Frames of it with which a scene begins, but for the first.
        first_frame, last_frame: The clip's, counted in that stretch.
        start_s, end_s: Their times in the footage.
        interval, fps: Frames of the source from one of the clip to the next, and the clip's rate.
        motion_score: See `curation.motion`.
        tracker, tracker_version: What made the tracks.
        track_length_px: Mean length of the visible paths, in pixels of the clip.
        tracked: Share of points and frames in which a track is visible.
    """

    key: str
    source: str
    path: str
    caption: str
    camera_only: bool
    accepted: bool = False
    shard: str | None = None
    reason: str | None = None
    detail: str | None = None
    width: int | None = None
    height: int | None = None
    num_source_frames: int | None = None
    source_fps: float | None = None
    cuts: list[int] = field(default_factory=list)
    first_frame: int | None = None
    last_frame: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    interval: int | None = None
    fps: float | None = None
    motion_score: float | None = None
    tracker: str | None = None
    tracker_version: str | None = None
    track_length_px: float | None = None
    tracked: float | None = None

    @classmethod
    def of(cls, source: Source) -> Row:
        """Before anything is known."""
        # Names of files are bytes, and a table holds text.
        path = source.path.encode("utf-8", "backslashreplace").decode()
        return cls(source.key, source.id, path, source.caption, source.camera_only)

    def rejected(self, reason: str, detail: str = "") -> Row:
        """The same with a reason why it is not taken."""
        return replace(self, reason=reason, detail=detail[:300])


def scan(source: Source, config: CurateConfig) -> tuple[Row, bytes | None]:
    """Encodes frames drawn from the longest scene; None if there are none, for the reason in the row."""
    row = Row.of(source)
    limits = Limits(config.min_side_px, config.max_side_px)
    path = Path(source.path)
    times: list[float] = []
    shown: list[tuple[int, int]] = []

    def small(size: tuple[int, int]) -> tuple[int, int]:
        shown.append(size)
        return _scaled(size, CUT_SIDE_PX / min(size)) if min(size) > CUT_SIDE_PX else size

    start = source.start_s or 0.0
    end = start + config.max_scan_s if source.end_s is None else min(source.end_s, start + config.max_scan_s)

    def pictures() -> Any:
        for time, picture in frames(path, small, limits, start, end):
            times.append(time)
            yield picture

    def covering(size: tuple[int, int]) -> tuple[int, int]:
        return _scaled(size, max(config.size[0] / size[0], config.size[1] / size[1]), at_least=config.size)

    try:
        scenes = find_scenes(pictures(), config)
        if not times:
            raise Rejected("no frames", "nothing could be decoded")
        rate = 1 / float(np.median(np.diff(times))) if len(times) > 1 else None
        row = replace(
            row,
            width=shown[0][0],
            height=shown[0][1],
            num_source_frames=len(times),
            source_fps=rate,
            cuts=[scene.first for scene in scenes[1:]],
        )
        scene = longest(scenes)
        random = np.random.default_rng([config.seed, int(source.key, 16)])
        chosen, interval = choose_frames(times[scene.first : scene.last + 1], config, random)
        taken = [times[scene.first + number] for number in chosen]
        clip = frames_at(path, taken, covering, limits, crop=config.size)
        fps = (len(taken) - 1) / (taken[-1] - taken[0])
        row = replace(
            row,
            first_frame=scene.first + chosen[0],
            last_frame=scene.first + chosen[-1],
            start_s=taken[0],
            end_s=taken[-1],
            interval=interval,
            fps=fps,
        )
        return row, encode_mp4(clip, fps)
    except Rejected as found:
        return row.rejected(found.reason, found.detail), None


def score(mp4s: Sequence[bytes], config: CurateConfig) -> list[float]:
    """The motion scores of encoded clips."""
    return motion_scores([decode_mp4(mp4) for mp4 in mp4s], config)


def annotate(clips: Sequence[tuple[Row, bytes]], config: CurateConfig) -> list[tuple[Row, dict[str, bytes] | None]]:
    """Tracks and captions of encoded clips.

    Returns:
        For each its row, and the clip record's files by their endings (docs/data.md), None if it cannot be tracked.
    """
    pictures = [decode_mp4(mp4) for _, mp4 in clips]
    tracker = build_tracker(config.tracker, config.cotracker, config.cotracker_model, config.device)
    grid = grid_points(config.size, config.grid)
    if isinstance(tracker, CoTracker):
        tracks = tracker.track_together(pictures, grid)
    else:
        tracks = [tracker.track(clip, grid) for clip in pictures]
    rows = [_tracked(row, tracker, *found, config) for (row, _), found in zip(clips, tracks, strict=True)]
    if config.captioner == "blip2":
        silent = [i for i, row in enumerate(rows) if row.accepted and not row.caption]
        for i, caption in zip(silent, describe([pictures[i] for i in silent], config), strict=True):
            rows[i] = replace(rows[i], caption=caption)
    return [
        (row, _record(row, mp4, *found) if row.accepted else None)
        for row, (_, mp4), found in zip(rows, clips, tracks, strict=True)
    ]


def _tracked(row: Row, tracker: Tracker, points: NDArray[np.float64], visible: NDArray, config: CurateConfig) -> Row:
    steps = np.linalg.norm(np.diff(points, axis=1), axis=-1)
    row = replace(
        row,
        tracker=tracker.name,
        tracker_version=tracker.version,
        tracked=float(visible.mean()),
        track_length_px=float((steps * (visible[:, 1:] & visible[:, :-1])).sum(axis=1).mean()),
    )
    if visible.mean() < config.min_tracked:
        return row.rejected("lost tracks", f"{visible.mean():.3f} of the points could be followed")
    return replace(row, accepted=True)


def _record(row: Row, mp4: bytes, points: NDArray[np.float64], visible: NDArray[np.bool_]) -> dict[str, bytes]:
    arrays = io.BytesIO()
    # Within float16 where they matter; a point lost far outside the frame must not become infinite.
    np.savez(arrays, points=points.clip(-30000, 30000).astype(np.float16), visible=visible)
    info = asdict(row)
    for name in ("key", "accepted", "shard", "reason", "detail", "path"):
        del info[name]
    return {"mp4": mp4, "tracks.npz": arrays.getvalue(), "json": json.dumps(info).encode()}


def grid_points(size: tuple[int, int], side: int) -> NDArray[np.float64]:
    """Centres of side x side equal cells of a frame (W, H): (side^2, 2) pixels."""
    x, y = (((np.arange(side) + 0.5) * length / side - 0.5) for length in size)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


@lru_cache(maxsize=1)
def build_tracker(kind: str, repository: str, model: str, device: str | None) -> Tracker:
    """The tracker that the settings name, loaded once a process."""
    return LucasKanadeTracker() if kind == "lucas_kanade" else CoTracker(repository, model, device)


def _scaled(size: tuple[int, int], scale: float, at_least: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    return max(at_least[0], round(size[0] * scale)), max(at_least[1], round(size[1] * scale))
