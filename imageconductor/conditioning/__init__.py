"""The conditions of a video: drawn trajectories, their flow maps, and the first frame."""

from imageconductor.conditioning.first_frame import (
    cover_crop,
    encode_first_frame,
    keyframe_condition,
    load_image,
    to_pixels,
    to_rgb,
)
from imageconductor.conditioning.flow_map import FlowMapConvention, build_flow_map, flow_map
from imageconductor.conditioning.presets import (
    CAMERA_PRESETS,
    OBJECT_PRESETS,
    PRESET_HELP,
    camera_preset,
    object_preset,
)
from imageconductor.conditioning.trajectories import Trajectories

__all__ = [
    "CAMERA_PRESETS",
    "OBJECT_PRESETS",
    "PRESET_HELP",
    "FlowMapConvention",
    "Trajectories",
    "build_flow_map",
    "camera_preset",
    "cover_crop",
    "encode_first_frame",
    "flow_map",
    "keyframe_condition",
    "load_image",
    "object_preset",
    "to_pixels",
    "to_rgb",
]
