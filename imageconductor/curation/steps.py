"""The steps for single clips, scan, score and annotate: pure functions of the clip and the settings.

`scan` decodes the footage once for its cuts and once for the frames of the clip. `score` and `annotate` work on the
encoded clip, as training will see it, and take several at a time, as networks on a GPU work best.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imageconductor.curation.captions import describe
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.cuts import Scene, choose_frames, find_longest, find_scenes, frame_duration
from imageconductor.curation.detections import BoxesError, find_detections, read_detections
from imageconductor.curation.footage import (
    Limits,
    Picture,
    Rejected,
    decode_mp4,
    encode_mp4,
    read_frames,
    read_frames_at,
)
from imageconductor.curation.motion_score import motion_scores
from imageconductor.curation.sources import Source
from imageconductor.data.clip_records import encode_tracks
from imageconductor.data.trackers import CoTracker, LucasKanadeTracker, Tracker

CUT_SIDE_PX = 96
"""Shorter side of the reduced frames in which cuts are found."""

LOST_TRACKS = "lost tracks"
"""Reason of rejection where fewer than `min_tracked_fraction` of the points could be followed."""

BAD_BOXES = "bad boxes"
"""Reason of rejection where the file of a detector's boxes is malformed."""


@dataclass(frozen=True)
class Row:
    """A row of the index: one source and its outcome. Fields that the source did not get to are None.

    Attributes:
        key, source, path, caption, camera_only: The source; `key` names its files in the shard.
        accepted, shard: Whether its clip is in a shard, and in which.
        reason, detail: Why it was rejected, one of a few fixed texts, and the facts behind it.
        width, height: Size of the footage as displayed, in pixels.
        num_source_frames, source_fps: Length and frame rate of the stretch that was scanned.
        scale: Pixels of the clip per pixel of the footage; above 1 the footage is enlarged.
        cuts: Frames of that stretch at which a new scene begins.
        first_frame, last_frame: First and last frame of the clip, counted in that stretch.
        start_s, end_s: Times of these two frames in the footage.
        interval, fps: Spacing of the clip's frames in source frames, and the clip's frame rate.
        motion_score: Mean norm of the optical flow (`motion_score.motion_scores`).
        tracker, tracker_version: The tracker that made the tracks.
        track_length_px: Mean length of the visible paths, in pixels of the clip.
        tracked_fraction: Fraction of points and frames in which a track is visible.
        num_objects: Objects with boxes in the clip; None = nothing is known of them.
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
    scale: float | None = None
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
    tracked_fraction: float | None = None
    num_objects: int | None = None

    @classmethod
    def from_source(cls, source: Source) -> Row:
        """The row of a source that has not been scanned."""
        # File names may hold any bytes, but the index holds valid text only.
        path = source.path.encode("utf-8", "backslashreplace").decode()
        return cls(source.key, source.id, path, source.caption, source.camera_only)

    def reject(self, reason: str, detail: str = "") -> Row:
        """A copy with the reason of its rejection."""
        return replace(self, reason=reason, detail=detail[:300])


def scan(source: Source, config: CurateConfig) -> tuple[Row, dict[str, bytes]]:
    """The row of a source, and the files of its clip by their endings; none if the source is rejected.

    They are mp4, and boxes.json where a detector's boxes are known.
    """
    row = Row.from_source(source)
    try:
        row, times, scenes = _scan_scenes(row, source, config)
        scene = find_longest(scenes)
        random = np.random.default_rng([config.seed, int(source.key, 16)])
        chosen, interval = choose_frames(times[scene.first : scene.last + 1], config, random)
        taken = [times[scene.first + number] for number in chosen]
        clip = _read_clip(source, taken, config)
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
        files = {"mp4": encode_mp4(clip, fps)}
        if config.boxes and (path := find_detections(config.boxes, source.id)):
            footage = (row.width or 0, row.height or 0)
            files["boxes.json"], count = read_detections(path, taken, footage, config.size)
            row = replace(row, num_objects=count)
        return row, files
    except Rejected as found:
        return row.reject(found.reason, found.detail), {}
    except BoxesError as error:
        return row.reject(BAD_BOXES, str(error)), {}


def _scan_scenes(row: Row, source: Source, config: CurateConfig) -> tuple[Row, list[float], list[Scene]]:
    """The row with the properties of the footage, the times of its frames in seconds, and its scenes."""
    times: list[float] = []
    sizes: list[tuple[int, int]] = []

    def reduce(size: tuple[int, int]) -> tuple[int, int]:
        sizes.append(size)
        return _scale_size(size, CUT_SIDE_PX / min(size)) if min(size) > CUT_SIDE_PX else size

    start = source.start_s or 0.0
    end = start + config.max_scan_s if source.end_s is None else min(source.end_s, start + config.max_scan_s)

    def read_pictures() -> Iterator[Picture]:
        for time, picture in read_frames(Path(source.path), reduce, _limits(config), start, end):
            times.append(time)
            yield picture

    scenes = find_scenes(read_pictures(), config)
    if not times:
        raise Rejected("no frames", "nothing could be decoded")
    row = replace(
        row,
        width=sizes[0][0],
        height=sizes[0][1],
        num_source_frames=len(times),
        source_fps=1 / frame_duration(times) if len(times) > 1 else None,
        scale=_cover_scale(sizes[0], config),
        cuts=[scene.first for scene in scenes[1:]],
    )
    return row, times, scenes


def _read_clip(source: Source, times: Sequence[float], config: CurateConfig) -> NDArray[np.uint8]:
    """The frames at `times`, resized to cover `config.size` and cropped to it: (T, H, W, 3)."""

    def cover(size: tuple[int, int]) -> tuple[int, int]:
        return _scale_size(size, _cover_scale(size, config), at_least=config.size)

    return read_frames_at(Path(source.path), times, cover, _limits(config), crop=config.size)


def _cover_scale(size: tuple[int, int], config: CurateConfig) -> float:
    """The factor by which footage of `size` (W, H) is resized to cover the clip."""
    return max(config.size[0] / size[0], config.size[1] / size[1])


def _limits(config: CurateConfig) -> Limits:
    return Limits(config.min_side_px, config.max_side_px)


def score(mp4s: Sequence[bytes], config: CurateConfig) -> list[float]:
    """Motion scores of encoded clips."""
    return motion_scores([decode_mp4(mp4) for mp4 in mp4s], config)


def annotate(
    clips: Sequence[tuple[Row, dict[str, bytes]]], config: CurateConfig
) -> list[tuple[Row, dict[str, bytes] | None]]:
    """Tracks and captions of clips as `scan` gives them.

    Returns:
        For each clip its row, and the files of its record by their endings (docs/data.md); None if it is rejected.
    """
    pictures = [decode_mp4(files["mp4"]) for _, files in clips]
    tracker = build_tracker(config.tracker, config.cotracker, config.cotracker_model, config.device)
    grid = grid_points(config.size, config.grid)
    tracks = [tracker.track(clip, grid) for clip in pictures]
    rows = [_add_tracks(row, tracker, *found, config) for (row, _), found in zip(clips, tracks, strict=True)]
    if config.captioner == "blip2":
        uncaptioned = [i for i, row in enumerate(rows) if row.accepted and not row.caption]
        captions = describe([pictures[i] for i in uncaptioned], config)
        for i, caption in zip(uncaptioned, captions, strict=True):
            rows[i] = replace(rows[i], caption=caption)
    return [
        (row, _build_record(row, files, *found) if row.accepted else None)
        for row, (_, files), found in zip(rows, clips, tracks, strict=True)
    ]


def _add_tracks(row: Row, tracker: Tracker, points: NDArray[np.float64], visible: NDArray, config: CurateConfig) -> Row:
    """The row with the properties of its tracks: accepted, or rejected if too little could be tracked."""
    steps = np.linalg.norm(np.diff(points, axis=1), axis=-1)
    row = replace(
        row,
        tracker=tracker.name,
        tracker_version=tracker.version,
        tracked_fraction=float(visible.mean()),
        track_length_px=float((steps * (visible[:, 1:] & visible[:, :-1])).sum(axis=1).mean()),
    )
    if visible.mean() < config.min_tracked_fraction:
        return row.reject(LOST_TRACKS, f"{visible.mean():.3f} of the points could be followed")
    return replace(row, accepted=True)


def _build_record(
    row: Row, files: dict[str, bytes], points: NDArray[np.float64], visible: NDArray[np.bool_]
) -> dict[str, bytes]:
    """The files of a clip record by their endings."""
    info = asdict(row)
    for name in ("key", "accepted", "shard", "reason", "detail", "path"):
        del info[name]
    return {**files, "tracks.npz": encode_tracks(points, visible), "json": json.dumps(info).encode()}


def grid_points(size: tuple[int, int], side: int) -> NDArray[np.float64]:
    """Centres of a side x side grid over a frame (W, H): (side^2, 2) pixels."""
    x, y = (((np.arange(side) + 0.5) * length / side - 0.5) for length in size)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


@lru_cache(maxsize=1)
def build_tracker(kind: str, repository: str, model: str, device: str | None) -> Tracker:
    """The tracker that the settings name, loaded once per process."""
    return LucasKanadeTracker() if kind == "lucas_kanade" else CoTracker(repository, model, device)


def _scale_size(size: tuple[int, int], scale: float, at_least: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    return max(at_least[0], round(size[0] * scale)), max(at_least[1], round(size[1] * scale))
