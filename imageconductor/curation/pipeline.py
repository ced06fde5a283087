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
import io
import itertools
import json
import logging
import os
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm.auto import tqdm

from imageconductor import config as config_file
from imageconductor.curation import executors
from imageconductor.curation.captions import blip2
from imageconductor.curation.config import RUNNING, CurateConfig
from imageconductor.curation.executors import Failure, Tick, Workers
from imageconductor.curation.motion import least_moving, raft
from imageconductor.curation.sources import Source, find_sources
from imageconductor.curation.steps import Row, annotate, scan, score, tracker_of

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

_STILL, _SLOW = "still", "moves least"
_ROWS_TOGETHER = 50_000


@dataclass(frozen=True)
class Run:
    """An output folder, and where things are in it."""

    config: CurateConfig
    output: Path

    @property
    def work(self) -> Path:
        """What is deleted at the end."""
        return self.output / "work"

    def scanned(self, chunk: int) -> Path:
        """Clips before it is known which are taken, and the rows of all."""
        return self.work / "scanned" / f"{chunk:06d}.tar"

    def scores(self, chunk: int) -> Path:
        """Motion scores by key, and failures."""
        return self.work / "scores" / f"{chunk:06d}.json"

    def rows(self, chunk: int) -> Path:
        """Lines of the index; written last, when the chunk's shard is there."""
        return self.work / "rows" / f"{chunk:06d}.jsonl"

    def shard(self, chunk: int) -> Path:
        """The accepted clips, if there are any."""
        return self.output / f"clips-{chunk:06d}.tar"

    @property
    def threshold(self) -> Path:
        """The (score, key) up to which clips are dropped."""
        return self.work / "threshold.json"

    @property
    def index(self) -> Path:
        """A row for each source; the run is finished when it is there."""
        return self.output / "index.parquet"

    @property
    def settings(self) -> Path:
        """What the folder was begun with."""
        return self.output / "config.yaml"

    @property
    def mark(self) -> Path:
        """Digest of the sources it was begun with; locked while somebody works."""
        return self.output / ".sources"

    def write_sources(self, sources: Sequence[Source]) -> None:
        """A line for each source, and where the lines of each chunk begin."""
        starts = []
        with _whole(self.work / "sources.jsonl") as file:
            for number, source in enumerate(sources):
                if number % self.config.clips_per_shard == 0:
                    starts.append(file.tell())
                file.write(json.dumps(asdict(source)).encode() + b"\n")
        with _whole(self.work / "sources.npy") as file:
            np.save(file, np.array(starts))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.load(self.work / "sources.npy")

    @property
    def num_chunks(self) -> int:
        """Chunks, some of which may give no shard."""
        return len(self._starts)

    def sources(self, chunk: int) -> list[Source]:
        """Those of a chunk."""
        with (self.work / "sources.jsonl").open("rb") as file:
            file.seek(int(self._starts[chunk]))
            lines = itertools.islice(file, self.config.clips_per_shard)
            return [Source(**json.loads(line)) for line in lines]

    def num_clips(self, chunk: int) -> int:
        """Clips that the scan of a chunk gave."""
        return int(self.clips(chunk).read_text())

    def clips(self, chunk: int) -> Path:
        """Their number."""
        return self.work / "scanned" / f"{chunk:06d}.count"


@dataclass(frozen=True)
class Scan:
    """First pass."""

    run: Run

    @property
    def config(self) -> CurateConfig:
        """See `Chunks`."""
        return self.run.config

    @property
    def uses_networks(self) -> bool:
        """See `Chunks`."""
        return False

    def prepare(self) -> None:
        """See `Chunks`."""

    def num_clips(self, chunk: int) -> int:
        """Of a chunk, that are ticked."""
        return len(self.run.sources(chunk))

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk's file is there."""
        return self.run.scanned(chunk).exists()

    def work(self, chunk: int, workers: Workers, tick: Tick) -> None:
        """See `Chunks`."""
        sources, clips = self.run.sources(chunk), 0
        with _whole(self.run.scanned(chunk)) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for source, result in zip(sources, workers.map(scan, [(s, self.run.config) for s in sources]), strict=True):
                row, mp4 = (_failed(Row.of(source), result), None) if isinstance(result, Failure) else result
                if mp4 is not None:
                    _add(tar, f"{row.key}.mp4", mp4)
                    clips += 1
                _add(tar, f"{row.key}.json", json.dumps(asdict(row)).encode())
                tick("failed" if isinstance(result, Failure) else "rejected" if row.reason else "done")
            with _whole(self.run.clips(chunk)) as count:
                count.write(str(clips).encode())


@dataclass(frozen=True)
class Score:
    """Second pass: cheap, but for RAFT."""

    run: Run

    @property
    def config(self) -> CurateConfig:
        """See `Chunks`."""
        return self.run.config

    @property
    def uses_networks(self) -> bool:
        """See `Chunks`."""
        return self.config.flow == "raft"

    def prepare(self) -> None:
        """See `Chunks`."""
        if self.uses_networks:
            raft(str(self.config.raft_weights), self.config.device)

    def num_clips(self, chunk: int) -> int:
        """Of a chunk, that are ticked."""
        return self.run.num_clips(chunk)

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk's file is there."""
        return self.run.scores(chunk).exists()

    def work(self, chunk: int, workers: Workers, tick: Tick) -> None:
        """See `Chunks`."""
        clips = [(row.key, mp4) for row, mp4 in _scanned(self.run.scanned(chunk)) if mp4 is not None]
        results = workers.map(score, [(mp4, self.run.config) for _, mp4 in clips])
        scores: dict[str, Any] = {}
        for (key, _), result in zip(clips, results, strict=True):
            scores[key] = asdict(result) if isinstance(result, Failure) else result
            tick("failed" if isinstance(result, Failure) else "done")
        with _whole(self.run.scores(chunk)) as file:
            file.write(json.dumps(scores).encode())


@dataclass(frozen=True)
class Annotate:
    """Last pass: of the clips that move enough."""

    run: Run
    threshold: tuple[float, str] | None  # the highest (score, key) that is dropped

    @property
    def config(self) -> CurateConfig:
        """See `Chunks`."""
        return self.run.config

    @property
    def uses_networks(self) -> bool:
        """See `Chunks`."""
        return self.config.tracker == "cotracker" or self.config.captioner != "none"

    def prepare(self) -> None:
        """See `Chunks`."""
        config = self.config
        tracker_of(config.tracker, config.cotracker, config.cotracker_model, config.device)
        if config.captioner == "blip2":
            blip2(config.blip2, config.device)

    def num_clips(self, chunk: int) -> int:
        """Of a chunk, that are ticked."""
        return self.run.num_clips(chunk)

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk's rows are there."""
        return self.run.rows(chunk).exists()

    def work(self, chunk: int, workers: Workers, tick: Tick) -> None:
        """See `Chunks`."""
        scores = json.loads(self.run.scores(chunk).read_text())
        rows: dict[str, Row] = {}
        taken: list[tuple[Row, bytes]] = []
        for row, mp4 in _scanned(self.run.scanned(chunk)):
            rows[row.key] = row if mp4 is None else self._judged(row, scores[row.key])
            if mp4 is not None and rows[row.key].reason is None:
                taken.append((rows[row.key], mp4))
            elif mp4 is not None:
                tick("rejected")
        shard, files = self.run.shard(chunk), 0
        with _whole(shard, keep=lambda: files > 0) as file, tarfile.open(fileobj=file, mode="w") as tar:
            results = workers.map(annotate, [(row, mp4, self.run.config) for row, mp4 in taken])
            for (row, _), result in zip(taken, results, strict=True):
                failed = isinstance(result, Failure)
                row, record = (_failed(row, result), None) if failed else result
                if record is not None:
                    row = replace(row, shard=shard.name)
                    for ending, content in record.items():
                        _add(tar, f"{row.key}.{ending}", content)
                        files += 1
                rows[row.key] = row
                tick("failed" if failed else "accepted" if row.accepted else "rejected")
        with _whole(self.run.rows(chunk)) as file:
            file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows.values()).encode())

    def _judged(self, row: Row, found: Any) -> Row:
        if isinstance(found, dict):
            return _failed(row, Failure(**found))
        row = replace(row, motion_score=found)
        if found < self.run.config.min_motion:
            return row.rejected(_STILL, f"motion score {found:.2f}")
        if self.threshold is not None and (found, row.key) <= self.threshold:
            return row.rejected(_SLOW, f"motion score {found:.2f}")
        return row


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
        with _whole(run.threshold) as file:
            lowest = least_moving(np.concatenate(scores), np.concatenate(keys), run.config.drop_share)
            file.write(json.dumps(lowest).encode())
    found = json.loads(run.threshold.read_text())
    return None if found is None else (found[0], found[1])


def _finish(run: Run) -> None:
    """The report, then the index, which says that all is there."""
    from imageconductor.curation.report import write_report

    table = run.output / ".index.parquet.tmp"
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(table, SCHEMA) as writer:
        for chunk in range(run.num_chunks):
            waiting += [json.loads(line) for line in run.rows(chunk).read_text().splitlines()]
            if len(waiting) >= _ROWS_TOGETHER or chunk == run.num_chunks - 1:
                writer.write_table(pa.Table.from_pylist(waiting, schema=SCHEMA))
                waiting.clear()
    with _whole(run.output / "report.html") as file:
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


def _failed(row: Row, failure: Failure) -> Row:
    return row.rejected(failure.reason, failure.detail)


def _scanned(path: Path) -> Iterator[tuple[Row, bytes | None]]:
    """Rows of a chunk and their clips, in order."""
    mp4: bytes | None = None
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            content = file.read() if file else b""
            if member.name.endswith(".mp4"):
                mp4 = content
            else:
                yield Row(**json.loads(content)), mp4
                mp4 = None


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # Without time and owner: the same clip gives the same shard.
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@contextmanager
def _whole(path: Path, keep: Callable[[], bool] = lambda: True) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it is complete, if `keep` then says so."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep():
            temporary.replace(path)
        else:
            path.unlink(missing_ok=True)  # An attempt before this one may have left it.
    finally:
        temporary.unlink(missing_ok=True)
