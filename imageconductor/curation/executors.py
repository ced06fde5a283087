"""Where the work is done: processes of this machine, or Ray. What is done, and what comes out, does not depend on it.

The unit of work is a chunk: the sources of one shard. A chunk's files are written by whoever works on it and appear
whole, so that a chunk that was interrupted is simply done again.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from imageconductor.curation.config import CurateConfig

OUTCOMES = ("accepted", "rejected", "failed", "done")
Tick = Callable[[str], None]
"""Told of every clip that is through with one of `OUTCOMES`; "done" where it is not yet known."""

_CHUNKS_AT_A_TIME = 2  # The second keeps the processes busy while the first one's last clips are awaited.


@dataclass(frozen=True)
class Failure:
    """What stands in for the result of a clip that raised, hung or took its process down."""

    reason: str
    detail: str


class Chunks(Protocol):
    """A pass over the data, chunk by chunk."""

    @property
    def uses_models(self) -> bool:
        """Whether networks are loaded, so that processes should live long and may want a GPU."""
        ...

    def work(self, chunk: int, workers: Workers, tick: Tick) -> None:
        """Does a chunk and writes its files."""
        ...


class Workers:
    """Processes that each work on one clip at a time. One that exceeds the time limit, or dies, is replaced.

    Args:
        count: Processes.
        limit_s: Seconds for one clip.
    """

    def __init__(self, count: int, limit_s: float):
        self.limit_s = limit_s
        self._is_closed = False
        self._waiting: set[Future[Any]] = set()
        # Not forked: the process has threads, and networks may hold a GPU.
        self._pool = ProcessPool(max_workers=count, context=get_context("spawn"), initializer=_settle)

    def map(self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """`function(*item)` for each item in order, or a `Failure`."""
        futures = [self._pool.schedule(function, args=item, timeout=self.limit_s) for item in items]
        self._waiting.update(futures)
        for future in futures:
            try:
                result = future.result()
            except CancelledError:
                result = None
            except (TimeoutError, FutureTimeout):
                result = Failure("time limit", f"took longer than {self.limit_s:g} s")
            except ProcessExpired as error:
                result = Failure("crashed", f"the process ended with {error.exitcode}")
            except Exception as error:  # The footage of strangers.
                result = Failure("failed", f"{type(error).__name__}: {error}")
            self._waiting.discard(future)
            if self._is_closed:  # An interrupted run must not take its own end for the clip's fault.
                raise RuntimeError("the workers were stopped")
            yield result

    def close(self) -> None:
        """Ends the processes, whatever they are doing; a `map` that is under way raises."""
        self._is_closed = True
        for future in list(self._waiting):
            future.cancel()
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _settle() -> None:
    """One thread each; and an interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    import cv2

    cv2.setNumThreads(1)


def num_workers(config: CurateConfig) -> int:
    """Processes that the settings ask for."""
    return config.workers or os.cpu_count() or 1


def run(chunks: Chunks, todo: Sequence[int], config: CurateConfig, tick: Tick) -> None:
    """Works on all chunks, in any order."""
    {"local": _local, "ray": _ray}[config.executor](chunks, todo, config, tick)


def _local(chunks: Chunks, todo: Sequence[int], config: CurateConfig, tick: Tick) -> None:
    with Workers(num_workers(config), config.time_limit_s) as workers, ThreadPoolExecutor(_CHUNKS_AT_A_TIME) as threads:
        futures = [threads.submit(chunks.work, chunk, workers, tick) for chunk in todo]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            workers.close()
            raise


def _ray(chunks: Chunks, todo: Sequence[int], config: CurateConfig, tick: Tick) -> None:
    data = start_ray(config)
    ray_data: Any = data.from_items([{"chunk": chunk} for chunk in todo], override_num_blocks=len(todo))
    count = num_workers(config)
    if chunks.uses_models:
        results = ray_data.map(
            _ChunkActor,
            fn_constructor_args=(chunks, config.time_limit_s),
            num_gpus=config.gpus_per_worker or None,
            num_cpus=1,
            compute=data.ActorPoolStrategy(min_size=1, max_size=count),
        )
    else:
        results = ray_data.map(
            _chunk_task,
            fn_args=(chunks, config.time_limit_s),
            num_cpus=1,
            compute=data.TaskPoolStrategy(size=count),
        )
    for row in results.iter_rows():
        for what in OUTCOMES:
            for _ in range(row[what]):
                tick(what)


def start_ray(config: CurateConfig) -> Any:
    """The module `ray.data`, connected to the cluster, or to one that is started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"executor=ray needs the extra `curate`: {error}") from error
    logging.getLogger("ray").setLevel(logging.ERROR)  # It tells of each pass; the bar does that.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not ray.is_initialized():
        here: dict[str, Any] = {"num_cpus": num_workers(config), "include_dashboard": False}
        try:
            ray.init(
                address=config.ray_address or "local",
                log_to_driver=False,
                logging_level=logging.WARNING,
                **({} if config.ray_address else here),
            )
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"ray_address={config.ray_address}: {error}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    return ray.data


def _worked(chunks: Chunks, chunk: int, workers: Workers) -> dict[str, int]:
    counts: Counter[str] = Counter()
    chunks.work(chunk, workers, lambda what: counts.update([what]))
    return {what: counts[what] for what in OUTCOMES}


def _chunk_task(row: dict[str, Any], chunks: Chunks, limit_s: float) -> dict[str, int]:
    with Workers(1, limit_s) as workers:
        return _worked(chunks, int(row["chunk"]), workers)


class _ChunkActor:
    """Keeps its process, and the networks in it, from chunk to chunk."""

    def __init__(self, chunks: Chunks, limit_s: float):
        self.chunks, self.workers = chunks, Workers(1, limit_s)

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        return _worked(self.chunks, int(row["chunk"]), self.workers)
