"""What gates read in a call: boxes with class names, and the first frame."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from imageconductor.checkpoints.model_folder import SCENE_LORA_FOLDER
from imageconductor.conditioning import Boxes
from imageconductor.conditioning.boxes import stack_boxes
from imageconductor.models.adapters import active_adapters
from imageconductor.models.networks import check_names, encode_names
from imageconductor.models.weights import refuse_non_finite

_LOG = logging.getLogger(__name__)

FirstFrame = Literal["controlnet", "gates", "both"]
"""What carries the picture of frame 0: the image ControlNet, the scene gates, or both of them."""


def choose_first_frame(
    asked: str | None, pictured: Sequence[Collection[int]], has_boxes: bool, has_gates: bool
) -> FirstFrame:
    """What carries the picture of frame 0; unasked, both where boxes are given and the model has scene gates.

    Args:
        asked: In the call.
        pictured: Frames of each condition that have a picture.
        has_boxes: Whether boxes are given.
        has_gates: Whether the model has scene gates.

    Raises:
        ValueError: There is nothing of that name, or it needs gates or pictures that there are not.
    """
    if asked is not None and asked not in get_args(FirstFrame):
        raise ValueError(f"first_frame_by must be one of {', '.join(get_args(FirstFrame))}, got {asked!r}")
    begins = bool(pictured) and all(0 in frames for frames in pictured)
    if asked is None:
        return "both" if has_boxes and has_gates and begins else "controlnet"
    if asked == "controlnet":
        return "controlnet"
    if not has_gates:
        raise ValueError(f"first_frame_by {asked!r} needs scene gates, which this model does not have")
    if not begins:
        raise ValueError(f"first_frame_by {asked!r} needs a picture of frame 0; give an image")
    if asked == "gates" and (others := sorted({frame for frames in pictured for frame in frames} - {0})):
        raise ValueError(
            f"the gates carry frame 0 alone, and frame {others[0]} has a picture; take first_frame_by 'both'"
        )
    return cast(FirstFrame, asked)


def check_gate_scales(scene_guidance_scale: float, gated_fraction: float, do_act: bool) -> None:
    """Makes sure that settings of the gates are sensible.

    Raises:
        ValueError: The fraction is none, or no gate acts.
    """
    if not 0 <= gated_fraction <= 1:
        raise ValueError(f"gated_fraction must be from 0 to 1, got {gated_fraction:g}")
    if not do_act and (scene_guidance_scale != 1 or gated_fraction != 1):
        raise ValueError(
            f"scene_guidance_scale ({scene_guidance_scale:g}) and gated_fraction ({gated_fraction:g}) are of the gates,"
            " and none acts; give boxes, or let gates carry the first frame (first_frame_by)"
        )


def warn_without_scene_lora(pipe: Any) -> None:
    """Says that scene gates are to act without the LoRA that they were trained with, where no LoRA of the UNet acts."""
    path = pipe.lora_folders.get(SCENE_LORA_FOLDER)
    if path is not None and not active_adapters(pipe.unet) and not pipe.num_fused_loras:
        _LOG.warning(
            "the scene gates were trained with a LoRA of the motion modules, which does not act; "
            "imageconductor.checkpoints.personalise.load_motion_lora(pipe, %r, 'scene') attaches it",
            str(path),
        )


def check_boxes(boxes: Any, num_frames: int, max_objects: int | None) -> None:
    """Makes sure that boxes fit a video and its model.

    Args:
        boxes: Of a condition.
        num_frames: T of the video.
        max_objects: Of the model's object gates; None = it has none.

    Raises:
        ValueError: They do not.
    """
    if max_objects is None:
        raise ValueError("boxes need object gates, which this model does not have (object_gates/ in its folder)")
    if not isinstance(boxes, Boxes):
        raise ValueError(f"boxes must be imageconductor.conditioning.Boxes, got {type(boxes).__name__}")
    if boxes.num_frames != num_frames:
        raise ValueError(f"the video has {num_frames} frames, its boxes {boxes.num_frames}")
    if boxes.num_objects > max_objects:
        raise ValueError(
            f"{boxes.num_objects} objects have boxes, the model takes at most {max_objects}; leave some out"
        )


@torch.no_grad()
def encode_boxes(
    pipe: Any, boxes: Sequence[Boxes], count: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Fields of a `Condition`: boxes (P, T, N, 4) float32, present (P, T, N), names (P, N, D).

    Args:
        pipe: The pipeline, whose text encoder reads the class names.
        boxes: Of P conditions, or of one for all of them; in pixels of the video.
        count: P.
        device: Of the result.
        dtype: Of the result; boxes keep their precision.

    Raises:
        ValueError: A class name cannot be read, or the text encoder gives values that are not finite.
    """
    names = list(dict.fromkeys(name for one in boxes for name in one.names))
    check_names(pipe.tokenizer, names, pipe.text_encoder.config.max_position_embeddings)
    features = encode_names(pipe.tokenizer, pipe.text_encoder, names, device)
    refuse_non_finite(pipe, features, "the text encoder, which reads the boxes' class names,")
    told = dict(zip(names, features, strict=True))
    fields = stack_boxes(boxes, told, pipe.text_encoder.config.hidden_size)
    dtypes = {"boxes": torch.float32, "present": dtype, "names": dtype}
    return {key: x.to(device, dtypes[key]).expand(count, *x.shape[1:]) for key, x in fields.items()}
