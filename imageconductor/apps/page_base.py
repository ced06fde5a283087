"""What the functions behind the page's buttons share: the components, the visitor, the form and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from imageconductor.apps.form import Form, read_defaults
from imageconductor.apps.limits import FieldError
from imageconductor.apps.live import count_from_one, show_error
from imageconductor.apps.page_parts import Board, History, ResultView, Resuming, Settings, Sheet, Slots
from imageconductor.apps.studio import Studio
from imageconductor.apps.visits import Visit

Updates = dict[Any, Any]
"""New values of components."""


@dataclass(frozen=True)
class Parts:
    """All components that events read or write."""

    upload: gr.File
    picture: gr.State
    editor: Any
    settings: Settings
    slots: Slots
    generate: gr.Button
    stop: gr.Button
    live: gr.HTML
    result: ResultView
    board: Board
    sheet: Sheet
    resuming: Resuming
    history: History
    number: gr.State
    sheet_choice: gr.State
    save_preset: gr.Button
    preset: gr.UploadButton
    preset_file: gr.DownloadButton

    @property
    def form_inputs(self) -> list[Any]:
        """What `Events.read_form` takes."""
        return [self.picture, self.editor, *self.settings.components]

    @property
    def run_outputs(self) -> list[Any]:
        """What a request changes."""
        view = [getattr(self.result, name) for name in self.result.__dataclass_fields__]
        history = [self.history.gallery, self.history.left, self.history.right]
        mine = [self.generate, self.stop, self.live, self.number, self.resuming.step]
        return [*mine, *self.slots.components, *view, *history]


class PageEvents:
    """Functions of one page.

    Args:
        studio: What makes the videos.
        parts: The components.
    """

    def __init__(self, studio: Studio, parts: Parts):
        self.studio, self.parts = studio, parts

    def visit(self, request: gr.Request) -> Visit:
        """The visit that an event belongs to."""
        return self.studio.visits.find(request.session_hash)

    def read_form(self, values: tuple[Any, ...]) -> Form:
        """The form from the values of `Parts.form_inputs`."""
        picture, drawing, *others = values
        chosen = dict(zip(self.parts.settings.names, others, strict=True))
        look_scale, motion_scale = chosen.pop("look_scale"), chosen.pop("motion_scale")
        chosen["looks"] = dict.fromkeys(chosen["looks"] or [], look_scale)
        chosen["motions"] = dict.fromkeys(chosen["motions"] or [], motion_scale)
        chosen["base"] = chosen["base"] or ""
        usual = read_defaults(self.studio.engine.base.model)
        for name in ("guidance_scale", "trajectory_guidance_scale"):
            if chosen[name] == getattr(usual, name):
                chosen[name] = None  # left alone: the few-step LoRA has another default
        return Form(picture=picture, drawing=drawing, **chosen)

    def errors(self, error: FieldError | None = None) -> Updates:
        """The refusal in its place, and all other places empty."""
        slots = self.parts.slots.places
        updates: Updates = {slot: gr.update(value="", visible=False) for slot in slots.values()}
        if error is not None:
            place = slots[error.field if error.field in slots else "generate"]
            text = count_from_one(str(error)) if error.field == "drawing" else str(error)
            updates[place] = gr.update(value=show_error(text), visible=True)
        return updates
