"""The page's picture, and motion presets as files."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import Any

import gradio as gr

from imageconductor.apps.editor import picture_update, picture_url
from imageconductor.apps.form import AUTOMATIC
from imageconductor.apps.limits import FieldError, safe_name
from imageconductor.apps.motion_preset import MotionPreset, fit_drawing
from imageconductor.apps.page_base import Example, PageEvents, Updates
from imageconductor.conditioning import load_image


class MotionEvents(PageEvents):
    """Functions that put pictures and drawings into the editor."""

    def show_example(self, example: Example) -> Updates:
        """The example, as the page began."""
        picture = load_image(example.picture)
        editor = picture_update(picture, example.drawing["num_frames"], example.drawing)
        return {
            **self.errors(),
            self.parts.picture: example.picture.name,
            self.parts.editor: editor,
            self.parts.settings.prompt: example.prompt,
        }

    def take_picture(self, request: gr.Request, uploaded: str, frames: int, drawing: Any) -> Updates:
        """A new picture for the editor; the place to drop one is free again.

        What the visitor has drawn stays where the new picture has the old one's size.
        """
        ready = {self.parts.upload: None}
        try:
            picture = self.read_picture(Path(uploaded))
        except FieldError as error:
            return {**self.errors(error), **ready}
        # Uploads are deleted after a while, even if the visitor still works with them.
        kept = self.visit(request).folder / f"picture-{secrets.token_hex(8)}{Path(uploaded).suffix[:8]}"
        shutil.copyfile(uploaded, kept)
        editor = picture_update(picture, int(frames))
        is_drawn = isinstance(drawing, dict) and (self.example is None or drawing != self.example.drawing)
        if is_drawn and (drawing.get("width"), drawing.get("height")) == picture.size:
            editor = gr.update(image=picture_url(picture))
        return {**self.errors(), **ready, self.parts.picture: kept.name, self.parts.editor: editor}

    def save_preset(self, request: gr.Request, drawing: Any, *values: Any) -> Updates:
        """The motion of the form as a file to download."""
        chosen: dict[str, Any] = dict(zip(self.parts.settings.names, values, strict=True))
        try:
            checked = None
            if drawing is not None:
                checked = self.studio.limits.check_drawing(
                    drawing, int(chosen["frames"]), max_objects=self.studio.max_objects
                )
        except FieldError as error:
            return self.errors(error)
        preset = MotionPreset(
            drawing=checked,
            control=None if chosen["control"] == AUTOMATIC else chosen["control"],
            guidance_scale=chosen["guidance_scale"],
            trajectory_guidance_scale=chosen["trajectory_guidance_scale"],
            camera_free_scale=chosen["camera_free_scale"] or None,
            scene_guidance_scale=None if chosen["scene_guidance_scale"] == 1 else chosen["scene_guidance_scale"],
            first_frame_by=None if chosen["first_frame_by"] == AUTOMATIC else chosen["first_frame_by"],
            gated_fraction=None if chosen["gated_fraction"] == 1 else chosen["gated_fraction"],
            looks={name: chosen["look_scale"] for name in chosen["looks"] or []},
            motions={name: chosen["motion_scale"] for name in chosen["motions"] or []},
        )
        path = self.visit(request).folder / "motion.json"
        path.write_text(preset.to_text(), encoding="utf-8")
        return {**self.errors(), self.parts.preset_file: gr.update(value=str(path), visible=True)}

    def load_preset(self, request: gr.Request, path: str, name: str) -> Updates:
        """The drawing of a preset, scaled with the shown picture, and its settings; the old one if it has none."""
        settings, shelf = self.parts.settings, self.studio.shelf
        try:
            preset = MotionPreset.read(Path(path), self.studio.limits, safe_name(path), self.studio.max_objects)
            missing = [name for name in preset.looks if name not in shelf.looks]
            missing += [name for name in preset.motions if name not in shelf.motions]
            if missing:
                raise FieldError("preset", f"this page has no LoRA called {', '.join(missing)[:120]}")
            if preset.control not in (None, *self.studio.controls):
                raise FieldError("preset", f"this model has no LoRA for control {preset.control!r} of this motion")
            drawing, picture = preset.drawing, self.find_picture(self.visit(request), name)
            if drawing is not None and picture is not None:
                drawing = fit_drawing(drawing, self.read_picture(picture).size)
        except FieldError as error:
            return self.errors(error)
        changes = {} if drawing is None else {self.parts.editor: gr.update(value=drawing)}
        changes |= {
            settings.control: preset.control or AUTOMATIC,
            settings.looks: list(preset.looks),
            settings.motions: list(preset.motions),
            settings.camera_free_scale: preset.camera_free_scale or 0,
            settings.scene_guidance_scale: 1 if preset.scene_guidance_scale is None else preset.scene_guidance_scale,
            settings.gated_fraction: 1 if preset.gated_fraction is None else preset.gated_fraction,
        }
        if "scene_gates" in self.studio.gates:
            changes[settings.first_frame_by] = preset.first_frame_by or AUTOMATIC
        for component, value in (
            (settings.guidance_scale, preset.guidance_scale),
            (settings.trajectory_guidance_scale, preset.trajectory_guidance_scale),
            (settings.look_scale, next(iter(preset.looks.values()), None)),
            (settings.motion_scale, next(iter(preset.motions.values()), None)),
        ):
            changes[component] = component.value if value is None else value  # what the page begins with
        return {**self.errors(), **changes}
