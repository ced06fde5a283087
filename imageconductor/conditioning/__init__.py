"""The conditions of a video: drawn trajectories, their flow maps, and pictures.

Names are imported when they are used, so that commands can show their options without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imageconductor.conditioning.boxes import Boxes
    from imageconductor.conditioning.first_frame import (
        cover_crop,
        encode_first_frame,
        keyframe_condition,
        load_image,
        to_pixels,
        to_rgb,
    )
    from imageconductor.conditioning.flow_map import FlowMapConvention, build_flow_map
    from imageconductor.conditioning.preset_names import CAMERA_PRESETS, OBJECT_PRESETS, PRESET_HELP
    from imageconductor.conditioning.presets import camera_motion, camera_preset, object_preset
    from imageconductor.conditioning.timing import EASINGS
    from imageconductor.conditioning.trajectories import Trajectories
    from imageconductor.conditioning.trajectory_json import TRACK_CONTROLS

__all__ = [
    "CAMERA_PRESETS",
    "EASINGS",
    "OBJECT_PRESETS",
    "PRESET_HELP",
    "TRACK_CONTROLS",
    "Boxes",
    "FlowMapConvention",
    "Trajectories",
    "build_flow_map",
    "camera_motion",
    "camera_preset",
    "cover_crop",
    "encode_first_frame",
    "keyframe_condition",
    "load_image",
    "object_preset",
    "to_pixels",
    "to_rgb",
]

_NAMES = {
    "boxes": ["Boxes"],
    "first_frame": ["cover_crop", "encode_first_frame", "keyframe_condition", "load_image", "to_pixels", "to_rgb"],
    "flow_map": ["FlowMapConvention", "build_flow_map"],
    "preset_names": ["CAMERA_PRESETS", "OBJECT_PRESETS", "PRESET_HELP"],
    "presets": ["camera_motion", "camera_preset", "object_preset"],
    "timing": ["EASINGS"],
    "trajectories": ["Trajectories"],
    "trajectory_json": ["TRACK_CONTROLS"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
