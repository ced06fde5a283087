"""Image Conductor's nodes for ComfyUI, which reads the two tables below."""

from .model_nodes import LoadModel
from .track_nodes import CameraTracks, MergeTracks, PresetTracks, TextTracks
from .video_nodes import DrawTracks, SampleVideo

NODE_CLASS_MAPPINGS = {
    "ImageConductorLoadModel": LoadModel,
    "ImageConductorTextTracks": TextTracks,
    "ImageConductorPresetTracks": PresetTracks,
    "ImageConductorCameraTracks": CameraTracks,
    "ImageConductorMergeTracks": MergeTracks,
    "ImageConductorSampleVideo": SampleVideo,
    "ImageConductorDrawTracks": DrawTracks,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ImageConductorLoadModel": "Load Image Conductor Model",
    "ImageConductorTextTracks": "Tracks from Text",
    "ImageConductorPresetTracks": "Tracks of a Preset",
    "ImageConductorCameraTracks": "Tracks of a Camera Motion",
    "ImageConductorMergeTracks": "Merge Tracks",
    "ImageConductorSampleVideo": "Sample Image Conductor Video",
    "ImageConductorDrawTracks": "Draw Tracks on Frames",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
