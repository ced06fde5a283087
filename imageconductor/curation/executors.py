"""Where the work is done: processes of this machine, or Ray. What is done, and what comes out, does not depend on it.

The unit of work is a chunk: the sources of one shard. A chunk's files are written by whoever works on it and appear
whole, so that a chunk that was interrupted is simply done again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from imageconductor.curation.curate_config import CurateConfig

OUTCOMES = ("accepted", "rejected", "failed", "done")
Tick = Callable[[str], None]
"""Told of every clip that is through with one of `OUTCOMES`; "done" where it is not yet known."""

_BROKEN = "broken pool"
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Failure:
    """What stands in for the result of a clip that raised, hung or took its process down, twice."""

    reason: str
    detail: str


class Chunks(Protocol):
    """A pass over the data, chunk by chunk."""

    @property
    def config(self) -> CurateConfig:
        """The settings."""
        ...

    @property
    def uses_networks(self) -> bool:
        """Whether networks are loaded, so that processes should live long and may want a GPU."""
        ...

    def prepare(self) -> None:
        """Loads the networks, in a process that is about to work."""
        ...

    def work(self, chunk: int, workers: Workers, tick: Tick) -> None:
        """Does a chunk and writes its files."""
        ...


class Workers:
    """Processes that each work on one clip, or one batch, at a time. One that exceeds the limit, or dies, is replaced.

    Args:
        count: Processes.
        limit_s: Seconds for one clip.
        prepare: Called in each process before its first clip, outside the limit.
    """

    def __init__(self, count: int, limit_s: float, prepare: Callable[[], None] | None = None):
        self.count, self.limit_s, self.prepare = count, limit_s, prepare
        self._is_closed = False
        self._waiting: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._pool = self._new_pool()

    def map(self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """`function(*item)` for each item in order, or a `Failure`.

        What fails is tried once more: the machine may have been at fault.

        Raises:
            RuntimeError: The workers were stopped, die as they start, lack a module or run out of GPU memory. None of
                this is a clip's fault.
        """
        listed = list(items)
        futures = [self._schedule(function, item) for item in listed]
        for future, item in zip(futures, listed, strict=True):
            result = self._result(*future)
            if isinstance(result, Failure):
                result = self._result(*self._schedule(function, item))
            if isinstance(result, Failure) and result.reason == _BROKEN:
                raise RuntimeError(f"the worker processes die as they start: {result.detail}")
            yield result

    def map_batches(
        self, function: Callable[..., list[Any]], items: Sequence[Any], *args: Any, size: int
    ) -> Iterator[Any]:
        """`function(items, *args)` for `size` items at a time, item by item in order; a `Failure` for one that fails.

        A batch that fails is done again one by one, so that one bad clip costs the others nothing but time.

        Raises:
            RuntimeError: As `map`.
        """
        if size == 1:
            alone = self.map(function, [([item], *args) for item in items])
            yield from (one if isinstance(one, Failure) else one[0] for one in alone)
            return
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        futures = [self._schedule(function, (batch, *args), len(batch)) for batch in batches]
        for batch, future in zip(batches, futures, strict=True):
            result = self._result(*future)
            if isinstance(result, Failure):
                alone = self.map(function, [([item], *args) for item in batch])
                result = [one if isinstance(one, Failure) else one[0] for one in alone]
            yield from result

    def _schedule(
        self, function: Callable[..., Any], item: tuple[Any, ...], clips: int = 1
    ) -> tuple[Future[Any], ProcessPool]:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the workers were stopped")
            limit_s = self.limit_s * clips
            try:
                future = self._pool.schedule(function, args=item, timeout=limit_s)
            except RuntimeError:  # It broke.
                self._pool = self._new_pool()
                future = self._pool.schedule(function, args=item, timeout=limit_s)
            self._waiting.add(future)
            return future, self._pool

    def _result(self, future: Future[Any], pool: ProcessPool) -> Any:
        try:
            while not future.done():
                wait([future], timeout=_LOOK_EVERY_S)
                if not pool.active and not future.done():  # A pool that breaks forgets futures.
                    raise BrokenExecutor("the pool is gone")
            result = future.result()
        except CancelledError:
            result = None
        except (TimeoutError, FutureTimeout):
            result = Failure("time limit", f"took longer than {self.limit_s:g} s")
        except ProcessExpired as error:
            result = Failure("crashed", f"the process ended with {error.exitcode}")
        except BrokenExecutor as error:
            result = Failure(_BROKEN, str(error))
            with self._lock:
                if self._pool is pool:
                    self._pool = self._new_pool()
        except Exception as error:  # The footage of strangers.
            is_full = type(error).__name__ == "OutOfMemoryError"
            if is_full or isinstance(error, ImportError):
                remedy = "; a smaller batch_size or raft_batch needs less" if is_full else ""
                raise RuntimeError(f"{type(error).__name__}: {error}{remedy}") from error
            result = Failure("failed", f"{type(error).__name__}: {error}")
        self._waiting.discard(future)
        if self._is_closed:  # An interrupted run must not take its own end for the clip's fault.
            raise RuntimeError("the workers were stopped")
        return result

    def _new_pool(self) -> ProcessPool:
        # Not forked: the process has threads, and networks may hold a GPU.
        return ProcessPool(self.count, context=get_context("spawn"), initializer=_settle, initargs=(self.prepare,))

    def close(self) -> None:
        """Ends the processes, whatever they are doing; a `map` that is under way raises."""
        with self._lock:
            self._is_closed = True
        for future in list(self._waiting):
            future.cancel()
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _settle(prepare: Callable[[], None] | None) -> None:
    """One thread each; and an interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    import cv2

    cv2.setNumThreads(1)
    if prepare is not None:
        prepare()


def num_workers(chunks: Chunks) -> int:
    """Processes of this machine for a pass."""
    if chunks.config.workers:
        return chunks.config.workers
    if chunks.uses_networks:
        import torch

        return max(1, torch.cuda.device_count())
    return os.cpu_count() or 1


def run(chunks: Chunks, todo: Sequence[int], tick: Tick) -> None:
    """Works on all chunks, in any order."""
    {"local": _local, "ray": _ray}[chunks.config.executor](chunks, todo, tick)


def _local(chunks: Chunks, todo: Sequence[int], tick: Tick) -> None:
    config, count = chunks.config, num_workers(chunks)
    # Enough that the processes stay busy while the last clips of a chunk are awaited.
    at_a_time = 2 + 2 * count // config.clips_per_shard
    prepare = chunks.prepare if chunks.uses_networks else None
    with Workers(count, config.time_limit_s, prepare) as workers, ThreadPoolExecutor(at_a_time) as threads:
        futures = [threads.submit(chunks.work, chunk, workers, tick) for chunk in todo]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            workers.close()
            raise


def _ray(chunks: Chunks, todo: Sequence[int], tick: Tick) -> None:
    config = chunks.config
    data = start_ray(chunks)
    ray_data: Any = data.from_items([{"chunk": chunk} for chunk in todo], override_num_blocks=len(todo))
    # Of a cluster, as much as it has.
    count = None if config.ray_address and not config.workers else num_workers(chunks)
    if chunks.uses_networks:
        results = ray_data.map(
            _ChunkActor,
            fn_constructor_args=(chunks,),
            num_gpus=config.gpus_per_worker or None,
            num_cpus=1,
            compute=data.ActorPoolStrategy(min_size=1, max_size=count),
        )
    else:
        results = ray_data.map(_chunk_task, fn_args=(chunks,), num_cpus=1, compute=data.TaskPoolStrategy(size=count))
    for row in results.iter_rows():
        for what in OUTCOMES:
            for _ in range(row[what]):
                tick(what)


def start_ray(chunks: Chunks) -> Any:
    """The module `ray.data`, connected to the cluster, or to one that is started here."""
    config = chunks.config
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"executor=ray needs the extra `curate`: {error}") from error
    logging.getLogger("ray").setLevel(logging.ERROR)  # It tells of each pass; the bar does that.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not ray.is_initialized():
        here: dict[str, Any] = {"num_cpus": config.workers or os.cpu_count(), "include_dashboard": False}
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


def _chunk_task(row: dict[str, Any], chunks: Chunks) -> dict[str, int]:
    with Workers(1, chunks.config.time_limit_s) as workers:
        return _worked(chunks, int(row["chunk"]), workers)


class _ChunkActor:
    """Keeps its process, and the networks in it, from chunk to chunk."""

    def __init__(self, chunks: Chunks):
        self.chunks, self.workers = chunks, Workers(1, chunks.config.time_limit_s, chunks.prepare)

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        return _worked(self.chunks, int(row["chunk"]), self.workers)
