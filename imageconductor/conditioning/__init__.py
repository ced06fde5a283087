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
    camera_motion,
    camera_preset,
    object_preset,
)
from imageconductor.conditioning.timing import EASINGS
from imageconductor.conditioning.trajectories import Trajectories
from imageconductor.conditioning.trajectory_json import TRACK_CONTROLS

__all__ = [
    "CAMERA_PRESETS",
    "EASINGS",
    "OBJECT_PRESETS",
    "PRESET_HELP",
    "TRACK_CONTROLS",
    "FlowMapConvention",
    "Trajectories",
    "build_flow_map",
    "camera_motion",
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
