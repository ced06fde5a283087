"""The curation of a whole data set: three passes over chunks of sources, then the index and the report.

    scan      footage -> the frames of each clip, encoded      work/scanned/000000.tar
    score     clip -> motion score                             work/scores/000000.json
              all scores -> what moves least                   work/threshold.json
    annotate  clip -> tracks, caption, shard                   clips-000000.tar, work/rows/000000.jsonl

Every file appears whole and is a function of (sources, settings) alone, so that a run that was killed goes on with the
chunks that are missing and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm.auto import tqdm

from imageconductor import config as config_file
from imageconductor.curation import executors
from imageconductor.curation.curate_config import RUNNING, CurateConfig
from imageconductor.curation.executors import Failure, Workers
from imageconductor.curation.motion_score import least_moving
from imageconductor.curation.passes import Annotate, Scan, Score
from imageconductor.curation.run_folder import Run, whole
from imageconductor.curation.sources import Source, find_sources

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "source", "path", "caption")),
        *((name, pa.bool_()) for name in ("camera_only", "accepted")),
        *((name, pa.string()) for name in ("shard", "reason", "detail")),
        *((name, pa.int32()) for name in ("width", "height", "num_source_frames")),
        ("source_fps", pa.float64()),
        ("cuts", pa.list_(pa.int32())),
        *((name, pa.int32()) for name in ("first_frame", "last_frame")),
        *((name, pa.float64()) for name in ("start_s", "end_s")),
        ("interval", pa.int32()),
        *((name, pa.float64()) for name in ("fps", "motion_score")),
        *((name, pa.string()) for name in ("tracker", "tracker_version")),
        *((name, pa.float64()) for name in ("track_length_px", "tracked")),
    ]
)
"""Of the index, whose columns are the fields of `Row`."""

_ROWS_TOGETHER = 50_000


def curate(config: CurateConfig) -> Counter[str]:
    """Turns footage into shards, an index and a report; goes on where an interrupted run of the same settings was.

    Returns:
        How many were "accepted", and rejected for each reason.

    Raises:
        FileNotFoundError: There is no input.
        ValueError: The settings, the input or the output folder cannot be used; nothing is written then.
    """
    config = _resolved(config)
    sources = find_sources(config)
    run = Run(config, Path(config.output).absolute())
    digest = _digest(sources)
    _check_folder(run, digest)
    if not run.index.exists():
        _check_models(run)
    with _begun(run, sources, digest):
        if not run.index.exists():
            _pass("scan", Scan(run), run)
            _pass("score", Score(run), run)
            _pass("annotate", Annotate(run, _threshold(run)), run)
            _finish(run)
        shutil.rmtree(run.work, ignore_errors=True)
        return summary(run.index)


def summary(index: Path) -> Counter[str]:
    """Clips by what became of them."""
    table = pq.read_table(index, columns=["accepted", "reason"])
    return Counter("accepted" if row["accepted"] else row["reason"] for row in table.to_pylist())


def _digest(sources: Sequence[Source]) -> str:
    """Of all that the result depends on but the footage itself, which may move."""
    digest = hashlib.sha256()
    for source in sources:
        known = (source.id, source.caption, source.camera_only, source.start_s, source.end_s)
        digest.update(json.dumps(known).encode())
    return digest.hexdigest()


def _check_folder(run: Run, digest: str) -> None:
    """Refuses an output folder that was begun with other settings or sources, or that is not ours."""
    settings, mark = run.settings, run.mark
    if run.output.exists() and not mark.exists() and any(run.output.iterdir()):
        raise ValueError(f"output={run.output}: holds other files; name a folder that is new or empty")
    if mark.exists() and settings.exists():
        before = config_file.load(CurateConfig, settings)
        for field in dataclasses.fields(CurateConfig):
            old, new = getattr(before, field.name), getattr(run.config, field.name)
            if field.name not in (*RUNNING, "input", "output", "videos") and old != new:
                raise ValueError(
                    f"output={run.output}: was begun with {field.name}={old}, not {new}; name another folder"
                )
        if mark.read_text() not in ("", digest):
            raise ValueError(f"output={run.output}: was begun with other sources than input={run.config.input} has now")


@contextmanager
def _begun(run: Run, sources: Sequence[Source], digest: str) -> Iterator[None]:
    """Holds the output folder alone and prepares it."""
    run.output.mkdir(parents=True, exist_ok=True)
    with run.mark.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"output={run.output}: another curation is writing there") from error
        config_file.save(run.config, run.settings)
        if not run.index.exists():
            for folder in ("scanned", "scores", "rows"):
                (run.work / folder).mkdir(parents=True, exist_ok=True)
            for left in [*run.output.glob(".*.tmp"), *run.work.rglob(".*.tmp")]:
                left.unlink()
            run.write_sources(sources)
        run.mark.write_text(digest)
        yield


def _pass(name: str, chunks: Scan | Score | Annotate, run: Run) -> None:
    """One pass over the chunks that are not done, with a progress bar."""
    sizes = [chunks.num_clips(chunk) for chunk in range(run.num_chunks)]
    todo = [chunk for chunk in range(run.num_chunks) if not chunks.is_done(chunk)]
    left = sum(sizes[chunk] for chunk in todo)
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    with tqdm(total=sum(sizes), initial=sum(sizes) - left, desc=f"{name:>8}", unit="clip", dynamic_ncols=True) as bar:

        def tick(what: str) -> None:
            with lock:
                counts[what] += 1
                bar.update()
                shown = {key: counts[key] for key in ("accepted", "rejected", "failed") if counts[key]}
                bar.set_postfix(shown, refresh=False)

        if todo:
            executors.run(chunks, todo, tick)


def _threshold(run: Run) -> tuple[float, str] | None:
    """The highest (score, key) that is dropped, over the whole data set."""
    if not run.threshold.exists():
        scores: list[NDArray[np.float64]] = []
        keys: list[NDArray[np.bytes_]] = []
        for chunk in range(run.num_chunks):
            found = json.loads(run.scores(chunk).read_text())
            kept = {key: value for key, value in found.items() if not isinstance(value, dict)}
            scores.append(np.array(list(kept.values()), np.float64))
            keys.append(np.array(list(kept), "S16"))
        with whole(run.threshold) as file:
            lowest = least_moving(np.concatenate(scores), np.concatenate(keys), run.config.drop_fraction)
            file.write(json.dumps(lowest).encode())
    found = json.loads(run.threshold.read_text())
    return None if found is None else (found[0], found[1])


def _finish(run: Run) -> None:
    """The report, then the index, which says that all is there."""
    from imageconductor.curation.curation_report import write_report

    table = run.output / ".index.parquet.tmp"
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(table, SCHEMA) as writer:
        for chunk in range(run.num_chunks):
            waiting += [json.loads(line) for line in run.rows(chunk).read_text().splitlines()]
            if len(waiting) >= _ROWS_TOGETHER or chunk == run.num_chunks - 1:
                writer.write_table(pa.Table.from_pylist(waiting, schema=SCHEMA))
                waiting.clear()
    with whole(run.output / "report.html") as file:
        file.write(write_report(table, run).encode())
    table.rename(run.index)


def _check_models(run: Run) -> None:
    """Loads, in a process of their own, the networks that the settings ask for, before anything depends on them."""
    if run.config.tracker == "cotracker":
        logger.warning("CoTracker's weights are CC-BY-NC: clips that it annotates are not for commercial use")
    for chunks in (Score(run), Annotate(run, None)):
        if chunks.uses_networks:
            with Workers(1, 3600.0) as workers:
                for result in workers.map(chunks.prepare, [()]):
                    if isinstance(result, Failure):
                        raise ValueError(result.detail)


def _resolved(config: CurateConfig) -> CurateConfig:
    """With absolute paths: a cluster's processes start elsewhere."""
    local = {name: getattr(config, name) for name in ("cotracker", "blip2")}
    local = {name: path for name, path in local.items() if Path(path).exists()}
    files = {name: getattr(config, name) for name in ("input", "output", "videos", "raft_weights")} | local
    return replace(config, **{name: str(Path(path).absolute()) for name, path in files.items() if path is not None})
