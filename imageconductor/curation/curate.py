"""The curation of a data set: three passes over chunks of sources, then the index and the report.

    scan      footage -> the frames of each clip, encoded      work/scanned/000000.tar
    score     clip -> motion score                             work/scores/000000.json
              all scores -> threshold of the motion filter     work/threshold.json
    annotate  clip -> tracks, caption, shard                   clips-000000.tar, work/rows/000000.jsonl

`000000.outcomes.json` beside a chunk's file says that the chunk is done, and how many of its clips failed.

Every file is written atomically and depends on the sources and settings alone. A run that was killed therefore
continues with the missing chunks and ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
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
from imageconductor.curation.curate_config import EXECUTION_FIELDS, CurateConfig, check_unused, select_result_settings
from imageconductor.curation.detections import check_detections, find_detections
from imageconductor.curation.executors import Failure, Workers
from imageconductor.curation.motion_score import motion_threshold
from imageconductor.curation.passes import Annotate, Pass, Scan, Score
from imageconductor.curation.run_folder import Run
from imageconductor.curation.sources import Source, find_sources
from imageconductor.files import atomic_path, check_writable, lock, remove_partial, write_text

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "source", "path", "caption")),
        *((name, pa.bool_()) for name in ("camera_only", "accepted")),
        *((name, pa.string()) for name in ("shard", "reason", "detail")),
        *((name, pa.int32()) for name in ("width", "height", "num_source_frames")),
        *((name, pa.float64()) for name in ("source_fps", "scale")),
        ("cuts", pa.list_(pa.int32())),
        *((name, pa.int32()) for name in ("first_frame", "last_frame")),
        *((name, pa.float64()) for name in ("start_s", "end_s")),
        ("interval", pa.int32()),
        *((name, pa.float64()) for name in ("fps", "motion_score")),
        *((name, pa.string()) for name in ("tracker", "tracker_version")),
        *((name, pa.float64()) for name in ("track_length_px", "tracked_fraction")),
        ("num_objects", pa.int32()),
    ]
)
"""Schema of the index, whose columns are the fields of `Row`."""

_ROWS_PER_GROUP = 50_000


def curate(config: CurateConfig) -> Counter[str]:
    """Turns footage into shards, an index and a report; continues an interrupted run of the same settings.

    Returns:
        Number of sources that were "accepted", and that were rejected for each reason.

    Raises:
        FileNotFoundError: The input is missing or empty.
        ValueError: The settings, the input or the output folder cannot be used; nothing has been written then.
        RuntimeError: The machine is at fault; once that is solved, the run can be continued.
    """
    from imageconductor.curation.curation_report import count_outcomes

    check_unused(config)
    config = _resolve_paths(config)
    check_writable(Path(config.output))
    sources = find_sources(config)
    _check_boxes(config, sources)
    run = Run(config, Path(config.output).absolute())
    digest = _hash_sources(sources)
    _check_folder(run, digest)
    witness = None if run.index.exists() else _find_footage(config, sources)
    if witness is not None:
        _check_models(run)
    with _lock_output(run, sources, digest):
        if witness is not None and not run.index.exists():
            _run_pass("scan", Scan(run, witness), run)
            _run_pass("score", Score(run), run)
            _run_pass("annotate", Annotate(run, _find_threshold(run)), run)
            _write_results(run)
        shutil.rmtree(run.work, ignore_errors=True)
        return count_outcomes(pq.read_table(run.index, columns=["reason"]))


def _find_footage(config: CurateConfig, sources: Sequence[Source]) -> Path:
    """The first footage that is there: without any, a disk that is not mounted would look like a finished run.

    Raises:
        FileNotFoundError: There is none.
    """
    for source in sources:
        if (path := Path(source.path)).exists():
            return path
    where = f"input={config.input}" if config.videos is None else f"videos={config.videos}"
    raise FileNotFoundError(f"{where}: the footage of no source is there, such as {sources[0].path}")


def _check_boxes(config: CurateConfig, sources: Sequence[Source]) -> None:
    """Makes sure that boxes are known of some source and can be read, if a folder of them is named.

    Raises:
        FileNotFoundError: They are of none.
        ValueError: The first file of them is malformed; the others probably are so too.
    """
    if not config.boxes:
        return
    for source in sources:
        if path := find_detections(config.boxes, source.id):
            check_detections(path)
            return
    example = Path(config.boxes) / f"{sources[0].id}.json"
    raise FileNotFoundError(f"boxes={config.boxes}: holds no file for any source, such as {example}")


def _hash_sources(sources: Sequence[Source]) -> str:
    """SHA-256 of all properties of the sources that affect the result; paths do not, so footage may move."""
    digest = hashlib.sha256()
    for source in sources:
        known = (source.id, source.caption, source.camera_only, source.start_s, source.end_s)
        digest.update(json.dumps(known).encode())
    return digest.hexdigest()


def _check_folder(run: Run, digest: str) -> None:
    """Refuses an output folder that was begun with other settings or sources, or that holds other files.

    Raises:
        ValueError: The folder is refused.
    """
    place = f"output={run.output}"
    if not run.source_digest.exists():
        if run.output.exists() and any(run.output.iterdir()):
            raise ValueError(f"{place}: holds other files; name a folder that is new or empty")
        return
    if not run.settings.exists():
        return
    # How the run was executed before does not matter, not even whether it can be so today.
    execution = {name: getattr(run.config, name) for name in EXECUTION_FIELDS}
    overrides = [f"{name}={'null' if value is None else value}" for name, value in execution.items()]
    try:
        before = config_file.load(CurateConfig, run.settings, overrides)
    except ValueError as error:
        raise ValueError(
            f"{place}: was begun with an earlier version whose settings have other names; name another folder ({error})"
        ) from error
    old, new = select_result_settings(before), select_result_settings(run.config)
    for name in old:
        if name not in new or old[name] != new[name]:
            raise ValueError(
                f"{place}: was begun with {name}={getattr(before, name)}, not {getattr(run.config, name)}; "
                "name another folder"
            )
    if run.source_digest.read_text() not in ("", digest):
        raise ValueError(f"{place}: was begun with other sources than input={run.config.input} has now")


@contextmanager
def _lock_output(run: Run, sources: Sequence[Source], digest: str) -> Iterator[None]:
    """Locks the output folder, so that no other process curates into it, and prepares it."""
    with lock(run.source_digest):
        config_file.save(run.config, run.settings)
        if not run.index.exists():
            for folder in ("scanned", "scores", "rows"):
                (run.work / folder).mkdir(parents=True, exist_ok=True)
            remove_partial(run.output)
            run.write_sources(sources)
        run.source_digest.write_text(digest)
        yield


def _run_pass(name: str, chunk_pass: Pass, run: Run) -> None:
    """Runs a pass over its missing chunks, with a progress bar.

    Raises:
        RuntimeError: As `executors.run`, or most clips failed; their chunks are missing again.
    """
    sizes = [chunk_pass.num_clips(chunk) for chunk in range(run.num_chunks)]
    todo = [chunk for chunk in range(run.num_chunks) if not chunk_pass.is_done(chunk)]
    remaining = sum(sizes[chunk] for chunk in todo)
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    done = sum(sizes) - remaining
    with tqdm(total=sum(sizes), initial=done, desc=f"{name:>8}", unit="clip", dynamic_ncols=True) as bar:

        def tick(outcome: str) -> None:
            with lock:
                counts[outcome] += 1
                bar.update()
                shown = {key: counts[key] for key in ("accepted", "rejected", "failed") if counts[key]}
                bar.set_postfix(shown, refresh=False)

        if todo:
            executors.run(chunk_pass, todo, tick)
    outcomes = [run.read_outcomes(chunk_pass.folder, chunk) for chunk in range(run.num_chunks)]
    num_failed, num_done = sum(one.num_failed for one in outcomes), sum(one.num_done for one in outcomes)
    if num_failed > num_done:
        failed = [chunk for chunk, one in enumerate(outcomes) if one.num_failed]
        for chunk in failed:
            run.outcomes(chunk_pass.folder, chunk).unlink()
        example = outcomes[failed[0]].example
        raise RuntimeError(
            f"{name}: {num_failed} of {num_failed + num_done} clips failed, the first with {example}; mend the cause "
            "and start the same command again, which does these anew"
        )


def _find_threshold(run: Run) -> tuple[float, str] | None:
    """The highest (score, key) that is dropped, over the whole data set; None if no clip is."""
    if not run.threshold.exists():
        scores: list[NDArray[np.float64]] = []
        keys: list[NDArray[np.bytes_]] = []
        for chunk in range(run.num_chunks):
            found = json.loads(run.scores(chunk).read_text())
            kept = {key: value for key, value in found.items() if not isinstance(value, dict)}
            scores.append(np.array(list(kept.values()), np.float64))
            keys.append(np.array(list(kept), "S16"))
        threshold = motion_threshold(np.concatenate(scores), np.concatenate(keys), run.config.drop_fraction)
        write_text(run.threshold, json.dumps(threshold))
    found = json.loads(run.threshold.read_text())
    return None if found is None else (found[0], found[1])


def _write_results(run: Run) -> None:
    """Writes the report, then the index, whose presence marks a finished run."""
    from imageconductor.curation.curation_report import render_report

    with atomic_path(run.index) as index:
        group: list[dict[str, Any]] = []
        with pq.ParquetWriter(index, SCHEMA) as writer:
            for chunk in range(run.num_chunks):
                group += [json.loads(line) for line in run.rows(chunk).read_text().splitlines()]
                if len(group) >= _ROWS_PER_GROUP or chunk == run.num_chunks - 1:
                    writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
                    group.clear()
        write_text(run.output / "report.html", render_report(index, run))


def _check_models(run: Run) -> None:
    """Tries the networks that the settings name, in a process of their own, to find mistakes before any work is done.

    Raises:
        ValueError: A network cannot be loaded, or fails.
    """
    if run.config.tracker == "cotracker":
        logger.warning("CoTracker's weights are CC-BY-NC: clips that it annotates are not for commercial use")
    if run.config.captioner == "blip2" and re.search(r"(?<![a-z])opt(?![a-z])", Path(run.config.blip2).name.lower()):
        logger.warning("BLIP-2 with OPT carries OPT's non-commercial licence, which may bind the use of its captions")
    for name, chunk_pass in (("score", Score(run)), ("annotate", Annotate(run, None))):
        if chunk_pass.uses_networks:
            with Workers(1, 3600.0) as workers:
                for result in workers.map(chunk_pass.try_out, [()]):
                    if isinstance(result, Failure):
                        tried = f"{name}, on a trial of batch_size={chunk_pass.batch_size} clips"
                        raise ValueError(f"{tried}: {result.detail}")


def _resolve_paths(config: CurateConfig) -> CurateConfig:
    """The settings with absolute paths, since a cluster's processes start in another folder."""
    local = {name: getattr(config, name) for name in ("cotracker", "blip2")}
    local = {name: path for name, path in local.items() if Path(path).exists()}
    named = ("input", "output", "videos", "raft_weights", "boxes")
    files = {name: getattr(config, name) for name in named} | local
    return replace(config, **{name: str(Path(path).absolute()) for name, path in files.items() if path is not None})
