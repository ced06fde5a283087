"""Runs a pass of the curation in processes of this machine or on Ray; the results are the same.

The unit of work is a chunk: the sources of one shard. The process that works on a chunk also writes its files, and
writes them atomically, so an interrupted chunk can be done again from its start.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, BrokenExecutor, CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing import get_context
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from imageconductor.curation.curate_config import CurateConfig
from imageconductor.curation.footage import STORAGE_FAULTS

logger = logging.getLogger(__name__)

_OUTCOMES = ("accepted", "rejected", "failed", "done")
Tick = Callable[[str], None]
"""Called once per clip with its outcome; "done" where it is not yet known whether the clip is accepted."""

_BROKEN = "broken pool"
_TIME_LIMIT = "time limit"
# No fault of the footage: after an error of CUDA a process computes nothing any more, and all its next clips fail.
_FULL = re.compile(r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_NOT_INITIALIZED")
_BROKEN_GPU = re.compile(r"(CUDA|cuDNN|HIP) error|(CUBLAS|CUDNN|CUFFT|HIPBLAS)_STATUS_")
# A call that was refused for its shapes, which are the clip's, leaves the GPU as it was.
_REFUSED = re.compile(r"_STATUS_(NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE)|error: invalid (configuration )?argument")
_POLL_S = 1.0


@dataclass(frozen=True)
class Failure:
    """Stands for the result of a clip that took too long, or twice raised an exception or ended its process."""

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
        gpus: Ids as in CUDA_VISIBLE_DEVICES. Process i sees `gpus[i % len(gpus)]` alone, and a process that replaces
            another takes its place; if empty, each process sees what this one sees.
    """

    def __init__(self, count: int, limit_s: float, prepare: Callable[[], None] | None = None, gpus: Sequence[str] = ()):
        self.count, self.limit_s, self.prepare, self.gpus = count, limit_s, prepare, gpus
        self._places = NamedTemporaryFile(prefix="curation-workers-")  # noqa: SIM115 - closed by `close`
        self._is_closed = self._has_warned = False
        self._waiting: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._pool = self._new_pool()

    def map(self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """`function(*item)` for each item in order, or a `Failure`.

        A failed item is tried once more, in case the machine was at fault; not one that took too long, since it would
        take as long again.

        Raises:
            RuntimeError: For a reason that lies in no clip: the workers were stopped, die as they start, lack a module,
                run out of GPU memory or cannot read from the disk.
        """
        listed = list(items)
        futures = [self._schedule(function, item) for item in listed]
        for future, item in zip(futures, listed, strict=True):
            result = self._result(*future)
            if isinstance(result, Failure) and result.reason != _TIME_LIMIT:
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
                if not self._has_warned:
                    logger.warning("batches that fail are done again clip by clip; the first: %s", result.detail)
                    self._has_warned = True
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
        except (TimeoutError, FutureTimeout) as error:
            _check_machine(error)  # An OSError of the number ETIMEDOUT is a TimeoutError too.
            result = Failure(_TIME_LIMIT, f"took longer than {self.limit_s:g} s")
        except ProcessExpired as error:
            result = Failure("crashed", f"the process ended with {error.exitcode}")
        except BrokenExecutor as error:
            result = Failure(_BROKEN, str(error))
            with self._lock:
                if self._pool is pool:
                    self._pool = self._new_pool()
        except Exception as error:  # Unknown footage can raise anything.
            _check_machine(error)
            result = Failure("failed", f"{type(error).__name__}: {error}")
        self._waiting.discard(future)
        if self._is_closed:  # After an interruption the result is no fault of the clip.
            raise RuntimeError("the workers were stopped")
        return result

    def _new_pool(self) -> ProcessPool:
        # "spawn" and not "fork": this process has threads, and networks may hold a GPU.
        context = get_context("spawn")
        arguments = (self._places.name, self.gpus, self.prepare)
        return ProcessPool(self.count, context=context, initializer=_initialise_worker, initargs=arguments)

    def close(self) -> None:
        """Ends the processes at once; a `map` in progress raises."""
        with self._lock:
            self._is_closed = True
        for future in list(self._waiting):
            future.cancel()
        self._pool.stop()
        self._pool.join()
        self._places.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_machine(error: Exception) -> None:
    """Makes sure that an error may lie in the clip.

    Raises:
        RuntimeError: It lies in the machine: a GPU that is full or lost, a missing module, storage that fails.
    """
    is_full = type(error).__name__ == "OutOfMemoryError" or bool(_FULL.search(str(error)))
    is_broken = type(error).__name__ == "AcceleratorError" or bool(_BROKEN_GPU.search(str(error)))
    is_lost = is_broken and not _REFUSED.search(str(error))
    has_no_storage = isinstance(error, OSError) and error.errno in STORAGE_FAULTS
    if is_full or is_lost or has_no_storage or isinstance(error, ImportError):
        remedy = "; a smaller batch_size or raft_batch needs less" if is_full else ""
        raise RuntimeError(f"{type(error).__name__}: {error}{remedy}") from error


def _initialise_worker(places: str, gpus: Sequence[str], prepare: Callable[[], None] | None) -> None:
    """Restricts a worker process to one thread and one GPU, and leaves the handling of interrupts to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[_take_place(places) % len(gpus)]
    import cv2

    cv2.setNumThreads(1)
    if prepare is not None:
        prepare()


def _take_place(places: str) -> int:
    """The lowest number that no other living process has taken; a process gives its number back by ending."""
    file = os.open(places, os.O_RDWR)  # Stays open, since closing it would unlock the byte of that number.
    number = 0
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            number += 1
        else:
            return number


def _list_gpus(config: CurateConfig) -> list[str]:
    """Ids of the GPUs of this machine that processes take in turn; none if `device` names one, or the CPU."""
    if config.device not in (None, "cuda"):
        return []
    import torch

    count = torch.cuda.device_count()
    ids = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if ids is None else ids.split(",")[:count]


def _count_gpu_workers(config: CurateConfig, num_gpus: int) -> int:
    """Number of processes for a pass with networks on `num_gpus` GPUs, none of which is split between processes."""
    per_gpu = int(1 / config.gpus_per_worker + 1e-6)
    return config.gpu_workers or max(1, num_gpus * per_gpu)


def run(chunk_pass: ChunkPass, todo: Sequence[int], tick: Tick) -> None:
    """Works on the chunks `todo` in any order, as `executor` says."""
    {"local": _run_local, "ray": _run_ray}[chunk_pass.config.executor](chunk_pass, todo, tick)


def _run_local(chunk_pass: ChunkPass, todo: Sequence[int], tick: Tick) -> None:
    config = chunk_pass.config
    if chunk_pass.uses_networks:
        gpus = _list_gpus(config)
        num_gpus = len(gpus) or int((config.device or "").startswith("cuda:"))
        count = _count_gpu_workers(config, num_gpus)
        all_workers = Workers(count, config.time_limit_s, chunk_pass.prepare, gpus=gpus)
    else:
        all_workers = Workers(config.workers or os.cpu_count() or 1, config.time_limit_s)
    # Several chunks at once keep the processes busy, also while the last clips of a chunk are awaited.
    batch_size = config.batch_size if chunk_pass.uses_networks else 1
    num_threads = 2 + 2 * all_workers.count * batch_size // config.clips_per_shard
    with all_workers as workers, ThreadPoolExecutor(num_threads) as threads:
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
    if chunk_pass.uses_networks:
        count, resources = _plan_actors(config, len(todo))
        # A chunk queued at a busy actor would wait while another actor is idle.
        strategy = data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1)
        results = ray_data.map(_ChunkActor, fn_constructor_args=(chunk_pass,), compute=strategy, **resources)
    else:
        # On an existing cluster the default is all of its resources.
        uses_all = config.ray_address is not None and not config.workers
        count = None if uses_all else min(config.workers or os.cpu_count() or 1, len(todo))
        strategy = data.TaskPoolStrategy(size=count)
        results = ray_data.map(_chunk_task, fn_args=(chunk_pass,), num_cpus=1, compute=strategy)
    for row in results.iter_rows():
        for outcome in _OUTCOMES:
            for _ in range(row[outcome]):
                tick(outcome)


def _plan_actors(config: CurateConfig, num_chunks: int) -> tuple[int, dict[str, float]]:
    """Number of actors of a pass with networks, and what each reserves on the cluster.

    Ray fills a GPU before it takes the next one. Actors therefore reserve as much as leaves room for just as many on
    each GPU as must share one, which spreads them over all GPUs when there are few.
    """
    import ray

    available = ray.cluster_resources()
    num_gpus = 0 if config.device == "cpu" else int(available.get("GPU", 0))
    count = min(_count_gpu_workers(config, num_gpus), num_chunks)
    if not num_gpus:
        return max(1, min(count, int(available.get("CPU", 0)))), {"num_cpus": 1}
    return count, {"num_cpus": 0, "num_gpus": 1 / -(-count // num_gpus)}


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
        num_cpus = max(config.workers or os.cpu_count() or 1, config.gpu_workers)
        local: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False}
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
