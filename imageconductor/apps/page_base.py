"""What the functions behind the page's buttons share: the components, the visitor, the form and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from imageconductor.apps.form import Form, read_defaults
from imageconductor.apps.limits import FieldError, safe_name
from imageconductor.apps.live import show_error, translate
from imageconductor.apps.page_parts import Board, History, ResultView, Resuming, Settings, Sheet, Slots
from imageconductor.apps.studio import Studio
from imageconductor.apps.visits import Visit
from imageconductor.conditioning import load_image
from imageconductor.files import find_shipped, read_text
from imageconductor.sampling.job_files import load_job

_EXAMPLE = Path("configs/sample/sprites.yaml")

Updates = dict[Any, Any]
"""New values of components."""


@dataclass(frozen=True)
class Example:
    """What the page begins with: one click makes a video of it."""

    picture: Path
    drawing: dict[str, Any]
    prompt: str

    @classmethod
    def load(cls, folder: Path, num_frames: int) -> Example | None:
        """The bundled example, its picture copied into a folder; None where it is not installed."""
        config = find_shipped(_EXAMPLE)
        if not config.is_file():
            return None
        job = load_job(config)
        picture = folder / Path(str(job.image)).name
        shutil.copyfile(str(job.image), picture)
        drawing = json.loads(read_text(Path(str(job.trajectories))))
        return cls(picture, {**drawing, "num_frames": num_frames}, job.prompt)


@dataclass(frozen=True)
class Parts:
    """All components that events read or write.

    The browser keeps `picture`, `number` and `sheet_choice` in hidden fields: a gr.State is on the server, where Gradio
    forgets it after a lost connection, while the page still shows what it said.

    Attributes:
        picture: Name of the shown picture, for `PageEvents.find_picture`; empty = none.
        number: Of the shown result; 0 = none.
        sheet_choice: Number of the contact sheet and the seed that is picked.
    """

    upload: gr.File
    picture: gr.Textbox
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
    number: gr.Number
    sheet_choice: gr.JSON
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
        example: What the page begins with; None = an empty page.
    """

    def __init__(self, studio: Studio, parts: Parts, example: Example | None = None):
        self.studio, self.parts, self.example = studio, parts, example

    def visit(self, request: gr.Request) -> Visit:
        """The visit that an event belongs to."""
        return self.studio.visits.find(request.session_hash)

    def find_picture(self, visit: Visit, name: str | None) -> Path | None:
        """The file of the picture that a page shows, which may be gone; None if it shows none.

        Args:
            visit: Whose page it is.
            name: From the browser: of a file in the visitor's folder, or of the example.
        """
        if not name:
            return None
        if self.example is not None and name == self.example.picture.name:
            return self.example.picture
        return visit.folder / safe_name(name)

    def read_picture(self, path: Path) -> Image.Image:
        """The picture of a visitor's file.

        Raises:
            FieldError: It is none, or too large.
        """
        self.studio.limits.check_picture(path, safe_name(path.name))
        try:
            return load_image(path)
        except ValueError as error:
            raise FieldError("picture", str(error).replace(str(path), safe_name(path.name))) from error

    def read_form(self, visit: Visit, values: tuple[Any, ...]) -> Form:
        """The form from the values of `Parts.form_inputs`.

        Raises:
            FieldError: The shown picture is no longer kept.
        """
        name, drawing, *others = values
        picture = self.find_picture(visit, name)
        chosen = dict(zip(self.parts.settings.names, others, strict=True))
        look_scale, motion_scale = chosen.pop("look_scale"), chosen.pop("motion_scale")
        chosen["looks"] = dict.fromkeys(chosen["looks"] or [], look_scale)
        chosen["motions"] = dict.fromkeys(chosen["motions"] or [], motion_scale)
        chosen["base"] = chosen["base"] or ""
        usual = read_defaults(self.studio.engine.base)
        for name in ("guidance_scale", "trajectory_guidance_scale"):
            if chosen[name] == getattr(usual, name):
                chosen[name] = None  # left alone: the few-step LoRA has another default
        if picture is None:
            return Form(drawing=drawing, **chosen)
        size = None if drawing is None else self.read_picture(picture).size
        return Form(picture=str(picture), drawing=drawing, drawing_size=size, **chosen)

    def errors(self, error: FieldError | None = None) -> Updates:
        """The refusal in its place, and all other places empty."""
        slots = self.parts.slots.places
        updates: Updates = {slot: gr.update(value="", visible=False) for slot in slots.values()}
        if error is not None:
            place = slots[error.field if error.field in slots else "generate"]
            updates[place] = gr.update(value=show_error(translate(str(error))), visible=True)
        return updates
