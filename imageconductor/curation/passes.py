"""The three passes over chunks of sources. Each reads a chunk's files of the previous pass and writes its own."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from imageconductor.curation.captions import load_blip2
from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.executors import Failure, Tick, Workers
from imageconductor.curation.footage import MISSING, encode_mp4
from imageconductor.curation.motion_score import load_raft
from imageconductor.curation.run_folder import Outcomes, Run
from imageconductor.curation.sources import Source
from imageconductor.curation.steps import Row, annotate, build_tracker, scan, score
from imageconductor.data.clip_index import write_index
from imageconductor.files import atomic_path, write_text

_STILL, _SLOW = "still", "moves least"
_Note = Callable[[str | Failure], None]
"""Called once for each clip that is tried, with its outcome as `Tick`, or its failure."""


@dataclass(frozen=True)
class Pass:
    """Base of the passes: the common part of an `executors.ChunkPass`."""

    folder: ClassVar[str]  # of its files in `Run.work`
    run: Run

    @property
    def config(self) -> CurateConfig:
        """Settings of the curation."""
        return self.run.config

    @property
    def uses_networks(self) -> bool:
        """Whether the pass evaluates networks."""
        return False

    @property
    def batch_size(self) -> int:
        """Number of clips that a process takes at a time."""
        return self.config.batch_size if self.uses_networks else 1

    def prepare(self) -> None:
        """Loads the networks into the current process."""

    def try_out(self) -> None:
        """Works on a batch of a made-up clip: networks that can be loaded may still fail with clips of this size."""

    def num_clips(self, chunk: int) -> int:
        """Number of clips in a chunk, for the progress bar."""
        return self.run.num_clips(chunk)

    def is_done(self, chunk: int) -> bool:
        """Whether the pass has worked on the chunk."""
        return self.run.outcomes(self.folder, chunk).exists()

    def work(self, chunk: int, workers: Workers, tick: Tick) -> None:
        """Works on the clips of a chunk and writes the chunk's files."""
        failures: list[Failure] = []
        num_done = 0

        def note(outcome: str | Failure) -> None:
            nonlocal num_done
            if isinstance(outcome, Failure):
                failures.append(outcome)
                tick("failed")
            else:
                num_done += 1
                tick(outcome)

        self._work(chunk, workers, note, tick)
        example = f"{failures[0].reason}: {failures[0].detail}" if failures else ""
        outcomes = Outcomes(num_done, len(failures), example)
        write_text(self.run.outcomes(self.folder, chunk), json.dumps(asdict(outcomes)))

    def _work(self, chunk: int, workers: Workers, note: _Note, tick: Tick) -> None:
        """As `work`, without the outcomes; `tick` is for clips that are rejected untried."""
        raise NotImplementedError


@dataclass(frozen=True)
class Scan(Pass):
    """First pass: finds the cuts of each source and encodes the frames of its clip.

    Attributes:
        witness: Footage that was there at the start; where others are missing, it tells whether all of it is gone.
    """

    folder: ClassVar[str] = "scanned"
    witness: Path

    def num_clips(self, chunk: int) -> int:
        """Number of sources in a chunk, for the progress bar."""
        return len(self.run.sources(chunk))

    def _work(self, chunk: int, workers: Workers, note: _Note, tick: Tick) -> None:
        sources, is_any_missing = self.run.sources(chunk), False
        with atomic_path(self.run.scanned_clips(chunk)) as path, tarfile.open(path, "w") as tar:
            for source, result in zip(sources, workers.map(scan, [(s, self.config) for s in sources]), strict=True):
                has_failed = isinstance(result, Failure)
                row, files = (_reject_failure(Row.from_source(source), result), {}) if has_failed else result
                for ending, content in files.items():
                    _add_member(tar, f"{row.key}.{ending}", content)
                _add_member(tar, f"{row.key}.json", json.dumps(asdict(row)).encode())
                is_any_missing |= row.reason == MISSING
                if has_failed or files:
                    note(result if has_failed else "done")
                else:
                    tick("rejected")
            if is_any_missing and not self.witness.exists():
                raise RuntimeError(f"{self.witness}: was there at the start and is gone, as other footage is")


@dataclass(frozen=True)
class Score(Pass):
    """Second pass: computes the motion score of each clip."""

    folder: ClassVar[str] = "scores"

    @property
    def uses_networks(self) -> bool:
        """Whether RAFT computes the optical flow."""
        return self.config.flow == "raft"

    def prepare(self) -> None:
        """Loads RAFT if it is used."""
        if self.uses_networks:
            load_raft(str(self.config.raft_weights), self.config.device)

    def try_out(self) -> None:
        """Scores a made-up clip."""
        score([_make_up_clip(self.config)] * self.batch_size, self.config)

    def _work(self, chunk: int, workers: Workers, note: _Note, tick: Tick) -> None:  # noqa: ARG002 - as the base
        scanned = _read_scanned(self.run.scanned_clips(chunk))
        clips = [(row.key, files["mp4"]) for row, files in scanned if files]
        results = workers.map_batches(score, [mp4 for _, mp4 in clips], self.config, size=self.batch_size)
        scores: dict[str, Any] = {}
        for (key, _), result in zip(clips, results, strict=True):
            has_failed = isinstance(result, Failure)
            scores[key] = asdict(result) if has_failed else result
            note(result if has_failed else "done")
        write_text(self.run.scores(chunk), json.dumps(scores))


@dataclass(frozen=True)
class Annotate(Pass):
    """Third pass: drops clips with little motion, gives the others tracks and captions, and writes the shards."""

    folder: ClassVar[str] = "rows"
    threshold: tuple[float, str] | None  # the highest (score, key) that is dropped

    @property
    def uses_networks(self) -> bool:
        """Whether CoTracker or BLIP-2 is used."""
        return self.config.tracker == "cotracker" or self.config.captioner != "none"

    def prepare(self) -> None:
        """Builds the tracker and loads BLIP-2 if it is used."""
        config = self.config
        build_tracker(config.tracker, config.cotracker, config.cotracker_model, config.device)
        if config.captioner == "blip2":
            load_blip2(config.blip2, config.device)

    def try_out(self) -> None:
        """Tracks and describes a made-up clip, whether or not its points are lost."""
        row = Row.from_source(Source("made up", ""))
        clips = [(row, {"mp4": _make_up_clip(self.config)})] * self.batch_size
        annotate(clips, replace(self.config, min_tracked_fraction=0.0))

    def _work(self, chunk: int, workers: Workers, note: _Note, tick: Tick) -> None:
        rows, taken = self._filter_by_motion(chunk, tick)
        shard, num_accepted = self.run.shard(chunk), 0
        with atomic_path(shard) as path:
            with tarfile.open(path, "w") as tar:
                results = workers.map_batches(annotate, taken, self.config, size=self.batch_size)
                for (row, _), result in zip(taken, results, strict=True):
                    has_failed = isinstance(result, Failure)
                    row, record = (_reject_failure(row, result), None) if has_failed else result
                    if record is not None:
                        row = replace(row, shard=shard.name)
                        for ending, content in record.items():
                            _add_member(tar, f"{row.key}.{ending}", content)
                        num_accepted += 1
                    rows[row.key] = row
                    note(result if has_failed else "accepted" if row.accepted else "rejected")
            if not num_accepted:
                path.unlink()
        if num_accepted:
            write_index(shard)
        write_text(self.run.rows(chunk), "".join(json.dumps(asdict(row)) + "\n" for row in rows.values()))

    def _filter_by_motion(self, chunk: int, tick: Tick) -> tuple[dict[str, Row], list[tuple[Row, dict[str, bytes]]]]:
        """The rows of a chunk by key, and row and files of the clips that move enough."""
        scores = json.loads(self.run.scores(chunk).read_text())
        rows: dict[str, Row] = {}
        taken: list[tuple[Row, dict[str, bytes]]] = []
        for row, files in _read_scanned(self.run.scanned_clips(chunk)):
            rows[row.key] = self._apply_score(row, scores[row.key]) if files else row
            if files and rows[row.key].reason is None:
                taken.append((rows[row.key], files))
            elif files:
                tick("rejected")
        return rows, taken

    def _apply_score(self, row: Row, found: Any) -> Row:
        """The row with its motion score, rejected if the clip could not be scored or moves too little."""
        if isinstance(found, dict):
            return _reject_failure(row, Failure(**found))
        row = replace(row, motion_score=found)
        if found < self.config.min_motion:
            return row.reject(_STILL, f"motion score {found:.2f}")
        if self.threshold is not None and (found, row.key) <= self.threshold:
            return row.reject(_SLOW, f"motion score {found:.2f}")
        return row


def _make_up_clip(config: CurateConfig) -> bytes:
    """An encoded clip of noise that stands still."""
    width, height = config.size
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return encode_mp4(np.stack([picture] * config.num_frames), 25.0)


def _reject_failure(row: Row, failure: Failure) -> Row:
    return row.reject(failure.reason, failure.detail)


def _read_scanned(path: Path) -> Iterator[tuple[Row, dict[str, bytes]]]:
    """The rows of a scanned chunk in order, each with the files of its clip by their endings, if it has one."""
    files: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            content = file.read() if file else b""
            ending = member.name.partition(".")[2]  # A key is hexadecimal digits.
            if ending != "json":
                files[ending] = content
            else:
                yield Row(**json.loads(content)), files
                files = {}


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file without time and owner, so that equal clips give equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
