"""Videos that are longer than the clips of the training: overlapping windows of frames, one after the other.

Each window is a call of the model as it was trained: it has its own slice of the trajectories and a picture of its
first frame. That picture is the input's in the first window, and what the window before made of that frame in all
others (`Anchor`). So time grows linearly with the frames, and the networks' memory not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imageconductor.diffusion.clean_estimate import prediction_of_x_0
from imageconductor.models.denoiser import Condition

if TYPE_CHECKING:
    from imageconductor.sampling.branches import Text


def choose_window(asked: int | None, trained: int, most: int | None) -> int:
    """Frames of a window.

    Args:
        asked: In the call; None = as many as the model was trained on.
        trained: The model's default number of frames.
        most: Frames that its motion modules take; None = any number.

    Raises:
        ValueError: There are none, or more than the motion modules take.
    """
    if asked is not None and (asked < 2 or (most is not None and asked > most)):
        raise ValueError(f"window_frames must be from 2 to {most or 'any number'} for this model, got {asked}")
    return asked or min(trained, most or trained)


def split_frames(num_frames: int, window_frames: int, overlap: int | None = None) -> tuple[range, ...]:
    """The fewest windows that cover a video and overlap by at least so many frames, spread evenly.

    Args:
        num_frames: T of the video.
        window_frames: Frames of a window; a video of at most so many is one window.
        overlap: Frames that a window has in common with the one before; None = a quarter of it.

    Raises:
        ValueError: There is no frame, or the overlap is not from 1 to one frame less than a window.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if overlap is not None and not 1 <= overlap < window_frames:
        raise ValueError(
            f"window_overlap must be from 1 to {window_frames - 1} for windows of {window_frames} frames, got {overlap}"
        )
    if num_frames <= window_frames:
        return (range(num_frames),)
    overlap = max(1, window_frames // 4) if overlap is None else overlap
    last = -(-(num_frames - window_frames) // (window_frames - overlap))
    starts = [round(n * (num_frames - window_frames) / last) for n in range(last + 1)]
    return tuple(range(start, start + window_frames) for start in starts)


@dataclass(frozen=True)
class Anchor:
    """Frames of a window that the one before has made, from which it goes on.

    The prediction is drawn towards the one that leads to these frames: wholly in the first of them, less and less in
    those after it, so that a window takes over gradually.

    Attributes:
        latents: (B, C, K, h, w) float32, clean, the first K frames of the window.
    """

    latents: Tensor

    @property
    def weights(self) -> Tensor:
        """(K,): 1, then falling in even steps that would reach 0 with the first frame that is not anchored."""
        count = self.latents.shape[2]
        return 1 - torch.arange(count, device=self.latents.device) / count

    def hold(self, prediction: Tensor, x_t: Tensor, alpha_cumprod: float, prediction_type: str) -> Tensor:
        """A guided prediction (B, C, T, h, w) whose first frames lead to the anchored ones.

        Args:
            prediction: (B, C, T, h, w).
            x_t: (B, C, T, h, w), what the model saw.
            alpha_cumprod: Of the timestep.
            prediction_type: Of the scheduler.
        """
        count = self.latents.shape[2]
        wanted = prediction_of_x_0(self.latents, x_t[:, :, :count].float(), alpha_cumprod, prediction_type)
        held = torch.lerp(prediction[:, :, :count].float(), wanted, self.weights.view(-1, 1, 1))
        return torch.cat([held.to(prediction.dtype), prediction[:, :, count:]], dim=2)


def condition_window(
    conditions: Mapping[Text, Condition], frames: range, flow: Tensor | None, anchor: Anchor | None
) -> dict[Text, Condition]:
    """What the model reads in a window.

    Args:
        conditions: Of the whole video, P of them for each text.
        frames: Of the window.
        flow: (P, 2, T, H, W), flow map of the window.
        anchor: Of B videos; its first frame stands where the call has a picture of the video's first frame.
    """
    shared = next(iter(conditions.values()))
    window = slice(frames.start, frames.stop)
    cut = {name: getattr(shared, name) for name in ("keyframes", "mask")}
    cut = {name: None if x is None else x[:, :, window] for name, x in cut.items()}
    placed = {name: getattr(shared, name) for name in ("boxes", "present")}
    placed = {name: None if x is None else x[:, window] for name, x in placed.items()}
    scene = shared.scene
    if anchor is not None:
        first = anchor.latents[:, :, 0]
        if shared.keyframes is not None:
            cut = _place_first(cut["keyframes"], cut["mask"], first)
        if scene is not None:
            scene = first.to(scene.dtype)
    fields: dict[str, Any] = {**cut, **placed, "flow": flow, "scene": scene, "input_frame": scene}
    return {name: replace(one, **fields) for name, one in conditions.items()}


def _place_first(keyframes: Any, mask: Any, first: Tensor) -> dict[str, Tensor]:
    """Pictures (P, C, T, h, w) and mask (P, 1, T, h, w) of B videos with a latent (B, C, h, w) at frame 0.

    A picture that the call gives for that frame stays.
    """
    count = len(first) // len(keyframes)
    keyframes, mask = (x.repeat_interleave(count, dim=0) for x in (keyframes, mask))
    keyframes[:, :, 0] = torch.where(mask[:, :, 0] > 0, keyframes[:, :, 0], first.to(keyframes.dtype))
    mask[:, :, 0] = 1
    return {"keyframes": keyframes, "mask": mask}
