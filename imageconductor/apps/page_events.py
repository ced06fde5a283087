"""What the page's buttons do: from the values of components to updates of components."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import gradio as gr

from imageconductor.apps.engine import Stopped
from imageconductor.apps.limits import FieldError
from imageconductor.apps.live import show_done, show_pictures, show_step, show_stopped, show_waiting
from imageconductor.apps.page_base import Updates
from imageconductor.apps.page_motion import MotionEvents
from imageconductor.apps.page_results import ResultEvents, choose_seed, list_thumbnails, show_words
from imageconductor.apps.progress import Step, Waiting
from imageconductor.apps.studio import News
from imageconductor.apps.visits import Visit

logger = logging.getLogger(__name__)


class Events(ResultEvents, MotionEvents):
    """All functions of a page; these make videos."""

    def make_videos(
        self, request: gr.Request, use_mix: bool, camera: float, object: float, mixed: float, *values: Any
    ) -> Iterator[Updates]:
        """The videos of the form, with the mixing board as it stands."""
        visit = self.visit(request)
        visit.mix.set(camera=float(camera), object=float(object), mixed=float(mixed))
        yield from self._run(visit, lambda: self.studio.make(visit, self.read_form(visit, values), uses_mix=use_mix))

    def resume(self, request: gr.Request, number: int, step: int, *values: Any) -> Iterator[Updates]:
        """The shown result again from a step on, under the present form."""
        visit = self.visit(request)
        yield from self._run(
            visit, lambda: self.studio.make(visit, self.read_form(visit, values), resumed=(number, int(step)))
        )

    def make_sheet(self, request: gr.Request, count: int, steps: int, *values: Any) -> Iterator[Updates]:
        """Several seeds from few steps."""
        visit, sheet = self.visit(request), self.parts.sheet

        def make() -> Iterator[News]:
            form = replace(self.read_form(visit, values), videos=int(count), steps=int(steps))
            return self.studio.make(visit, form)

        for updates in self._run(visit, make):
            if (number := updates.get(self.parts.number)) is not None:
                result = visit.result(number)
                updates[sheet.gallery] = gr.update(value=list_thumbnails([result], all_seeds=True), selected_index=None)
                updates[sheet.refine] = gr.update(value="Pick a video above", interactive=False)
                updates[self.parts.sheet_choice] = {"number": number, "seed": None}
            yield updates

    def pick(self, choice: Mapping[str, Any] | None, request: gr.Request, event: gr.SelectData) -> Updates:
        """A video of the sheet is chosen."""
        number = (choice or {}).get("number")
        try:
            seed = self.visit(request).result(number).seeds[int(event.index)]
        except (FieldError, IndexError):
            return {self.parts.sheet.refine: gr.update(value="Make a sheet first", interactive=False)}
        button = gr.update(value=f"Make seed {seed} with all steps", interactive=True)
        return {self.parts.sheet_choice: {"number": number, "seed": seed}, self.parts.sheet.refine: button}

    def refine(self, choice: Mapping[str, Any] | None, steps: int, request: gr.Request) -> Iterator[Updates]:
        """The chosen seed of the sheet with all steps."""
        visit = self.visit(request)

        def make() -> Iterator[News]:
            seed = (choice or {}).get("seed")
            if not choice or seed not in visit.result(choice.get("number")).seeds:
                raise FieldError("generate", "pick a video of the contact sheet first")
            all_steps = self.studio.limits.check_number("steps", "Steps", steps, 1, self.studio.limits.steps)
            return self.studio.repeat(visit, choice["number"], seed=[seed], steps=all_steps)

        yield from self._run(visit, make)

    def show_apart(self, number: int, seed: Any, request: gr.Request) -> Iterator[Updates]:
        """The shown video once under the camera LoRA alone and once under the object LoRA alone."""
        visit, board = self.visit(request), self.parts.board
        places = {
            "camera": (board.camera_video, board.camera_words),
            "object": (board.object_video, board.object_words),
        }
        for control, (video, words) in places.items():

            def make(control: str = control) -> Iterator[News]:
                result = visit.result(number)
                if not result.displacement:
                    raise FieldError("drawing", "nothing is drawn in this video, so there is no motion to take apart")
                chosen = choose_seed(result, seed)
                return self.studio.repeat(
                    visit, number, control=control, seed=[chosen], camera_free_scale=None, mix=None
                )

            made = None
            for updates in self._run(visit, make, is_shown=False):
                if (made := updates.pop(self.parts.number, None)) is not None:
                    result = visit.result(made)
                    updates[video] = str(result.find("video.mp4", result.seeds[0]))
                    updates[words] = show_words([result.displacement[0]])
                yield updates
            if made is None:
                return

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.studio.visits.leave(request.session_hash)

    def stop(self, request: gr.Request) -> None:
        """Stops what this visitor has asked for."""
        self.visit(request).stop()

    def mix(self, camera: float, object: float, mixed: float, request: gr.Request) -> None:
        """The sliders of the mixing board, which a running request reads at its next step."""
        self.visit(request).mix.set(camera=float(camera), object=float(object), mixed=float(mixed))

    def _run(self, visit: Visit, make: Any, is_shown: bool = True) -> Iterator[Updates]:
        """Updates from the first click to the result, or to the refusal beside its field."""
        parts, pictures, last = self.parts, "", None
        yield {
            **self.errors(),
            parts.live: show_waiting(Waiting(0)),
            parts.stop: gr.update(interactive=True),
            parts.generate: gr.update(interactive=False),
        }

        def idle() -> Updates:  # A request of other buttons may still be running.
            return {parts.generate: gr.update(interactive=True), parts.stop: gr.update(interactive=visit.is_busy)}

        ended: Updates = {}
        try:
            for news in make():
                if isinstance(news, Waiting):
                    yield {parts.live: show_waiting(news)}
                elif isinstance(news, Step):
                    pictures, last = show_pictures(news) or pictures, news if news.branches else last
                    yield {parts.live: show_step(news, last=pictures)}
                elif isinstance(news, Stopped):
                    ended = {parts.live: show_stopped()}
                else:
                    shown = self.show_result(news) if is_shown else {parts.number: news.number}
                    live = show_done(news.title, news.seconds, last)
                    ended = {parts.live: live, **shown, **self.list_results(visit)}
        except FieldError as error:
            ended = {**self.errors(error), parts.live: ""}
        except Exception:
            logger.exception("a request of the page failed")
            said = "this failed on the server, whose log says why; try again, or reload the page"
            ended = {**self.errors(FieldError("generate", said)), parts.live: ""}
        yield {**ended, **idle()}
