"""The web page: draw on a picture, make it move, see camera and objects apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from imageconductor.apps.api import add_endpoint
from imageconductor.apps.editor import TrajectoryEditor, picture_url
from imageconductor.apps.form import read_defaults
from imageconductor.apps.page_base import Example, Parts
from imageconductor.apps.page_events import Events
from imageconductor.apps.page_parts import (
    Slots,
    build_board,
    build_history,
    build_picture,
    build_presets,
    build_result,
    build_resuming,
    build_settings,
    build_sheet,
)
from imageconductor.apps.studio import Studio
from imageconductor.checkpoints.model_folder import SamplingDefaults, check_shape, locate_model
from imageconductor.conditioning import load_image
from imageconductor.conditioning.trajectory_json import TRACK_CONTROLS

TITLE = "Image Conductor"
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

CACHE_SECONDS = 600
"""Between two looks for files that are old enough to be deleted."""

_COPY_SECONDS = 24 * 3600
"""That Gradio's copies of videos and uploads are kept, since a page that shows them may be open."""


def build_page(studio: Studio, folder: Path) -> gr.Blocks:
    """The page for the model of a studio.

    Args:
        studio: Model, queue and visitors.
        folder: Of the page's own files, which exists as long as the page does.

    Raises:
        ValueError: The model takes no videos of the studio's size.
    """
    limits, base = studio.limits, studio.engine.base
    defaults = read_defaults(base)
    check_shape(locate_model(base.model), (defaults.width, defaults.height))
    controls = [name for name in TRACK_CONTROLS if name in studio.controls]
    props = {"controls": controls, "max_tracks": limits.tracks, "max_points": limits.points}
    props |= {"max_objects": studio.max_objects, "picture_input": "#picture input[type=file]"}
    example = Example.load(folder, min(defaults.num_frames, limits.frames))
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(CACHE_SECONDS, _COPY_SECONDS), fill_width=True
    ) as page:
        gr.HTML(
            f"<h1>{TITLE}</h1><p>Draw on the picture how things move, and make the video.</p>",
            elem_classes="ic-head",
            padding=False,
        )
        slots = Slots()
        with gr.Row(elem_classes="ic-columns"):
            with gr.Column(scale=6, min_width=340):
                upload, again = build_picture(slots, example is not None)
                picture = gr.Textbox("" if example is None else example.picture.name, visible=False)
                editor = _build_editor(defaults, example, limits.frames, **props)
                slots.add("drawing")
            with gr.Column(scale=5, min_width=340):
                parts = _build_right(studio, defaults, slots, (upload, picture, editor), example)
        events = Events(studio, parts, example)
        _wire(events, parts)
        if example is not None:
            shown = [picture, editor, parts.settings.prompt, *slots.components]
            again.click(
                lambda: events.show_example(example), None, shown, show_progress="hidden", api_visibility="private"
            )
        add_endpoint(studio)
        page.unload(events.leave)
    return page


def _build_editor(
    defaults: SamplingDefaults, example: Example | None, max_frames: int, **props: Any
) -> TrajectoryEditor:
    """The editor with the example in it."""
    return TrajectoryEditor(
        None if example is None else example.drawing,
        image=None if example is None else picture_url(load_image(example.picture)),
        video_size=(defaults.width, defaults.height),
        num_frames=min(defaults.num_frames, max_frames),
        fps=defaults.fps,
        **props,
        elem_id="editor",
    )


def _build_right(
    studio: Studio,
    defaults: SamplingDefaults,
    slots: Slots,
    left: tuple[gr.File, gr.Textbox, TrajectoryEditor],
    example: Example | None,
) -> Parts:
    """Settings, the buttons, what happens, and the tabs."""
    limits = studio.limits
    prompt = "" if example is None else example.prompt
    settings = build_settings(slots, defaults, studio.shelf, limits, prompt, studio.controls, studio.gates)
    with gr.Row(elem_classes="ic-tight"):
        generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", scale=1, min_width=90)
    slots.add("generate")
    live = gr.HTML(elem_id="live", padding=False)
    result = build_result()
    with gr.Accordion("Camera and objects apart", open=False, elem_id="board", visible="mixed" in studio.controls):
        board = build_board(defaults)
    with gr.Accordion("Contact sheet of several seeds", open=False, elem_id="sheets"):
        sheet = build_sheet(defaults, limits)
    with gr.Accordion("Edit and resume", open=False, elem_id="resuming"):
        resuming = build_resuming(slots)
    with gr.Accordion("Videos of this visit, side by side", open=False, elem_id="visit"):
        history = build_history()
    with gr.Accordion("Motion presets", open=False, elem_id="presets"):
        save, preset_file, preset = build_presets(slots)
    return Parts(
        upload=left[0],
        picture=left[1],
        editor=left[2],
        settings=settings,
        slots=slots,
        generate=generate,
        stop=stop,
        live=live,
        result=result,
        board=board,
        sheet=sheet,
        resuming=resuming,
        history=history,
        number=gr.Number(0, precision=0, visible=False),
        sheet_choice=gr.JSON(visible=False),
        save_preset=save,
        preset=preset,
        preset_file=preset_file,
    )


def _wire(events: Events, parts: Parts) -> None:
    """Says which function each component calls."""
    quiet = _QUIET
    at_once: dict[str, Any] = {**quiet, "queue": False}
    # The engine has a queue of its own, so Gradio's only hands over.
    running: dict[str, Any] = {**quiet, "concurrency_limit": None}
    board, sheet, result, history = parts.board, parts.sheet, parts.result, parts.history
    errors = parts.slots.components

    form = parts.form_inputs
    parts.generate.click(
        events.make_videos, [board.is_used, *board.sliders.values(), *form], parts.run_outputs, **running
    )
    parts.resuming.make.click(events.resume, [parts.number, parts.resuming.step, *form], parts.run_outputs, **running)
    sheet_outputs = [*parts.run_outputs, sheet.gallery, sheet.refine, parts.sheet_choice]
    sheet.make.click(events.make_sheet, [sheet.count, sheet.steps, *form], sheet_outputs, **running)
    sheet.refine.click(events.refine, [parts.sheet_choice, parts.settings.steps], parts.run_outputs, **running)
    apart = [board.camera_video, board.object_video, board.camera_words, board.object_words]
    board.apart.click(events.show_apart, [parts.number, result.chosen], [*parts.run_outputs, *apart], **running)
    parts.stop.click(events.stop, None, None, **at_once)
    for slider in board.sliders.values():
        slider.change(events.mix, list(board.sliders.values()), None, trigger_mode="always_last", **at_once)

    sheet.gallery.select(events.pick, parts.sheet_choice, [parts.sheet_choice, sheet.refine], **at_once)
    view = [parts.number, result.chosen, result.overlay]
    for component in (result.chosen, result.overlay):
        component.input(events.switch, view, parts.run_outputs, **quiet)
    history.gallery.select(events.recall, result.overlay, parts.run_outputs, **quiet)
    history.compare.click(events.compare, [history.left, history.right], [history.both, *errors], **quiet)

    drawing = [parts.editor, *errors]
    frames = parts.settings.frames
    uploaded = [parts.upload, frames, parts.editor]
    parts.upload.upload(events.take_picture, uploaded, [parts.upload, parts.picture, *drawing], **quiet)
    frames.release(lambda count: gr.update(num_frames=int(count)), frames, parts.editor, **quiet)
    moved = [parts.settings.control, parts.settings.guidance_scale, parts.settings.trajectory_guidance_scale]
    moved += [parts.settings.scene_guidance_scale, parts.settings.first_frame_by, parts.settings.gated_fraction]
    moved += [parts.settings.camera_free_scale, parts.settings.looks, parts.settings.look_scale]
    moved += [parts.settings.motions, parts.settings.motion_scale]
    parts.preset.upload(events.load_preset, [parts.preset, parts.picture], [*drawing, *moved], **quiet)
    saved = [parts.editor, *parts.settings.components]
    parts.save_preset.click(events.save_preset, saved, [parts.preset_file, *errors], **quiet)
