"""From a visitor's form to a stored result: the one function behind the page and the HTTP API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from imageconductor.apps.engine import Engine, Made, Request, Resume, Stopped, Ticket, is_long
from imageconductor.apps.form import (
    Form,
    build_job,
    explain,
    list_controls,
    list_cropped,
    list_gates,
    read_defaults,
    read_max_objects,
)
from imageconductor.apps.limits import FieldError, Limits
from imageconductor.apps.progress import Step, Waiting
from imageconductor.apps.results import Result
from imageconductor.apps.shelf import Shelf
from imageconductor.apps.visits import Visit, Visits
from imageconductor.sampling.job_files import change_job, load_job

News = Waiting | Step | Stopped | Result
"""What a visitor hears of a request; the last is `Stopped` or the `Result`."""


@dataclass
class Studio:
    """What all visitors of one page share.

    Attributes:
        engine: Model and queue.
        visits: What each visitor has.
        shelf: LoRAs to choose from.
    """

    engine: Engine
    visits: Visits
    shelf: Shelf = field(default_factory=Shelf)

    @property
    def limits(self) -> Limits:
        """Bounds of a request."""
        return self.engine.limits

    @cached_property
    def gates(self) -> list[str]:
        """What the model has of "object_gates" and "scene_gates"."""
        return list_gates(self.engine.base.model)

    @cached_property
    def controls(self) -> list[str]:
        """The controls whose LoRAs the model has."""
        return list_controls(self.engine.base.model)

    @cached_property
    def max_objects(self) -> int | None:
        """Boxes that the model takes; None = it has no object gates."""
        return read_max_objects(self.engine.base.model)

    def make(
        self, visit: Visit, form: Form, *, uses_mix: bool = False, resumed: tuple[int, int] | None = None
    ) -> Iterator[News]:
        """Makes the videos of a form and keeps them among the visit's results.

        Ending the iteration early stops the request.

        Args:
            visit: Whose they are.
            form: What is asked for.
            uses_mix: The mixing board's weights say how the drawing acts, in place of the control.
            resumed: Number of a result and step k, from which it is taken up again under this form; its seeds, steps,
                frames and few-step LoRA stay.

        Raises:
            FieldError: What was refused or failed, in plain words.
        """
        if resumed is not None:
            form = replace(form, frames=visit.result(resumed[0], "resume").job.num_frames)
        job = build_job(form, self.engine.base, self.shelf, self.limits, visit.folder)
        drawing = None if form.drawing is None else dict(form.drawing)
        try:
            cropped = [] if drawing is None else list_cropped(drawing, job)
            if uses_mix and job.trajectories is None:
                raise FieldError("drawing", "the mixing board weighs what the drawing does; draw a track first")
            request, note = Request(job, visit.mix if uses_mix else None), ""
            if resumed is not None:
                request = self._resume(visit, request, *resumed)
                note = f"made from the first {resumed[1]} steps of result {resumed[0]}"
            ticket = self._submit(request)
        finally:
            for path in (job.trajectories, job.boxes):
                if path is not None:
                    Path(path).unlink(missing_ok=True)  # the ticket holds what they say
        yield from self._follow(visit, ticket, note, drawing, cropped)

    def repeat(self, visit: Visit, number: int, **changes: Any) -> Iterator[News]:
        """Makes a result again with some settings changed, such as its steps, its seeds or its control.

        Args:
            visit: Whose result it is.
            number: Of the result.
            changes: Fields of `SampleJob`.

        Raises:
            FieldError: The result is no longer kept, or as `make`.
        """
        result = visit.result(number)
        try:
            job = change_job(load_job(result.folder / "run.yaml"), changes)
        except (ValueError, FileNotFoundError) as error:
            raise explain(error) from error
        yield from self._follow(visit, self._submit(Request(job)), "", result.drawing, result.cropped)

    def _submit(self, request: Request) -> Ticket:
        job = request.job
        steps = job.steps or read_defaults(job).num_inference_steps
        # About ten pictures of the estimate in all; none where the VAE waits in main memory.
        every = 0 if job.offload != "none" else max(1, steps // 10)
        try:
            return self.engine.submit(replace(request, estimates_every=every))
        except (ValueError, FileNotFoundError) as error:
            raise explain(error, job) from error

    def _follow(
        self, visit: Visit, ticket: Ticket, note: str, drawing: dict[str, Any] | None, cropped: Sequence[str]
    ) -> Iterator[News]:
        visit.begin(ticket)
        try:
            for event in ticket.events():
                if not isinstance(event, Made):
                    yield event
                    continue
                if ticket.is_stopped:  # while it was decoded
                    yield Stopped()
                    return
                if not event.is_repeatable and not note:
                    note = "the mixing board was moved while they were made"
                yield visit.keep(event, note, drawing, cropped)
        except (ValueError, OSError) as error:
            raise explain(error, ticket.request.job) from error
        except RuntimeError as error:  # of torch
            raise FieldError("generate", f"the model failed: {str(error).splitlines()[0][:200]}") from error
        finally:
            visit.end(ticket)

    def _resume(self, visit: Visit, request: Request, number: int, step: int) -> Request:
        """The request from step k of a result on, with what must be the same."""
        result = visit.result(number, "resume")
        old = result.job
        last = int(old.steps or 1) - 1
        if last < 1:
            raise FieldError("resume", "a video of one step cannot be taken up in between; make it with more steps")
        if is_long(old):
            raise FieldError("resume", f"a video of more than {old.window_frames} frames cannot be taken up in between")
        step = self.limits.check_number("resume", "the step", step, 1, last)
        try:
            latents = result.latents(step)
        except ValueError as error:
            raise FieldError("resume", str(error)) from None
        stays = {name: getattr(old, name) for name in ("seed", "steps", "few_step", "num_frames")}
        job = replace(request.job, **stays)
        return replace(request, job=job, resume=Resume(step, latents))
