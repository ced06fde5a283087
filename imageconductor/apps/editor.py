"""The drawing editor: a picture, tracks drawn on it with mouse, pen, finger or keys, and the motion played back.

All of the editor runs in the browser: the files in `static` are one script and one style sheet, joined here. Its value
is the JSON object of docs/trajectories.md in pixels of the picture, and comes from the browser: `check_drawing_value`
checks it.
"""

import base64
import io
from collections.abc import Sequence
from importlib import resources
from typing import Any
from unittest import mock

import gradio as gr
from gradio import component_meta
from PIL import Image

from imageconductor.apps.drawing import MAX_DRAWN_POINTS, MAX_DRAWN_TRACKS, import_tracks, list_presets

MAX_SHOWN_PX = 1536
"""Longest side of the picture that the browser gets; positions count in pixels of the original."""

_SCRIPTS = (
    *("motion.js", "drawing.js", "boxes.js", "view.js", "playback.js"),
    *("input.js", "box_input.js", "panels.js", "box_panel.js", "files.js", "editor.js"),
)
_PROPS = (
    "picture_input",
    "image",
    "video_size",
    "num_frames",
    "fps",
    "controls",
    "max_tracks",
    "max_points",
    "max_objects",
    "presets",
)
_JPEG_QUALITY = 88


# Gradio writes a stub file beside the module of each component class: not into this package, where it would hide what
# the module gets later from type checkers.
with mock.patch.object(component_meta, "create_or_modify_pyi", create=True):

    class TrajectoryEditor(gr.HTML):
        """The editor as a Gradio component. A `change` event follows each change of the drawing.

        Undo, presets, the camera's amounts, the timeline, import and export are parts of it and need no wiring.

        An event gives it a picture by returning `picture_update(image)`, and anything else by returning
        `gr.update(video_size=..., num_frames=..., fps=..., controls=...)`; what is left out stays. Such events take
        show_progress="hidden", since Gradio dims the component while they run, and must not return a value that the
        user may meanwhile have changed: leave `value` out.

        Args:
            value: {"width": W, "height": H, "num_frames": T, "tracks": [...], "camera": {...}, "objects": [...]} in
                pixels of the original picture, as docs/trajectories.md has it, and boxes as a boxes file has them; None
                = no picture. `blank_drawing` makes one.
            image: the picture as a data URL, which may be smaller than W x H; `picture_url` makes one. With another
                image, undo begins anew.
            video_size: [W, H] of the video; the part of the picture that `cover_crop` keeps for it is bright. None =
                all of it.
            num_frames: frames of the video. A drawing that counts in another number is counted anew.
            fps: at which the motion is played.
            controls: what the model's tracks may move, of "camera" and "object": with both, tracks are marked.
            max_tracks: largest number of tracks that can be drawn.
            max_points: largest number of points of all tracks that are imported.
            max_objects: largest number of boxes that can be drawn; None = none, and there is no tool for them.
            picture_input: CSS selector of the page's file input, which gets a picture that is dropped on the editor.
            presets: from `list_presets`; None = those.
            html: further arguments of gr.HTML, such as elem_id and visible.
        """

        def __init__(
            self,
            value: dict[str, Any] | None = None,
            *,
            image: str | None = None,
            video_size: Sequence[int] | None = None,
            num_frames: int = 16,
            fps: float = 8,
            controls: Sequence[str] = ("camera", "object"),
            max_tracks: int = MAX_DRAWN_TRACKS,
            max_points: int = MAX_DRAWN_POINTS,
            max_objects: int | None = None,
            picture_input: str | None = None,
            presets: dict[str, Any] | None = None,
            **html: Any,
        ) -> None:
            super().__init__(
                value,
                html_template='<div class="ic-editor"></div>',
                css_template=_read("editor.css"),
                js_on_load="\n".join(_read(name) for name in _SCRIPTS),
                apply_default_css=False,
                server_functions=[import_tracks],
                image=image,
                video_size=None if video_size is None else list(video_size),
                num_frames=num_frames,
                fps=fps,
                controls=list(controls),
                max_tracks=max_tracks,
                max_points=max_points,
                max_objects=max_objects,
                picture_input=picture_input,
                presets=list_presets() if presets is None else presets,
                **html,
            )

        def __getattr__(self, name: str) -> Any:
            # gr.HTML takes any name that the script has in quotes for an event, and would send it in updates.
            if name in _PROPS:
                raise AttributeError(name)
            return super().__getattr__(name)

        def api_info(self) -> dict[str, Any]:
            """The value's kind for Gradio's HTTP API."""
            return {"type": {}, "description": "a drawing as in docs/trajectories.md, an object"}

        def example_payload(self) -> Any:
            """A value for the documentation of the API."""
            return {"width": 384, "height": 256, "tracks": [{"points": [[60, 200], [240, 90]]}]}

        def example_value(self) -> Any:
            """A value for the documentation of the API."""
            return self.example_payload()


def blank_drawing(size: tuple[int, int], num_frames: int) -> dict[str, Any]:
    """The value of a picture of (W, H) on which nothing is drawn."""
    return {"width": size[0], "height": size[1], "num_frames": num_frames, "tracks": []}


def picture_url(picture: Image.Image) -> str:
    """A data URL of a picture for `image`: JPEG of at most 1536 pixels a side."""
    shown = picture.convert("RGB")
    shown.thumbnail((MAX_SHOWN_PX, MAX_SHOWN_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_update(
    picture: Image.Image, num_frames: int = 16, value: dict[str, Any] | None = None, **props: Any
) -> Any:
    """What an event returns for the editor to show another picture.

    Args:
        picture: RGB, as `load_image` gives it.
        num_frames: of the video.
        value: a drawing on it; None = a blank one.
        props: further arguments of `TrajectoryEditor`.
    """
    value = blank_drawing(picture.size, num_frames) if value is None else value
    return gr.update(value=value, image=picture_url(picture), num_frames=num_frames, **props)


def _read(name: str) -> str:
    return resources.files("imageconductor.apps").joinpath("static").joinpath(name).read_text(encoding="utf-8")
