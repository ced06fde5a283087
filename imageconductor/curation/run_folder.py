"""The output folder of a curation: paths of its files, and the list of sources by chunk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.sources import Source
from imageconductor.files import atomic_write


@dataclass(frozen=True)
class Outcomes:
    """What became of the clips of a chunk that a pass tried.

    Attributes:
        num_done, num_failed: Their numbers; a failure is no property of the footage, unlike a rejection.
        example: One of the failures; empty if there is none.
    """

    num_done: int
    num_failed: int
    example: str


@dataclass(frozen=True)
class Run:
    """One curation and the files in its output folder."""

    config: CurateConfig
    output: Path

    @property
    def work(self) -> Path:
        """Folder of intermediate files, deleted at the end."""
        return self.output / "work"

    def scanned_clips(self, chunk: int) -> Path:
        """Tar of a chunk's rows and, before the motion filter, its encoded clips."""
        return self.work / "scanned" / f"{chunk:06d}.tar"

    def scores(self, chunk: int) -> Path:
        """Motion scores, or failures, of a chunk's clips by key."""
        return self.work / "scores" / f"{chunk:06d}.json"

    def rows(self, chunk: int) -> Path:
        """Index rows of a chunk, one JSON object per line; written after the chunk's shard."""
        return self.work / "rows" / f"{chunk:06d}.jsonl"

    def shard(self, chunk: int) -> Path:
        """Accepted clips of a chunk; a chunk without any has no shard."""
        return self.output / f"clips-{chunk:06d}.tar"

    def outcomes(self, folder: str, chunk: int) -> Path:
        """The `Outcomes` of a chunk in the pass that writes to a folder of `work`; its last file of the chunk."""
        return self.work / folder / f"{chunk:06d}.outcomes.json"

    @property
    def threshold(self) -> Path:
        """The (score, key) up to which clips are dropped."""
        return self.work / "threshold.json"

    @property
    def index(self) -> Path:
        """Table with a row for each source; it exists once the curation is finished."""
        return self.output / "index.parquet"

    @property
    def settings(self) -> Path:
        """Settings that the curation began with."""
        return self.output / "config.yaml"

    @property
    def source_digest(self) -> Path:
        """Digest of the sources that the curation began with; the running process holds a lock on the file."""
        return self.output / ".sources"

    def write_sources(self, sources: Sequence[Source]) -> None:
        """Writes the sources, one JSON object per line, and the file position at which each chunk begins."""
        starts = []
        with atomic_write(self.work / "sources.jsonl") as file:
            for number, source in enumerate(sources):
                if number % self.config.clips_per_shard == 0:
                    starts.append(file.tell())
                file.write(json.dumps(asdict(source)).encode() + b"\n")
        with atomic_write(self.work / "sources.npy") as file:
            np.save(file, np.array(starts))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.load(self.work / "sources.npy")

    @property
    def num_chunks(self) -> int:
        """Number of chunks; some may give no shard."""
        return len(self._starts)

    def sources(self, chunk: int) -> list[Source]:
        """The sources of a chunk."""
        with (self.work / "sources.jsonl").open("rb") as file:
            file.seek(int(self._starts[chunk]))
            lines = itertools.islice(file, self.config.clips_per_shard)
            return [Source(**json.loads(line)) for line in lines]

    def num_clips(self, chunk: int) -> int:
        """Number of clips that the scan of a chunk gave."""
        return self.read_outcomes("scanned", chunk).num_done

    def read_outcomes(self, folder: str, chunk: int) -> Outcomes:
        """What is in the file `outcomes`."""
        return Outcomes(**json.loads(self.outcomes(folder, chunk).read_text()))
