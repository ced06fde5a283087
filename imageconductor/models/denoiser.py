"""eps_theta(x_t, t, c): the UNet and its attachments as one function of a condition.

| depends on | evaluated by |
|---|---|
| (x_t, t, text, boxes, first frame of the scene gates) | `encode`: the UNet's down path and mid block, with gates |
| (t, text, pictures) and (t, text, trajectories, adapters) | `residuals`: the ControlNets, which do not see x_t |
| both | `decode`: the UNet's up path, with gates |

Most stages call the whole; sampling and the few-step stage call the parts, so that branches of the guidance share what
they have in common. A new attachment is a field of `Condition`, None when absent, and a line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from imageconductor.models.adapters import active
from imageconductor.models.controlnets import ImageControlNet, MotionControlNet, Residuals
from imageconductor.models.gated_attention import ObjectGates, SceneGates
from imageconductor.models.gating import Gating
from imageconductor.models.motion_unet import MotionUNet, UNetFeatures


@dataclass(frozen=True)
class Condition:
    """Everything but x_t and t that the model reads, for B clips.

    Attributes:
        text: (B, L, D) embedding; (B, L) int64 token ids in a stage whose text encoder learns.
        keyframes: (B, C, T, h, w) scaled latents of the frames that are given, as a rule frame 0, and zero elsewhere;
            None = no pictures, and the image ControlNet is left out.
        mask: (B, 1, T, h, w), one at the frames that are given; None with `keyframes`.
        flow: (B, 2, T, H, W) flow map in pixels; None = no trajectories, and the motion ControlNet is left out.
        has_flow: (B,) bool, clips that have trajectories; None = all, if there is a flow map.
        boxes: (B, T, N, 4) xyxy of objects as fractions of the frame's width and height; None = no boxes, and the
            object gates are left out. Boxes that are dropped in training are not None but absent.
        present: (B, T, N), frames in which an object is; None with `boxes`.
        names: (B, N, D) text features of the objects' class names; None with `boxes`.
        scene: (B, C, h, w) scaled latents of the first frame that the scene gates attend to, zeros = no picture; None
            leaves these gates out.
        input_frame: (B, C, h, w), the same for the scene gates' input branch.
    """

    text: Tensor
    keyframes: Tensor | None = None
    mask: Tensor | None = None
    flow: Tensor | None = None
    has_flow: Tensor | None = None
    boxes: Tensor | None = None
    present: Tensor | None = None
    names: Tensor | None = None
    scene: Tensor | None = None
    input_frame: Tensor | None = None

    def for_encoder(self, count: int = 1) -> Condition:
        """What `Denoiser.encode` reads, for `count` videos of each clip, next to each other.

        Evaluations whose conditions agree in it share the encoder. What has a row for each video already stays.
        """
        read = {name: getattr(self, name) for name in ("text", "boxes", "present", "names", "scene", "input_frame")}
        total = count * len(self.text)
        repeated = {name: x.repeat_interleave(total // len(x), dim=0) for name, x in read.items() if x is not None}
        return Condition(**repeated)

    def without_gates(self) -> Condition:
        """The same without what gates read, so that all of them are left out."""
        return replace(self, boxes=None, present=None, names=None, scene=None, input_frame=None)

    def without_scene(self) -> Condition:
        """The same where gates act on nothing, as training drops it: absent objects, and zeros for the first frame."""
        read = {name: getattr(self, name) for name in ("present", "scene", "input_frame")}
        return replace(self, **{name: torch.zeros_like(x) for name, x in read.items() if x is not None})

    @staticmethod
    def stack(conditions: Sequence[Condition]) -> Condition:
        """The clips of several conditions, one after the other.

        Raises:
            ValueError: A field is given in some and not in others.
        """
        stacked: dict[str, Any] = {}
        for field in fields(Condition):
            values = [getattr(condition, field.name) for condition in conditions]
            if len({value is None for value in values}) > 1:
                raise ValueError(f"{field.name} is given in some of the conditions and not in others")
            stacked[field.name] = None if values[0] is None else torch.cat(values)
        return Condition(**stacked)


@dataclass(frozen=True)
class Denoiser:
    """The networks that predict the noise.

    Attributes:
        unet: AnimateDiff's UNet in two halves.
        image_controlnet: RGB SparseCtrl, for the first frame; None in a text-to-video model.
        motion_controlnet: For the trajectories; None in a text-to-video model.
        object_gates: For boxes; None in a model without them.
        scene_gates: For the first frame, in place of `image_controlnet` or beside it; None in a model without them.
    """

    unet: MotionUNet
    image_controlnet: ImageControlNet
    motion_controlnet: MotionControlNet
    object_gates: ObjectGates | None = None
    scene_gates: SceneGates | None = None

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps_theta(x_t, t, c), or v or x_0 where the scheduler predicts that: (B, C, T, h, w).

        Autograd follows only what learns, and what comes after it: with a frozen UNet its up path, not its down path.

        Args:
            x_t: (B, C, T, h, w).
            t: () or (B,) int64.
            condition: Of B clips.
        """
        residuals = self.residuals(t, condition)
        return self.decode(self.encode(x_t, t, condition), residuals)

    def encode(self, x_t: Tensor, t: Tensor, condition: Condition, gating: Gating | None = None) -> UNetFeatures:
        """Features of the UNet's first half, which no ControlNet can change; they carry what gates do to the second.

        Args:
            x_t: (B, C, T, h, w).
            t: () or (B,) int64.
            condition: Of B clips.
            gating: Of the condition, where it serves several steps; None = it is worked out here.

        Raises:
            ValueError: The condition has boxes or a scene, and the model no gates for it.
        """
        gating = gating or self.gating(condition, x_t.shape[2])
        if gating is None:
            with _autograd_if_learning([self.unet], x_t, condition.text):
                return self.unet.encode(x_t, t, condition.text)
        networks = [network for network in (self.unet, self.object_gates, self.scene_gates) if network is not None]
        with _autograd_if_learning(networks, x_t, condition.text):
            return self.unet.encode(x_t, t, condition.text, gating)

    def gating(self, condition: Condition, num_frames: int) -> Gating | None:
        """What gates do under a condition; depends on neither x_t nor t. None where all are left out.

        Raises:
            ValueError: As `encode`.
        """
        has_scene = condition.scene is not None or condition.input_frame is not None
        if condition.boxes is None and not has_scene:
            return None
        object_tokens = scene_tokens = input_features = box_motion = None
        if condition.boxes is not None:
            if self.object_gates is None:
                raise ValueError("boxes are given, and the model has no object gates (object_gates/ in its folder)")
            if condition.present is None or condition.names is None:
                raise ValueError("boxes need `present` and `names` beside them")
            object_tokens = self.object_gates(condition.boxes, condition.present, condition.names)
            box_motion = self.object_gates.motion(condition.boxes, condition.present)
        if has_scene:
            if self.scene_gates is None:
                raise ValueError("a scene is given, and the model has no scene gates (scene_gates/ in its folder)")
            scene_tokens, input_features = self.scene_gates(condition.scene, condition.input_frame, num_frames)
        return Gating(
            {} if self.object_gates is None else self.object_gates.gates,  # type: ignore[arg-type]
            object_tokens,
            {} if self.scene_gates is None else self.scene_gates.gates,  # type: ignore[arg-type]
            scene_tokens,
            input_features,
            is_parallel=self.scene_gates is not None and self.scene_gates.is_parallel,
            box_motion=box_motion,
        )

    def residuals(self, t: Tensor, condition: Condition) -> Residuals | None:
        """Sum of what the ControlNets add to the features; None where both are left out."""
        motion = None if condition.flow is None else self.motion_residuals(t, condition)
        return add(self.image_residuals(t, condition), motion)

    def image_residuals(self, t: Tensor, condition: Condition) -> Residuals | None:
        """What carries the pictures; depends on (t, text, pictures). None without pictures."""
        if condition.keyframes is None or condition.mask is None:
            return None
        with _autograd_if_learning([self.image_controlnet], condition.text, condition.keyframes):
            return self.image_controlnet(t, condition.text, condition.keyframes, condition.mask)

    def motion_residuals(self, t: Tensor, condition: Condition, adapters: Sequence[str] | None = None) -> Residuals:
        """What carries the motion; depends on (t, text, trajectories, adapters).

        Args:
            t: () or (B,) int64.
            condition: With a flow map.
            adapters: LoRAs that act; None leaves them as they are.
        """
        acting = nullcontext() if adapters is None else active(self.motion_controlnet, *adapters)
        with acting:
            residuals = self.motion_controlnet(t, condition.text, condition.flow)
        if condition.has_flow is None or condition.flow is None:
            return residuals
        has_flow = condition.has_flow.repeat_interleave(condition.flow.shape[2])
        has_flow = has_flow.to(residuals.mid.dtype).view(-1, 1, 1, 1)
        return residuals.apply(lambda x: has_flow * x)

    def decode(self, features: UNetFeatures, residuals: Residuals | None) -> Tensor:
        """Prediction (B, C, T, h, w) of the UNet's second half."""
        return self.unet.decode(features, residuals)


def add(first: Residuals | None, second: Residuals | None) -> Residuals | None:
    """The sum of what is there."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _autograd_if_learning(networks: Sequence[nn.Module], *inputs: Tensor) -> Any:
    """Autograd off where nothing learns: a frozen network with fixed inputs keeps no activations."""
    learns = any(x.requires_grad for x in inputs) or any(p.requires_grad for net in networks for p in net.parameters())
    return nullcontext() if learns else torch.no_grad()
