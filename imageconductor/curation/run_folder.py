"""The folder of a curation: where things are in it, and files that appear whole."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.sources import Source


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
        with whole(self.work / "sources.jsonl") as file:
            for number, source in enumerate(sources):
                if number % self.config.clips_per_shard == 0:
                    starts.append(file.tell())
                file.write(json.dumps(asdict(source)).encode() + b"\n")
        with whole(self.work / "sources.npy") as file:
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


@contextmanager
def whole(path: Path, keep: Callable[[], bool] = lambda: True) -> Iterator[IO[bytes]]:
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
