"""Names of the presets, with a line on each for menus and --help, without torch; `presets` has the motions."""

from collections.abc import Mapping

_CAMERA_HELP: Mapping[str, str] = {
    "pan-left": "the camera pans left: the scene moves right",
    "pan-right": "the camera pans right: the scene moves left",
    "pan-up": "the camera pans up: the scene moves down",
    "pan-down": "the camera pans down: the scene moves up",
    "zoom-in": "the camera zooms in: the scene grows from the centre",
    "zoom-out": "the camera zooms out: the scene shrinks to the centre",
    "pan-up-left": "the camera pans up and left: the scene moves down and right",
    "pan-down-right": "the camera pans down and right: the scene moves up and left",
    "pan-down-up": "the camera pans down, then up again: the scene rises and returns",
    "roll": "the camera rolls clockwise: the scene turns counter-clockwise about the centre",
}

_OBJECT_HELP: Mapping[str, str] = {
    "line-right": "straight to the right",
    "line-left": "straight to the left",
    "line-up": "straight up",
    "line-down": "straight down",
    "diagonal": "straight to the right and up",
    "arc": "right, bending upwards",
    "s-curve": "right, swinging up, then down",
    "shake": "shaking left and right in place",
    "shaking-line": "right, shaking up and down",
    "line-and-back": "right, then back to the start",
}

CAMERA_PRESETS: tuple[str, ...] = tuple(_CAMERA_HELP)
OBJECT_PRESETS: tuple[str, ...] = tuple(_OBJECT_HELP)
PRESET_HELP: Mapping[str, str] = {**_CAMERA_HELP, **_OBJECT_HELP}
"""One line of description per preset."""
