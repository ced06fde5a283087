"""Runs a pass of the curation in processes of this machine or on Ray; the results are the same.

The unit of work is a chunk: the sources of one shard. The process that works on a chunk also writes its files, and
writes them atomically, so an interrupted chunk can be done again from its start.
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

_OUTCOMES = ("accepted", "rejected", "failed", "done")
Tick = Callable[[str], None]
"""Called once per clip with its outcome; "done" where it is not yet known whether the clip is accepted."""

_BROKEN = "broken pool"
_POLL_S = 1.0


@dataclass(frozen=True)
class Failure:
    """Stands for the result of a clip that twice raised an exception, hung or ended its process."""

    reason: str
    detail: str


class ChunkPass(Protocol):
    """A pass over the data, chunk by chunk."""

    @property
    def config(self) -> CurateConfig:
        """Settings of the curation."""
        ...

    @property
    def uses_networks(self) -> bool:
        """Whether the pass evaluates networks, whose processes should live long and may need a GPU."""
        ...

    def prepare(self) -> None:
        """Loads the networks into the current process."""
        ...

    def work(self, chunk: int, workers: Workers, tick: Tick) -> None:
        """Processes the clips of a chunk in `workers` and writes the chunk's files."""
        ...


class Workers:
    """Processes that each work on one clip, or one batch, at a time and are replaced if they hang or die.

    Args:
        count: Number of processes.
        limit_s: Time limit for one clip in seconds.
        prepare: Called in each process before its first clip; the time limit does not cover it.
    """

    def __init__(self, count: int, limit_s: float, prepare: Callable[[], None] | None = None):
        self.count, self.limit_s, self.prepare = count, limit_s, prepare
        self._is_closed = False
        self._waiting: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._pool = self._new_pool()

    def map(self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """`function(*item)` for each item in order, or a `Failure`.

        A failed item is tried once more, in case the machine was at fault.

        Raises:
            RuntimeError: For a reason that lies in no clip: the workers were stopped, die as they start, lack a module
                or run out of GPU memory.
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
        """The results of `function(items, *args)` for `size` items at a time, in order; a `Failure` where one fails.

        The items of a failed batch are done again one by one, so a bad clip does not take others with it.

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
            except RuntimeError:  # The pool is broken.
                self._pool = self._new_pool()
                future = self._pool.schedule(function, args=item, timeout=limit_s)
            self._waiting.add(future)
            return future, self._pool

    def _result(self, future: Future[Any], pool: ProcessPool) -> Any:
        try:
            while not future.done():
                wait([future], timeout=_POLL_S)
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
        except Exception as error:  # Unknown footage can raise anything.
            is_full = type(error).__name__ == "OutOfMemoryError"
            if is_full or isinstance(error, ImportError):
                remedy = "; a smaller batch_size or raft_batch needs less" if is_full else ""
                raise RuntimeError(f"{type(error).__name__}: {error}{remedy}") from error
            result = Failure("failed", f"{type(error).__name__}: {error}")
        self._waiting.discard(future)
        if self._is_closed:  # After an interruption the result is no fault of the clip.
            raise RuntimeError("the workers were stopped")
        return result

    def _new_pool(self) -> ProcessPool:
        # "spawn" and not "fork": this process has threads, and networks may hold a GPU.
        context = get_context("spawn")
        return ProcessPool(self.count, context=context, initializer=_initialise_worker, initargs=(self.prepare,))

    def close(self) -> None:
        """Ends the processes at once; a `map` in progress raises."""
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


def _initialise_worker(prepare: Callable[[], None] | None) -> None:
    """Restricts a worker process to one thread and leaves the handling of interrupts to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    import cv2

    cv2.setNumThreads(1)
    if prepare is not None:
        prepare()


def _num_workers(chunk_pass: ChunkPass) -> int:
    """Number of processes of this machine for a pass."""
    if chunk_pass.config.workers:
        return chunk_pass.config.workers
    if chunk_pass.uses_networks:
        import torch

        return max(1, torch.cuda.device_count())
    return os.cpu_count() or 1


def run(chunk_pass: ChunkPass, todo: Sequence[int], tick: Tick) -> None:
    """Works on the chunks `todo` in any order, as `executor` says."""
    {"local": _run_local, "ray": _run_ray}[chunk_pass.config.executor](chunk_pass, todo, tick)


def _run_local(chunk_pass: ChunkPass, todo: Sequence[int], tick: Tick) -> None:
    config, count = chunk_pass.config, _num_workers(chunk_pass)
    # Several chunks at once keep the processes busy while the last clips of a chunk are awaited.
    num_threads = 2 + 2 * count // config.clips_per_shard
    prepare = chunk_pass.prepare if chunk_pass.uses_networks else None
    with Workers(count, config.time_limit_s, prepare) as workers, ThreadPoolExecutor(num_threads) as threads:
        futures = [threads.submit(chunk_pass.work, chunk, workers, tick) for chunk in todo]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            workers.close()
            raise


def _run_ray(chunk_pass: ChunkPass, todo: Sequence[int], tick: Tick) -> None:
    config = chunk_pass.config
    data = _connect_ray(config)
    ray_data: Any = data.from_items([{"chunk": chunk} for chunk in todo], override_num_blocks=len(todo))
    # On an existing cluster the default is all of its resources.
    uses_all = config.ray_address is not None and not config.workers
    count = None if uses_all else min(_num_workers(chunk_pass), len(todo))
    if chunk_pass.uses_networks:
        results = ray_data.map(
            _ChunkActor,
            fn_constructor_args=(chunk_pass,),
            num_gpus=config.gpus_per_worker or None,
            num_cpus=1,
            compute=data.ActorPoolStrategy(min_size=1, max_size=count),
        )
    else:
        strategy = data.TaskPoolStrategy(size=count)
        results = ray_data.map(_chunk_task, fn_args=(chunk_pass,), num_cpus=1, compute=strategy)
    for row in results.iter_rows():
        for outcome in _OUTCOMES:
            for _ in range(row[outcome]):
                tick(outcome)


def _connect_ray(config: CurateConfig) -> Any:
    """The module `ray.data`, connected to the cluster at `ray_address` or to a local one that is started."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"executor=ray needs the extra `curate`: {error}") from error
    logging.getLogger("ray").setLevel(logging.ERROR)  # Progress is shown by the bar alone.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not ray.is_initialized():
        local: dict[str, Any] = {"num_cpus": config.workers or os.cpu_count(), "include_dashboard": False}
        try:
            ray.init(
                address=config.ray_address or "local",
                log_to_driver=False,
                logging_level=logging.WARNING,
                **({} if config.ray_address else local),
            )
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(f"ray_address={config.ray_address}: {error}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    return ray.data


def _count_outcomes(chunk_pass: ChunkPass, chunk: int, workers: Workers) -> dict[str, int]:
    """Works on a chunk and counts its clips by outcome."""
    counts: Counter[str] = Counter()
    chunk_pass.work(chunk, workers, lambda outcome: counts.update([outcome]))
    return {outcome: counts[outcome] for outcome in _OUTCOMES}


def _chunk_task(row: dict[str, Any], chunk_pass: ChunkPass) -> dict[str, int]:
    with Workers(1, chunk_pass.config.time_limit_s) as workers:
        return _count_outcomes(chunk_pass, int(row["chunk"]), workers)


class _ChunkActor:
    """A Ray actor whose process, with the networks in it, serves one chunk after another."""

    def __init__(self, chunk_pass: ChunkPass):
        self.chunk_pass = chunk_pass
        self.workers = Workers(1, chunk_pass.config.time_limit_s, chunk_pass.prepare)

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        return _count_outcomes(self.chunk_pass, int(row["chunk"]), self.workers)
