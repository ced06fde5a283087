"""The conditions that a job names, trajectories of a file, a preset or a video, and boxes, and what a crop leaves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from imageconductor.conditioning.preset_names import CAMERA_PRESETS

if TYPE_CHECKING:
    from PIL import Image

    from imageconductor.conditioning import Boxes, Trajectories
    from imageconductor.sampling.job import SampleJob

logger = logging.getLogger(__name__)

_CROPPED_IN_SILENCE = 0.1  # of a picture


def build_trajectories(
    job: SampleJob, size: tuple[int, int], num_frames: int, image_size: tuple[int, int]
) -> Trajectories:
    """What is drawn, what the preset draws, or how a video moves, in pixels of `size` (W, H)."""
    from imageconductor.conditioning import Trajectories, camera_preset, object_preset

    if job.preset in CAMERA_PRESETS:
        return camera_preset(job.preset, size, num_frames, strength=job.strength)
    if job.preset is not None:
        start = job.start or (size[0] / 2, size[1] / 2)
        return object_preset(job.preset, size, num_frames, start=start, strength=job.strength)
    if job.trajectories is not None:
        from imageconductor.conditioning.trajectory_json import parse_size

        drawn_size = None if job.trajectories_size is None else parse_size(job.trajectories_size)
        drawn = Trajectories.load(
            job.trajectories, num_frames, published_size=size, drawn_size=drawn_size, image_size=image_size
        )
        return crop_drawn(drawn, size, job.trajectories)
    if job.motion_from is not None:
        from imageconductor.data.video_motion import take_motion

        return take_motion(Path(job.motion_from), size, num_frames)
    return Trajectories.empty(size, num_frames)


def read_first_frame(path: str, size: tuple[int, int]) -> Image.Image:
    """The picture of a file, not yet cropped; one that loses a tenth of itself in a video of `size` is warned of.

    Raises:
        ValueError, FileNotFoundError: As `load_image`.
    """
    from imageconductor.conditioning import load_image
    from imageconductor.conditioning.first_frame import cover_scale

    image = load_image(path)
    cropped = 1 - size[0] * size[1] / (image.width * image.height * cover_scale(image.size, size) ** 2)
    if cropped > _CROPPED_IN_SILENCE:
        logger.warning(
            "%s: %.0f %% of the picture is cropped away, as it has %dx%d pixels and the video %dx%d; width and height "
            "of the video say another shape",
            path, 100 * cropped, *image.size, *size,
        )  # fmt: skip
    return image


def crop_drawn(drawn: Trajectories, size: tuple[int, int], source: str) -> Trajectories:
    """The tracks on the picture cropped to `size` (W, H); a drawn one that is outside in all frames is warned of.

    Args:
        drawn: the tracks.
        size: (W, H).
        source: of the tracks, at the start of messages.

    Raises:
        ValueError: All of them are.
    """
    placed = drawn.cover_crop(size)
    if drawn.visible.any() and not placed.visible.any():
        raise ValueError(
            f"{source}: every track is outside of the cropped picture, which is {size[0]}x{size[1]} from the middle of "
            f"{drawn.size[0]}x{drawn.size[1]}; draw there, or ask for a video of the picture's shape"
        )
    for n in list_cropped_tracks(drawn, placed):
        logger.warning("%s: track %d is outside of the cropped picture in all frames", source, n)
    return placed


def list_cropped_tracks(drawn: Trajectories, placed: Trajectories) -> list[int]:
    """Numbers of the tracks that a crop leaves outside in all frames, those of the camera apart.

    Args:
        drawn: the tracks.
        placed: the same, cropped.
    """
    from imageconductor.conditioning import TRACK_CONTROLS

    is_lost = drawn.visible.any(dim=1) & ~placed.visible.any(dim=1)
    if drawn.control is not None:
        is_lost &= drawn.control != TRACK_CONTROLS.index("camera")
    return is_lost.nonzero().flatten().tolist()


def suitable_control(trajectories: Trajectories, default: str, preset: str | None = None) -> str:
    """What a preset or the tracks say that they move, both LoRAs where only some say the camera; else the default."""
    from imageconductor.conditioning import TRACK_CONTROLS

    if preset is not None:
        return "camera" if preset in CAMERA_PRESETS else "object"
    if trajectories.control is None or bool((trajectories.control < 0).all()):
        return default
    says_camera = trajectories.control == TRACK_CONTROLS.index("camera")
    return "camera" if bool(says_camera.all()) else "mixed" if bool(says_camera.any()) else "object"


def read_boxes(job: SampleJob, size: tuple[int, int], num_frames: int) -> Boxes:
    """The boxes of a job in pixels of `size` (W, H), once they fit its model; without objects if it names none.

    An object that is outside of the cropped picture in all frames is warned of.

    Raises:
        ValueError, FileNotFoundError: The file is malformed, or the model cannot take these boxes.
    """
    from imageconductor.checkpoints.model_folder import read_gate_config
    from imageconductor.conditioning import Boxes
    from imageconductor.models.networks import check_names
    from imageconductor.sampling.gate_inputs import check_boxes

    if job.boxes is None:
        return Boxes.empty(size, num_frames)
    config = read_gate_config(job.model, "object_gates")
    drawn = Boxes.load(job.boxes, num_frames, name=job.boxes_name)
    check_boxes(drawn, num_frames, None if config is None else config["max_objects"])
    from transformers import CLIPTextConfig, CLIPTokenizer

    length = CLIPTextConfig.from_pretrained(Path(job.model) / "text_encoder").max_position_embeddings
    check_names(CLIPTokenizer.from_pretrained(Path(job.model) / "tokenizer"), drawn.names, length)
    placed = drawn.cover_crop(size)
    for n, name in enumerate(placed.names):
        if drawn.present[n].any() and not placed.present[n].any():
            logger.warning("%s: object %d (%s) is outside of the cropped picture in all frames", job.boxes, n, name)
    return placed
