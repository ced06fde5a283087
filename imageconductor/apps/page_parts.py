"""The parts of the page as Gradio components, without what they do."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from imageconductor.apps.form import AUTOMATIC
from imageconductor.apps.limits import PICTURE_SUFFIXES, Limits
from imageconductor.apps.live import LABELS
from imageconductor.apps.shelf import Shelf
from imageconductor.checkpoints.model_folder import SamplingDefaults

CONTROLS = [
    ("as the tracks say", AUTOMATIC),
    ("objects", "object"),
    ("the camera", "camera"),
    ("both", "mixed"),
    ("no LoRA", "base"),
]
FIRST_FRAMES = [
    ("both where there are boxes", AUTOMATIC),
    ("its ControlNet", "controlnet"),
    ("the scene gates", "gates"),
    ("both", "both"),
]


@dataclass(frozen=True)
class Settings:
    """Components of the form, by the names of `Form`; picture and drawing apart."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    seed: gr.Number
    videos: gr.Number
    steps: gr.Number
    frames: gr.Slider
    control: gr.Radio
    guidance_scale: gr.Slider
    trajectory_guidance_scale: gr.Slider
    camera_free_scale: gr.Slider
    scene_guidance_scale: gr.Slider
    first_frame_by: gr.Radio
    gated_fraction: gr.Slider
    base: gr.Dropdown
    looks: gr.Dropdown
    look_scale: gr.Slider
    motions: gr.Dropdown
    motion_scale: gr.Slider

    @property
    def names(self) -> list[str]:
        """In the order of `components`."""
        return [one.name for one in fields(self)]

    @property
    def components(self) -> list[Any]:
        """All, as inputs of an event."""
        return [getattr(self, name) for name in self.names]


class Slots:
    """Places for refusals, by the field that they concern; those of folded settings stand beside Generate."""

    def __init__(self) -> None:
        self.places: dict[str, gr.HTML] = {}

    def add(self, field: str) -> None:
        """A place, here in the layout, which is empty at first."""
        self.places[field] = gr.HTML(visible=False, elem_id=f"error-{field}", padding=False)

    @property
    def components(self) -> list[gr.HTML]:
        """All, as outputs of an event."""
        return list(self.places.values())


def build_picture(slots: Slots, has_example: bool) -> tuple[gr.File, gr.Button]:
    """The place to drop a picture on, and a button that brings the example back."""
    with gr.Row(elem_classes="ic-tight"):
        picture = gr.File(
            label=f"Picture ({', '.join(suffix[1:] for suffix in PICTURE_SUFFIXES[:4])} ...)",
            height=110,
            elem_id="picture",
            scale=5,
        )
        button = gr.Button(
            "Example",
            visible=has_example,
            scale=0,
            min_width=90,
            elem_id="example",
            size="sm",
            elem_classes="ic-beside",
        )
    slots.add("picture")
    return picture, button


def build_settings(
    slots: Slots,
    defaults: SamplingDefaults,
    shelf: Shelf,
    limits: Limits,
    prompt: str,
    controls: Collection[str],
    gates: Collection[str],
) -> Settings:
    """Prompt, seed and steps in sight, the rest folded away; the model's defaults are filled in.

    Args:
        slots: For refusals.
        defaults: Of the model.
        shelf: LoRAs to choose from.
        limits: Bounds.
        prompt: To begin with.
        controls: Of which the model has the LoRAs.
        gates: What the model has of "object_gates" and "scene_gates", whose settings are shown.
    """
    made: dict[str, Any] = {}
    made["prompt"] = gr.Textbox(prompt, label="Prompt", lines=2, max_length=limits.prompt_chars, elem_id="prompt")
    slots.add("prompt")
    with gr.Row(elem_classes="ic-tight"):
        made["seed"] = gr.Number(1, label="Seed", precision=0, minimum=0, min_width=110, scale=2, elem_id="seed")
        dice = gr.Button("Roll", min_width=60, scale=0, elem_id="dice", size="sm", elem_classes="ic-beside")
        made["videos"] = gr.Number(1, label="Videos", precision=0, minimum=1, min_width=70, elem_id="videos")
        steps = min(defaults.num_inference_steps, limits.steps)
        made["steps"] = gr.Number(steps, label="Steps", precision=0, minimum=1, min_width=70, elem_id="steps")
    slots.add("seed")
    slots.add("steps")
    dice.click(None, None, made["seed"], js="() => Math.floor(Math.random() * 2147483647)", api_visibility="private")
    offered = [(label, value) for label, value in CONTROLS if value in (AUTOMATIC, *controls)]
    made["control"] = gr.Radio(offered, value=AUTOMATIC, label="The drawing moves", elem_id="control")
    slots.add("control")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        made["negative_prompt"] = gr.Textbox(
            defaults.negative_prompt, label="Negative prompt", max_length=limits.prompt_chars
        )
        made["guidance_scale"] = gr.Slider(1, 20, defaults.guidance_scale, step=0.1, label=LABELS["guidance_scale"])
        made["trajectory_guidance_scale"] = gr.Slider(
            1, 5, defaults.trajectory_guidance_scale, step=0.1, label=LABELS["trajectory_guidance_scale"]
        )
        made["camera_free_scale"] = gr.Slider(
            0, 5, 0, step=0.1, label=LABELS["camera_free_scale"], info="0 = off; objects only; Eq. 5 of the paper"
        )
        made |= _build_gate_settings(gates)
        frames = min(defaults.num_frames, limits.frames)
        made["frames"] = gr.Slider(2, limits.frames, frames, step=1, label="Frames", elem_id="frames")
        made |= _build_loras(shelf)
    return Settings(**made)


def _build_gate_settings(gates: Collection[str]) -> dict[str, Any]:
    """How boxes and the gates' first frame act; hidden where the model has none."""
    has_gates = bool(gates)
    return {
        "scene_guidance_scale": gr.Slider(
            1, 10, 1, step=0.1, label=LABELS["scene_guidance_scale"], visible=has_gates, elem_id="scene-guidance"
        ),
        "first_frame_by": gr.Radio(
            FIRST_FRAMES,
            value=AUTOMATIC,
            label=LABELS["first_frame_by"],
            visible="scene_gates" in gates,
            elem_id="first-frame-by",
        ),
        "gated_fraction": gr.Slider(
            0,
            1,
            1,
            step=0.05,
            label=LABELS["gated_fraction"],
            info="from the first step on; later steps are free",
            visible=has_gates,
            elem_id="gated-fraction",
        ),
    }


def _build_loras(shelf: Shelf) -> dict[str, Any]:
    """Rows for what is on the shelf; what it has none of is not shown."""
    bases, looks, motions = (bool(row) for row in (shelf.bases, shelf.looks, shelf.motions))
    made: dict[str, Any] = {
        "base": gr.Dropdown([("the model's own", ""), *shelf.bases], value="", label="Base", visible=bases)
    }
    for name, label, row in (("look", "Looks", looks), ("motion", "Learned motions", motions)):
        with gr.Row(elem_classes="ic-tight"):
            choices = list(getattr(shelf, f"{name}s"))
            made[f"{name}s"] = gr.Dropdown(choices, value=[], label=label, multiselect=True, visible=row)
            made[f"{name}_scale"] = gr.Slider(-1, 2, 1, step=0.05, label="Scale", min_width=120, visible=row)
    return made


@dataclass(frozen=True)
class ResultView:
    """The latest result, or one that was chosen among those of the visit."""

    video: gr.Video
    first_frame: gr.Image
    chosen: gr.Radio
    overlay: gr.Checkbox
    words: gr.HTML
    mp4: gr.DownloadButton
    gif: gr.DownloadButton
    trajectories: gr.DownloadButton
    boxes: gr.DownloadButton
    run: gr.DownloadButton
    everything: gr.DownloadButton


def build_result() -> ResultView:
    """The video, its first frame, and downloads."""
    with gr.Row():
        video = gr.Video(
            label="Video", autoplay=True, loop=True, interactive=False, buttons=[], height=330, elem_id="video", scale=3
        )
        first = gr.Image(
            label="First frame",
            interactive=False,
            buttons=[],
            height=330,
            elem_id="first-frame",
            scale=2,
            min_width=120,
        )
    with gr.Row(elem_classes="ic-tight"):
        chosen = gr.Radio([], label="Seed", visible=False, elem_id="chosen-seed")
        overlay = gr.Checkbox(False, label="Show the drawing on it", elem_id="overlay", min_width=170)
    words = gr.HTML(elem_id="result-words", padding=False)
    with gr.Row(elem_classes="ic-downloads"):
        buttons = [
            gr.DownloadButton(label, size="sm", visible=False, min_width=86, elem_id=f"get-{name}")
            for label, name in (
                ("Video", "mp4"),
                ("GIF", "gif"),
                ("Drawing", "trajectories"),
                ("Boxes", "boxes"),
                ("run.yaml", "run"),
                ("Everything", "everything"),
            )
        ]
    return ResultView(video, first, chosen, overlay, words, *buttons)


@dataclass(frozen=True)
class Board:
    """The part that shows camera and objects apart."""

    is_used: gr.Checkbox
    camera: gr.Slider
    object: gr.Slider
    mixed: gr.Slider
    apart: gr.Button
    camera_video: gr.Video
    object_video: gr.Video
    camera_words: gr.HTML
    object_words: gr.HTML

    @property
    def sliders(self) -> dict[str, gr.Slider]:
        """By the names of the weights."""
        return {"camera": self.camera, "object": self.object, "mixed": self.mixed}


def build_board(defaults: SamplingDefaults) -> Board:
    """Sliders of the mixing board, and videos of each part of the motion."""
    usual = (
        defaults.trajectory_guidance_scale
    )  # without text guidance, the object's weight that equals control "object"
    gr.Markdown(
        "The drawing acts through separate LoRAs for the camera and for objects. With the mixing board, the strip "
        "above shows what each of them wants after every step, and the weights act from the next step on."
    )
    replaced = [f"“{LABELS[name]}”" for name in ("trajectory_guidance_scale", "camera_free_scale")]
    is_used = gr.Checkbox(
        False,
        label="Use the mixing board",
        info=f"Generate then leaves “The drawing moves”, {' and '.join(replaced)} aside.",
        elem_id="use-mix",
    )
    with gr.Row(elem_classes="ic-tight"):
        begin = (("camera", "Camera", 0), ("object", "Objects", usual), ("mixed", "Both LoRAs", 0))
        sliders = {
            name: gr.Slider(-2, 5, value, step=0.05, label=label, min_width=130, elem_id=f"mix-{name}")
            for name, label, value in begin
        }
    apart = gr.Button("Make the shown video as camera only and as objects only", size="sm", elem_id="apart")
    parts: dict[str, Any] = {}
    with gr.Row():
        for name, label in (("camera", "Camera only"), ("object", "Objects only")):
            with gr.Column(min_width=160):
                parts[f"{name}_video"] = gr.Video(
                    label=label,
                    autoplay=True,
                    loop=True,
                    interactive=False,
                    buttons=[],
                    height=240,
                    elem_id=f"{name}-video",
                )
                parts[f"{name}_words"] = gr.HTML(elem_id=f"{name}-words", padding=False)
    return Board(is_used=is_used, apart=apart, **sliders, **parts)


@dataclass(frozen=True)
class Sheet:
    """The part with the contact sheet."""

    count: gr.Slider
    steps: gr.Slider
    make: gr.Button
    gallery: gr.Gallery
    refine: gr.Button


def build_sheet(defaults: SamplingDefaults, limits: Limits) -> Sheet:
    """Many seeds from few steps, of which one is refined."""
    few = max(1, min(8, defaults.num_inference_steps // 3))
    gr.Markdown("Several seeds from few steps, made together. Pick one and make it with all steps.")
    with gr.Row(elem_classes="ic-tight"):
        count = gr.Slider(2, limits.videos, min(6, limits.videos), step=1, label="Seeds", elem_id="sheet-count")
        steps = gr.Slider(1, limits.steps, few, step=1, label="Steps of the sheet", elem_id="sheet-steps")
        make = gr.Button("Make a sheet", elem_id="make-sheet", min_width=120)
    gallery = _gallery("Contact sheet", "sheet")
    refine = gr.Button("Pick a video above", interactive=False, elem_id="refine")
    return Sheet(count, steps, make, gallery, refine)


@dataclass(frozen=True)
class Resuming:
    """The part that takes a finished video up again."""

    step: gr.Slider
    make: gr.Button


def build_resuming(slots: Slots) -> Resuming:
    """The step from which on the present drawing and settings act."""
    gr.Markdown(
        "Change the drawing, the prompt or a scale, and make the shown video again from a step in between. What the "
        "steps before have decided stays; a late step keeps most of the video."
    )
    with gr.Row(elem_classes="ic-tight"):
        step = gr.Slider(1, 2, 1, step=1, label="Steps that stay", elem_id="resume-step")
        make = gr.Button("Make it again from there", elem_id="resume", min_width=150)
    slots.add("resume")
    return Resuming(step, make)


@dataclass(frozen=True)
class History:
    """The part with earlier results of this visit."""

    gallery: gr.Gallery
    left: gr.Dropdown
    right: gr.Dropdown
    compare: gr.Button
    both: gr.Video


def build_history() -> History:
    """Earlier results, and two of them side by side."""
    gallery = _gallery("This visit", "history")
    with gr.Row(elem_classes="ic-tight"):
        left = gr.Dropdown([], label="Left", elem_id="compare-left", min_width=130)
        right = gr.Dropdown([], label="Right", elem_id="compare-right", min_width=130)
        compare = gr.Button("Side by side", elem_id="compare", min_width=100)
    both = gr.Video(
        label="Side by side", autoplay=True, loop=True, interactive=False, buttons=[], elem_id="both", height=260
    )
    return History(gallery, left, right, compare, both)


def build_presets(slots: Slots) -> tuple[gr.Button, gr.DownloadButton, gr.UploadButton]:
    """To save the motion as a file, to download that file, and to play one."""
    gr.Markdown("The drawing, what it moves, scales and LoRAs as one small file, which plays on any picture.")
    with gr.Row(elem_classes="ic-tight"):
        save = gr.Button("Save this motion", elem_id="save-preset", min_width=130)
        saved = gr.DownloadButton("Download motion.json", visible=False, elem_id="get-preset", min_width=130)
        play = gr.UploadButton("Play a saved motion", file_count="single", elem_id="load-preset", min_width=130)
    slots.add("preset")
    return save, saved, play


def _gallery(label: str, name: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        columns=3,
        fit_columns=False,
        object_fit="contain",
        height="auto",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id=name,
    )
