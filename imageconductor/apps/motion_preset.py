"""Motion presets: a drawing, what it moves and how strongly, and LoRAs, in one small file that plays on any picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from imageconductor import config as config_file
from imageconductor.apps.drawn_boxes import fit_boxes
from imageconductor.apps.limits import FieldError, Limits
from imageconductor.sampling.branches import Control
from imageconductor.sampling.gate_inputs import FirstFrame

_FIELD = "preset"
_VERSION = 1
_SCALES = (
    *("guidance_scale", "trajectory_guidance_scale", "camera_free_scale"),
    *("scene_guidance_scale", "gated_fraction"),
)


@dataclass(frozen=True)
class MotionPreset:
    """What moves, apart from the picture.

    Attributes:
        drawing: As a trajectory file holds it, docs/trajectories.md, with boxes as "objects"; None = nothing is drawn.
        control: What the drawing moves; None = as the tracks say.
        guidance_scale, trajectory_guidance_scale, camera_free_scale: As in `SampleJob`; None = the model's default.
        looks, motions: Names of style LoRAs and learned motions, each with its scale.
        scene_guidance_scale, first_frame_by, gated_fraction: As in `SampleJob`; None = its default.
    """

    drawing: dict[str, Any] | None = None
    control: str | None = None
    guidance_scale: float | None = None
    trajectory_guidance_scale: float | None = None
    camera_free_scale: float | None = None
    looks: dict[str, float] = field(default_factory=dict)
    motions: dict[str, float] = field(default_factory=dict)
    scene_guidance_scale: float | None = None
    first_frame_by: str | None = None
    gated_fraction: float | None = None

    def to_text(self) -> str:
        """The file's content, JSON; what has its default is left out."""
        kept = {name: value for name, value in asdict(self).items() if value not in (None, {})}
        return json.dumps({"motion_preset": _VERSION, **kept}, indent=1)

    @classmethod
    def read(cls, path: Path, limits: Limits, name: str | None = None, max_objects: int | None = None) -> MotionPreset:
        """The preset in a JSON file of a visitor.

        Args:
            path: The file.
            limits: On its size and its drawing.
            name: As the visitor called it.
            max_objects: Of the model's object gates; None = it takes no boxes.

        Raises:
            FieldError: No preset; says what is wrong, and where.
        """
        name = name or path.name
        if path.stat().st_size > limits.preset_bytes:
            raise FieldError(
                _FIELD, f"{name} is larger than {limits.preset_bytes / 1024:g} kB; a motion preset is a small file"
            )
        try:
            content = json.loads(path.read_bytes())
        except (RecursionError, ValueError):
            raise FieldError(_FIELD, f"{name} is not a JSON file; save a motion preset on this page first") from None
        return cls.parse(content, limits, name, max_objects)

    @classmethod
    def parse(
        cls, content: Any, limits: Limits, name: str = "the preset", max_objects: int | None = None
    ) -> MotionPreset:
        """The preset that a file's content describes.

        Raises:
            FieldError: As `read`.
        """
        known = [one.name for one in fields(cls)]
        if not isinstance(content, Mapping) or content.get("motion_preset") != _VERSION:
            raise FieldError(_FIELD, f'{name} is no motion preset: it does not state "motion_preset": {_VERSION}')
        values = {str(key): value for key, value in content.items() if key != "motion_preset"}
        if unknown := sorted(values.keys() - set(known)):
            raise FieldError(_FIELD, f"{name}: unknown {', '.join(unknown)[:80]}; a preset has {', '.join(known)}")
        if values.get("drawing") is not None:
            values["drawing"] = limits.check_drawing(values["drawing"], limits.frames, _FIELD, max_objects)
        if values.get("control") not in (None, *(control.value for control in Control)):
            raise FieldError(_FIELD, f"{name}: control must be one of {', '.join(c.value for c in Control)}")
        if values.get("first_frame_by") not in (None, *get_args(FirstFrame)):
            raise FieldError(_FIELD, f"{name}: first_frame_by must be one of {', '.join(get_args(FirstFrame))}")
        for key in _SCALES:
            if values.get(key) is not None:
                values[key] = _check_scale(values[key], f"{name}: {key}")
        for key in ("looks", "motions"):
            chosen = values.get(key) or {}
            if not isinstance(chosen, Mapping) or not all(isinstance(one, str) for one in chosen):
                raise FieldError(_FIELD, f"{name}: {key} must name LoRAs with their scales")
            values[key] = {one: _check_scale(scale, f"{name}: {key}") for one, scale in chosen.items()}
        return cls(**values)


def fit_drawing(drawing: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The drawing on a picture of another size: a point at a third of the width stays there, so that all stay inside.

    Args:
        drawing: As a trajectory file holds it, checked.
        size: (W, H) of the picture.
    """
    old = drawing["width"], drawing["height"]
    if old == size:
        return dict(drawing)
    # Edges map to edges, as in `Trajectories.resize`; a point on the far border stays a little below it.
    x, y = (new / before for new, before in zip(size, old, strict=True))

    def move(point: Any) -> list[float]:
        place = [(point[0] + 0.5) * x - 0.5, (point[1] + 0.5) * y - 0.5]
        inside = 0 <= point[0] < old[0] and 0 <= point[1] < old[1]
        return [min(max(p, 0.0), side - 1 / 64) for p, side in zip(place, size, strict=True)] if inside else place

    tracks = [
        {**track, "points": [move(point) for point in track["points"]]}
        if isinstance(track, Mapping)
        else [move(point) for point in track]
        for track in drawing.get("tracks", [])
    ]
    moved = {**drawing, "width": size[0], "height": size[1], "tracks": tracks}
    if "objects" in drawing:
        moved["objects"] = fit_boxes(drawing["objects"], old, size)
    return moved


def _check_scale(value: Any, what: str) -> float:
    try:
        if type(value) not in (int, float):
            raise ValueError(f"must be a number, got {type(value).__name__}")
        config_file.check_finite(value, what)
    except ValueError:
        raise FieldError(_FIELD, f"{what} must be a finite number") from None
    if abs(value) > 100:
        raise FieldError(_FIELD, f"{what} must lie between -100 and 100, got {value:g}")
    return float(value)
