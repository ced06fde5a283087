"""The three passes over chunks of sources. Each writes a file a chunk, which is all that the next one needs."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from imageconductor.curation.captions import blip2
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.executors import Failure, Tick, Workers
from imageconductor.curation.motion_score import raft
from imageconductor.curation.run_folder import Run, whole
from imageconductor.curation.steps import Row, annotate, build_tracker, scan, score

_STILL, _SLOW = "still", "moves least"


@dataclass(frozen=True)
class _Pass:
    """What the passes share; `Chunks` says what each is for."""

    run: Run

    @property
    def config(self) -> CurateConfig:
        """See `Chunks`."""
        return self.run.config

    @property
    def uses_networks(self) -> bool:
        """See `Chunks`."""
        return False

    @property
    def batch_size(self) -> int:
        """Clips that a process takes at a time."""
        return self.config.batch_size if self.uses_networks else 1

    def prepare(self) -> None:
        """See `Chunks`."""

    def num_clips(self, chunk: int) -> int:
        """Of a chunk, that are ticked."""
        return self.run.num_clips(chunk)


@dataclass(frozen=True)
class Scan(_Pass):
    """First pass."""

    def num_clips(self, chunk: int) -> int:
        """Of a chunk, that are ticked."""
        return len(self.run.sources(chunk))

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk's file is there."""
        return self.run.scanned(chunk).exists()

    def work(self, chunk: int, workers: Workers, tick: Tick) -> None:
        """See `Chunks`."""
        sources, clips = self.run.sources(chunk), 0
        with whole(self.run.scanned(chunk)) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for source, result in zip(sources, workers.map(scan, [(s, self.config) for s in sources]), strict=True):
                row, mp4 = (_failed(Row.of(source), result), None) if isinstance(result, Failure) else result
                if mp4 is not None:
                    _add(tar, f"{row.key}.mp4", mp4)
                    clips += 1
                _add(tar, f"{row.key}.json", json.dumps(asdict(row)).encode())
                tick("failed" if isinstance(result, Failure) else "rejected" if row.reason else "done")
            with whole(self.run.clips(chunk)) as count:
                count.write(str(clips).encode())


@dataclass(frozen=True)
class Score(_Pass):
    """Second pass: cheap, but for RAFT."""

    @property
    def uses_networks(self) -> bool:
        """See `Chunks`."""
        return self.config.flow == "raft"

    def prepare(self) -> None:
        """See `Chunks`."""
        if self.uses_networks:
            raft(str(self.config.raft_weights), self.config.device)

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk's file is there."""
        return self.run.scores(chunk).exists()

    def work(self, chunk: int, workers: Workers, tick: Tick) -> None:
        """See `Chunks`."""
        clips = [(row.key, mp4) for row, mp4 in _scanned(self.run.scanned(chunk)) if mp4 is not None]
        results = workers.map_batches(score, [mp4 for _, mp4 in clips], self.config, size=self.batch_size)
        scores: dict[str, Any] = {}
        for (key, _), result in zip(clips, results, strict=True):
            scores[key] = asdict(result) if isinstance(result, Failure) else result
            tick("failed" if isinstance(result, Failure) else "done")
        with whole(self.run.scores(chunk)) as file:
            file.write(json.dumps(scores).encode())


@dataclass(frozen=True)
class Annotate(_Pass):
    """Last pass: of the clips that move enough."""

    threshold: tuple[float, str] | None  # the highest (score, key) that is dropped

    @property
    def uses_networks(self) -> bool:
        """See `Chunks`."""
        return self.config.tracker == "cotracker" or self.config.captioner != "none"

    def prepare(self) -> None:
        """See `Chunks`."""
        config = self.config
        build_tracker(config.tracker, config.cotracker, config.cotracker_model, config.device)
        if config.captioner == "blip2":
            blip2(config.blip2, config.device)

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
        with whole(shard, keep=lambda: files > 0) as file, tarfile.open(fileobj=file, mode="w") as tar:
            results = workers.map_batches(annotate, taken, self.config, size=self.batch_size)
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
        with whole(self.run.rows(chunk)) as file:
            file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows.values()).encode())

    def _judged(self, row: Row, found: Any) -> Row:
        if isinstance(found, dict):
            return _failed(row, Failure(**found))
        row = replace(row, motion_score=found)
        if found < self.config.min_motion:
            return row.rejected(_STILL, f"motion score {found:.2f}")
        if self.threshold is not None and (found, row.key) <= self.threshold:
            return row.rejected(_SLOW, f"motion score {found:.2f}")
        return row


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
