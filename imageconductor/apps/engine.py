"""One model, one worker, one queue: requests become videos one after the other, and none harms the next.

engine = Engine(SampleJob(model="models/sprites"))
ticket = engine.submit(Request(job))     checks at once what needs no weight
for event in ticket.events(): ...        Waiting, Step, and at the end Made or Stopped; raises what went wrong
ticket.stop()                            from any thread; acts at the next step
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.progress import Mix, Step, StepReport, Waiting
from imageconductor.sampling.job import MIX_CONTROLS, Inputs, SampleJob, call_arguments, load_pipeline, prepare
from imageconductor.sampling.residual_cache import ResidualCache
from imageconductor.sampling.video import Frames, to_uint8

logger = logging.getLogger(__name__)

WEIGHT_FIELDS = (
    *("model", "base", "lora", "motion_lora", "appearance_lora", "domain_adapter_scale", "few_step", "first_frame_by"),
    *("device", "dtype", "offload", "vae_tiling", "compile"),
)
"""Settings of a job that say which weights are loaded, and how; jobs that agree in them share a pipeline."""

_CACHE_BYTES = 256 * 2**20
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Resume:
    """Where a video is taken up again.

    Attributes:
        step: k, number of steps that are kept.
        latents: The sample (B, C, T, h, w) before each of the steps up to k, by its number.
    """

    step: int
    latents: dict[int, Tensor]


@dataclass(frozen=True)
class Request:
    """What is to be made, and what is to be seen meanwhile.

    Attributes:
        job: Settings; its image and trajectories are files.
        mix: Weights of the mixing board, read at each step; None = as the job's control says.
        resume: None = from noise.
        estimates_every: Pictures of the current estimate at every n-th step; 0 = none.
        keeps_latents: Whether `Made.latents` are wanted, which videos of several windows do not have.
    """

    job: SampleJob
    mix: Mix | None = None
    resume: Resume | None = None
    estimates_every: int = 1
    keeps_latents: bool = True


@dataclass(frozen=True)
class Made:
    """A finished request.

    Attributes:
        inputs: The job with the model's defaults, its picture and trajectories.
        videos: (T, H, W, 3) uint8 for each of the job's seeds.
        latents: The sample (B, C, T, h, w) before each step, by its number, and last the result; none if not wanted.
            Those before the step at which a video was taken up are the earlier video's.
        seconds: Of the worker.
        is_repeatable: Whether `sample.py` makes the same videos from the job alone.
    """

    inputs: Inputs
    videos: list[Frames]
    latents: dict[int, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    is_repeatable: bool = True


@dataclass(frozen=True)
class Stopped:
    """The visitor has stopped the request."""


Event = Waiting | Step | Made | Stopped


class Ticket:
    """A request on its way."""

    def __init__(self, engine: Engine, request: Request, inputs: Inputs):
        self.request, self.inputs = request, inputs
        self._engine = engine
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends the request before its next step; one that waits does not begin."""
        self._stopped.set()
        if self._engine.forget(self):
            self._events.put(Stopped())

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def report(self, event: Event | BaseException) -> None:
        """Adds an event; an exception ends the events by being raised."""
        self._events.put(event)

    def events(self) -> Iterator[Event]:
        """What happens until the request is done; ending the iteration early stops it.

        Raises:
            Exception: What went wrong; the engine goes on with the next request.
        """
        ahead: int | None = None
        ended = False
        try:
            while not ended:
                if (now := self._engine.count_ahead(self)) is not None and now != ahead:
                    ahead = now
                    yield Waiting(now)
                try:
                    event = self._events.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                ended = isinstance(event, (Made, Stopped, BaseException))
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            if not ended:
                self.stop()


class Engine:
    """A queue in front of one worker thread, which holds the pipeline of the model that was used last.

    Args:
        base: Model, device, dtype and memory settings of all requests.
        limits: How many may wait.
    """

    def __init__(self, base: SampleJob, limits: Limits | None = None):
        self.base, self.limits = base, limits or Limits()
        self._waiting: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._changed = threading.Condition()
        self._loading = threading.Lock()
        self._closed = False
        self._pipe: Any = None
        self._loaded: tuple[Any, ...] = ()
        self._cache: ResidualCache | None = None
        self._worker = threading.Thread(target=self._work, name="generation", daemon=True)
        self._worker.start()

    def submit(self, request: Request) -> Ticket:
        """Puts a request into the queue, once everything has been checked that needs no weights.

        Raises:
            FieldError: The queue is full.
            ValueError, FileNotFoundError: In one line, what is wrong with the job.
        """
        with self._changed:
            self._refuse_when_full()
        job = request.job
        if request.mix is not None:
            job = replace(job, mix=request.mix.as_tuple(), camera_free_scale=None, trajectory_guidance_scale=None)
        ticket = Ticket(self, request, prepare(job))
        with self._changed:
            self._refuse_when_full()
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def count_ahead(self, ticket: Ticket) -> int | None:
        """Requests before this one; None once it is worked on, or gone."""
        with self._changed:
            if ticket not in self._waiting:
                return None
            return self._waiting.index(ticket) + (self._running is not None)

    def forget(self, ticket: Ticket) -> bool:
        """Takes a waiting request out of the queue; False if it was not waiting."""
        with self._changed:
            if ticket not in self._waiting:
                return False
            self._waiting.remove(ticket)
            return True

    def close(self) -> None:
        """Stops what runs and waits, and ends the worker."""
        with self._changed:
            self._closed = True
            tickets = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify_all()
        for ticket in tickets:
            ticket.stop()
        self._worker.join(timeout=60)

    def load(self) -> None:
        """Loads the weights now rather than at the first request.

        Raises:
            ValueError, FileNotFoundError: A file of weights is missing or does not fit.
        """
        self._find_pipeline(prepare(replace(self.base, prompt=self.base.prompt or "video")).job)

    def _refuse_when_full(self) -> None:
        if self._closed:
            raise FieldError("generate", "the page is being closed; start it again")
        if len(self._waiting) >= self.limits.waiting + (self._running is None):
            raise FieldError("generate", f"{len(self._waiting)} requests wait already; try again in a moment")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                ticket = self._running = self._waiting.popleft()
            ticket.report(Waiting(0))  # weights may have to be loaded, and the first step takes its time
            try:
                outcome: Event | BaseException = Stopped() if ticket.is_stopped else self._make(ticket)
            except BaseException as error:
                logger.info("a request failed: %s", error)
                outcome = _explain(error)
            with self._changed:
                self._running = None
            ticket.report(outcome)
            del ticket, outcome  # a worker that waits holds no videos

    def _make(self, ticket: Ticket) -> Made | Stopped:
        request, inputs, began = ticket.request, ticket.inputs, time.monotonic()
        if request.mix is not None:  # as the sliders stand when the work begins
            inputs = replace(inputs, job=replace(inputs.job, mix=request.mix.as_tuple()))
        begun_with: dict[str, float] = dict(zip(MIX_CONTROLS, inputs.job.mix or (), strict=False))
        pipe = self._find_pipeline(inputs.job)
        keeps_latents = request.keeps_latents and not is_long(inputs.job)
        arguments = call_arguments([inputs]) | {"output_type": "latent", "keep_latents": keeps_latents}
        arguments["residual_cache"] = self._cache
        first, latents = 0, {}
        if request.resume is not None:
            first, latents = request.resume.step, dict(request.resume.latents)
            arguments |= {"resume_from": first, "latents": latents[first]}
        report = StepReport(
            ticket.report,
            lambda: ticket.is_stopped,
            inputs.job.seeds,
            request.mix,
            begun_with=begun_with,
            every=request.estimates_every,
        )
        arguments |= {
            "callback_on_step_end": report,
            "callback_on_step_end_tensor_inputs": report.tensor_names,
        }
        try:
            output = pipe(**arguments)
            if ticket.is_stopped:
                return Stopped()
            decoded = pipe.decode_latents(output.frames, inputs.job.decode_chunk_size, "cpu")
            if ticket.is_stopped:
                return Stopped()
            videos = [to_uint8(video) for video in decoded.permute(0, 1, 3, 4, 2).numpy()]
        finally:
            pipe.maybe_free_model_hooks()
        is_repeatable = request.resume is None and not report.has_moved
        latents = latents | dict(enumerate(output.latents, first)) if output.latents else {}
        return Made(inputs, videos, latents, time.monotonic() - began, is_repeatable)

    def _find_pipeline(self, job: SampleJob) -> Any:
        """The pipeline of a job's weights; the one that was loaded before gives way to another."""
        wanted = tuple(str(getattr(job, name)) for name in WEIGHT_FIELDS)
        with self._loading:
            if self._pipe is None or wanted != self._loaded:
                self._pipe = self._cache = None
                gc.collect()
                pipe = load_pipeline(job)
                pipe.set_progress_bar_config(disable=True)
                self._pipe, self._loaded, self._cache = pipe, wanted, ResidualCache(max_bytes=_CACHE_BYTES)
            return self._pipe


def is_long(job: SampleJob) -> bool:
    """Whether the videos of a job are made in several windows; it comes from `prepare`."""
    return cast(int, job.num_frames) > cast(int, job.window_frames)


def _explain(error: BaseException) -> BaseException:
    """The error, or what a visitor can do about memory that ran out."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        less = "`imageconductor app` with --vae-tiling, --offload or a smaller --width and --height needs less"
        return FieldError("generate", f"memory ran out; ask for fewer videos or frames, or, if it is your page: {less}")
    return error
