"""Where gates act in a UNet, and what they do in one evaluation.

A place is a spatial transformer block, behind whose self-attention diffusers calls the block's `fuser`. Our UNets have
one at every place that asks the evaluation's `Gating` for its gate. No gate is a part of the UNet, so that its weights
and files stay those of the base; without a `Gating` the fuser is not called. A UNet that reads the first frame along
displacements may also be told those of the boxes (`Gating.tell`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from imageconductor.models.controlnets import Residuals

_PARTS = ("down_blocks", "mid_block", "up_blocks")
_EDGE = 1e-3
"""A box that comes as near to an edge of the frame, as a fraction of it, ends there."""
_OF_FRAMES = ("object_tokens", "scene_tokens", "input_features", "box_motion")


class Place(NamedTuple):
    """A place for a gate.

    Attributes:
        block: The transformer block.
        width: Of its features.
        heads: Of its self-attention.
        head_dim: Their width.
    """

    block: nn.Module
    width: int
    heads: int
    head_dim: int


def gate_places(unet: nn.Module, names: Sequence[str] | None = None) -> dict[str, Place]:
    """Places of a UNet by name, "down_blocks_0_attentions_0_transformer_blocks_0"; all, or those that begin so.

    They come in the order in which they are computed: down path, mid block, up path.

    Args:
        unet: Any UNet with diffusers' spatial transformers.
        names: Names or their beginnings, such as "mid_block"; None = all places.

    Raises:
        ValueError: There is no place of that name.
    """
    places: dict[str, Place] = {}
    # diffusers registers the mid block last.
    modules = [(part, *item) for part in _PARTS for item in getattr(unet, part).named_modules()]
    for part, path, module in modules:
        if isinstance(module, BasicTransformerBlock) and "attentions" in path.split("."):
            block: Any = module  # diffusers' sizes are not typed.
            size = (int(block.dim), int(block.num_attention_heads), int(block.attention_head_dim))
            places[f"{part}.{path}".replace(".", "_")] = Place(module, *size)
    if unknown := [text for text in names or () if not any(name.startswith(text) for name in places)]:
        raise ValueError(f"the UNet has no place {unknown[0]} for a gate; there are {', '.join(places)}")
    return {name: place for name, place in places.items() if names is None or name.startswith(tuple(names))}


def check_places(unet: nn.Module, gates: Any, source: Any) -> None:
    """Makes sure that gates are for a UNet of these sizes.

    Raises:
        ValueError: A place of them is not in the UNet, or has another size there; names it and the gates' `source`.
    """
    places = {name: (place.width, place.heads, place.head_dim) for name, place in gate_places(unet).items()}
    for name, size in gates.config.places.items():
        if places.get(name) != tuple(size):
            told = (
                "is not in this UNet" if name not in places else f"has (width, heads, head width) {places[name]} here"
            )
            raise ValueError(f"{source} is for another model: its gate {name} of {tuple(size)} {told}")


def open_gate_places_(unet: nn.Module) -> None:
    """Lets gates act in a UNet, in place; its weights and its output stay."""
    for name, place in gate_places(unet).items():
        cast(Any, place.block).fuser = functools.partial(_act, name)


def _act(place: str, hidden: Tensor, gating: Gating) -> Tensor:
    return gating.act(place, hidden)


@dataclass(frozen=True)
class Gating:
    """What gates do in one evaluation of a UNet.

    Attributes:
        object_gates: By place; empty = none.
        object_tokens: (B*T, N, D), None without gates.
        scene_gates: By place; empty = none.
        scene_tokens: (B*T, V, D), None without gates.
        input_features: (B*T, C_0, h, w), which are added behind `conv_in`; None = nothing.
        is_parallel: Both gates of a place read the same features, and both changes are added.
        scale: Multiplies every gate.
        size: (h, w) of the latents, which the UNet states; gates that know their places need it.
        box_motion: (B*T, N, 9), an object's box in frame 0, its box now, each xyxy as fractions of the frame, and 1 if
            it is seen in both, for a UNet that reads the first frame along displacements; None = boxes tell it nothing.
    """

    object_gates: Mapping[str, Any]
    object_tokens: Tensor | None
    scene_gates: Mapping[str, Any]
    scene_tokens: Tensor | None
    input_features: Tensor | None = None
    is_parallel: bool = False
    scale: float = 1.0
    size: tuple[int, int] | None = None
    box_motion: Tensor | None = None

    def act(self, place: str, hidden: Tensor) -> Tensor:
        """Features (B*T, hw, C) of a place behind its gates: boxes first, then the first frame."""
        before, gated = hidden, hidden
        if self.object_tokens is not None and place in self.object_gates:
            gated = self.object_gates[place](hidden, self.object_tokens, self.scale, self.size)
        if self.scene_tokens is None or place not in self.scene_gates:
            return gated
        gate = self.scene_gates[place]
        if not self.is_parallel:
            return gate(gated, self.scene_tokens, self.scale)
        return gated + (gate(before, self.scene_tokens, self.scale) - before)

    def tell(self, residuals: Residuals | None) -> Residuals | None:
        """Residuals whose displacements are those of the boxes where there are boxes."""
        if self.box_motion is None or residuals is None or residuals.pictures is None:
            return residuals
        told, covered = box_displacements(self.box_motion, residuals.pictures.shape[-2:])
        if residuals.displacements is not None:
            told = torch.where(covered, told, residuals.displacements)
        return replace(residuals, displacements=told)

    def rows(self, rows: slice) -> Gating:
        """The same for some of the B*T frames."""
        tensors = {name: getattr(self, name) for name in _OF_FRAMES}
        return replace(self, **{name: None if value is None else value[rows] for name, value in tensors.items()})

    @staticmethod
    def stack(parts: Sequence[Gating]) -> Gating:
        """The frames of several evaluations by the same gates, one after the other."""
        tensors = {name: [getattr(part, name) for part in parts] for name in _OF_FRAMES}
        joined = {name: None if values[0] is None else torch.cat(values) for name, values in tensors.items()}
        return replace(parts[0], **joined)


def box_displacements(box_motion: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How far what is at a place has come since frame 0, if boxes carry their content: shifted, and scaled with them.

    A box that ends at an edge of the frame shows a part of its object: the side within the frame is what has moved, and
    the scale along this axis that along the other. Of boxes that overlap the smaller one counts.

    Args:
        box_motion: (B*T, N, 9), as `Gating.box_motion`.
        size: (h, w), places.

    Returns:
        (B*T, 2, h, w) float32 in widths and heights of the frame, x first, 0 outside of all boxes, and (B*T, 1, h, w)
        bool, whether a place is inside one, reckoned with half a place on each side.
    """
    height, width = size
    y, x = ((torch.arange(side, device=box_motion.device) + 0.5) / side for side in (height, width))
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None, None]  # (1, 1, h, w, 2)
    low_0, high_0, low, high = box_motion[..., :8].float()[:, :, None, None].split(2, dim=-1)
    half = places.new_tensor([0.5 / width, 0.5 / height])
    inside = ((places >= low - half) & (places <= high + half)).all(-1) & (box_motion[..., 8, None, None] > 0.5)
    sides_0, sides = ((b - a).clamp(min=1e-6) for a, b in ((low_0, high_0), (low, high)))
    ends_low, ends_high = torch.minimum(low_0, low) < _EDGE, torch.maximum(high_0, high) > 1 - _EDGE
    cut = ends_low ^ ends_high
    ratio = sides_0 / sides
    ratio = torch.where(cut, torch.where(cut.flip(-1), 1.0, ratio.flip(-1)), ratio)
    held_0, held = (torch.where(cut & ends_low, b, a) for a, b in ((low_0, high_0), (low, high)))
    within = torch.minimum(torch.maximum(places, low), high)
    displacements = within - (held_0 + (within - held) * ratio)  # (B*T, N, h, w, 2)
    smallest = sides.prod(-1).expand_as(inside).masked_fill(~inside, torch.inf).argmin(1, keepdim=True)
    covered = inside.any(1, keepdim=True)
    chosen = displacements.gather(1, smallest[..., None].expand(-1, -1, -1, -1, 2))[:, 0].movedim(-1, 1)
    return chosen * covered, covered


def gate_scalars(network: nn.Module) -> dict[str, nn.Parameter]:
    """The scalars that open the gates of a network, by name: a group for a learning rate of its own."""
    return {name: p for name, p in network.named_parameters() if name.rpartition(".")[2] in _SCALARS}


def gate_values(network: nn.Module) -> dict[str, float]:
    """How far each gate is open, tanh of its scalar: 0 = closed, by the name of the scalar."""
    return {name: float(p.detach().float().tanh()) for name, p in gate_scalars(network).items()}


_SCALARS = ("alpha_attn", "alpha_dense")
