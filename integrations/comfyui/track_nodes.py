"""Nodes that make tracks: from text, presets and amounts of camera motion.

Tracks are placed when the size and the number of frames of the video are known, which is in the node that samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imageconductor.conditioning import (
    CAMERA_PRESETS,
    EASINGS,
    OBJECT_PRESETS,
    Trajectories,
    camera_motion,
    camera_preset,
    object_preset,
)
from imageconductor.conditioning.formats import TrackFile, parse_tracks
from imageconductor.conditioning.formats.json_files import parse_json
from imageconductor.conditioning.trajectories import MAX_TRACKS
from imageconductor.sampling.job_conditions import crop_drawn

from . import host

logger = logging.getLogger(__name__)

Place = Callable[[tuple[int, int], int], Trajectories]
"""Makes tracks of a size (W, H) and a number of frames."""

_HOW = "give the size of the editor's canvas as the node's width and height"


@dataclass(frozen=True)
class Tracks:
    """What flows between nodes: sets of tracks that are not placed yet."""

    parts: tuple[Place, ...]

    def place(self, size: tuple[int, int], num_frames: int) -> Trajectories:
        """All tracks, in order, for a video of `size` (W, H).

        Raises:
            ValueError: A part does not fit into the video.
        """
        return Trajectories.join([part(size, num_frames) for part in self.parts])


class _TrackNode:
    CATEGORY = host.CATEGORY
    RETURN_TYPES = (host.TRACKS,)
    RETURN_NAMES = ("tracks",)
    FUNCTION = "make"


class TextTracks(_TrackNode):
    """Tracks of a JSON text: this project's form, or one of another tool, such as a spline editor's coordinates."""

    DESCRIPTION = "Tracks from trajectory JSON, or from the coordinates that a spline editor such as KJNodes' gives."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs in ComfyUI's form."""
        side = {"default": 0, "min": 0, "max": 16384}
        example = '[{"x": 12, "y": 40}, {"x": 44, "y": 24}]'
        tip = (
            "of the frame that the text was drawn in, pixels; KJNodes' is 512x512 unless it was changed. 0: the "
            "video's. A text that states its frame keeps it."
        )
        return {
            "required": {
                "text": ("STRING", {"default": example, "multiline": True}),
                "width": ("INT", {**side, "tooltip": f"Width {tip}"}),
                "height": ("INT", {**side, "tooltip": f"Height {tip}"}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, text: str | None = None) -> bool | str:
        """True, or what is wrong with a text that is written into the node; one from another node is None."""
        try:
            if text is not None:
                parse_json(text, Path("tracks"))
        except ValueError as error:
            return str(error)
        return True

    def make(self, text: str, width: int, height: int) -> tuple[Tracks]:
        """The tracks.

        Raises:
            ValueError: The text is no JSON, or one side of the frame is given without the other.
        """
        parse_json(text, Path("tracks"))
        if bool(width) != bool(height):
            raise ValueError(
                f"give width and height of the frame that was drawn in, or 0 for both; got {width}x{height}"
            )

        def place(size: tuple[int, int], num_frames: int) -> Trajectories:
            file = _read_text(text, (width, height) if width else None, size, num_frames)
            for note in file.notes:
                logger.warning("%s%s", note, f"; {_HOW}" if note.endswith(" was assumed") else "")
            return crop_drawn(Trajectories.from_file(file, num_frames), size, "tracks")

        return (Tracks((place,)),)


class PresetTracks(_TrackNode):
    """Tracks of a ready-made motion."""

    DESCRIPTION = "A ready-made motion of the camera or of one object; an object starts at the given place."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs in ComfyUI's form."""
        part = {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "preset": ([*CAMERA_PRESETS, *OBJECT_PRESETS],),
                "strength": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.01, "max": 10.0, "step": 0.05, "tooltip": "Factor on the motion."},
                ),
                "start_x": ("FLOAT", {**part, "tooltip": "Where an object starts, from 0 = left to 1 = right."}),
                "start_y": ("FLOAT", {**part, "tooltip": "Where an object starts, from 0 = top to 1 = bottom."}),
            }
        }

    def make(self, preset: str, strength: float, start_x: float, start_y: float) -> tuple[Tracks]:
        """The tracks; `start_x` and `start_y` are parts of the video's width and height."""

        def place(size: tuple[int, int], num_frames: int) -> Trajectories:
            if preset in CAMERA_PRESETS:
                return camera_preset(preset, size, num_frames, strength=strength).state("camera")
            start = (min(start_x * size[0], size[0] - 1.0), min(start_y * size[1], size[1] - 1.0))
            return object_preset(preset, size, num_frames, start=start, strength=strength).state("object")

        return (Tracks((place,)),)


class CameraTracks(_TrackNode):
    """Tracks that scene points have under a motion of the camera."""

    DESCRIPTION = "A motion of the camera by amounts of pan, zoom and roll. The scene moves the opposite way."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs in ComfyUI's form."""
        part = {"default": 0.0, "min": -2.0, "max": 2.0, "step": 0.005}
        degrees = {"default": 0.0, "min": -360.0, "max": 360.0, "step": 0.5}
        side = "in parts of the frame's shorter side."
        return {
            "required": {
                "pan_x": ("FLOAT", {**part, "tooltip": f"Positive: the camera turns right, {side}"}),
                "pan_y": ("FLOAT", {**part, "tooltip": f"Positive: the camera turns down, {side}"}),
                "zoom": ("FLOAT", {**part, "tooltip": "Positive: in, the scene grows by 1 + 2 zoom. Negative: out."}),
                "roll": ("FLOAT", {**degrees, "tooltip": "Degrees, positive: the camera turns clockwise."}),
                "easing": ([*EASINGS],),
            }
        }

    def make(self, pan_x: float, pan_y: float, zoom: float, roll: float, easing: str) -> tuple[Tracks]:
        """The tracks."""

        def place(size: tuple[int, int], num_frames: int) -> Trajectories:
            motion = camera_motion(size, num_frames, pan=(pan_x, pan_y), zoom=zoom, roll=roll, easing=easing)
            return motion.state("camera")

        return (Tracks((place,)),)


class MergeTracks(_TrackNode):
    """Two sets of tracks as one."""

    DESCRIPTION = "Joins two sets of tracks."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs in ComfyUI's form."""
        return {"required": {"first": (host.TRACKS,), "second": (host.TRACKS,)}}

    def make(self, first: Tracks, second: Tracks) -> tuple[Tracks]:
        """The tracks of both, those of `first` before."""
        return (Tracks(first.parts + second.parts),)


def _read_text(text: str, drawn_size: tuple[int, int] | None, size: tuple[int, int], num_frames: int) -> TrackFile:
    """The tracks of a JSON text, drawn in a frame of `drawn_size`; None = as it says, else `size` (W, H), the video's.

    Raises:
        ValueError: No JSON, or malformed content.
    """
    sizes = {"drawn_size": drawn_size, "image_size": size, "published_size": size}
    try:
        return parse_tracks(text, **sizes, num_frames=num_frames, max_tracks=MAX_TRACKS)
    except ValueError as error:
        message, is_assumed, _ = str(error).partition("; that size was assumed")  # and the options of commands
        if not is_assumed:
            raise
        raise ValueError(f"{message}, which was assumed; {_HOW}") from None
