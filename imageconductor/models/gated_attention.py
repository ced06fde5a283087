"""Gated attention for object boxes and for the first frame (SMCD): networks beside the UNet, which acts through them.

| network | holds | a model folder has it as |
|---|---|---|
| `ObjectGates` | position network, gated self-attention over features and box tokens for each place | `object_gates/` |
| `SceneGates` | first-frame encoder, gated cross-attention for each place, input branch | `scene_gates/` |

A place is a spatial transformer block of the UNet, between its self-attention and its attention to the text
(`gating.py`). All gates begin closed, and the UNet then computes exactly what it computes without them; but for
`tells_motion`, which small models have, and which acts from the start.

Source: SMCD, "Animate Your Motion" (arXiv 2403.10179); gates and position network are GLIGEN's (arXiv 2301.07093).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward, GatedSelfAttentionDense
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection, get_fourier_embeds_from_boundingbox
from torch import Tensor, nn

from imageconductor.models.gating import Place, gate_places

_FREQUENCIES = 8  # of a box's Fourier features, published

MAX_OBJECTS = 8
"""Objects to which a clip is padded by default, as in SMCD's second stage."""


class PositionNetwork(GLIGENTextBoundingboxProjection):
    """Tokens of boxes and class names; weights are diffusers'.

    Positions are expanded in float32 whatever the weights are in: in bfloat16 a box would be off by 1/512 of the frame,
    and the fastest of its Fourier features, of frequency 56, by 0.1 rad.
    """

    def forward(self, boxes: Tensor, masks: Tensor, positive_embeddings: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, D).

        Args:
            boxes: (B, N, 4) xyxy as fractions of the frame.
            masks: (B, N), 0 = absent.
            positive_embeddings: (B, N, D_text), of the class names.
        """
        there = masks.unsqueeze(-1)
        position = get_fourier_embeds_from_boundingbox(self.fourier_embedder_dim, boxes.float())
        pairs = ((positive_embeddings, self.null_positive_feature), (position, self.null_position_feature))
        parts = [part.to(null.dtype) * there + (1 - there) * null for part, null in pairs]
        return self.linears(torch.cat(parts, dim=-1))


class ObjectGate(GatedSelfAttentionDense):
    """Gated self-attention over a frame's features and the tokens of its boxes; weights are diffusers'.

    Args:
        width: C, of the features.
        token_dim: D, of the tokens.
        heads: Of the attention.
        head_dim: Their width.
        knows_places: Features are told where they are, as boxes are (`ObjectGates`).
    """

    alpha_attn: nn.Parameter
    alpha_dense: nn.Parameter

    def __init__(self, width: int, token_dim: int, heads: int, head_dim: int, knows_places: bool = False):
        super().__init__(width, token_dim, heads, head_dim)
        self.place = nn.Linear(8 * _FREQUENCIES, width) if knows_places else None

    def forward(  # type: ignore[override]
        self, hidden: Tensor, tokens: Tensor, scale: float = 1.0, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Features (B*T, hw, C) that have attended to the boxes.

        Args:
            hidden: (B*T, hw, C), row by row.
            tokens: (B*T, N, D), absent objects included, which take part by their null tokens.
            scale: Multiplies both gates.
            size: (h, w) of the latents, of which the features are a halving; a gate that knows its places needs it.
        """
        count, tokens = hidden.shape[1], self.linear(tokens)
        normed = self.norm1(torch.cat([hidden, tokens], dim=1))
        if self.place is not None:
            told = get_fourier_embeds_from_boundingbox(_FREQUENCIES, _place_boxes(count, size, hidden.device))
            told = self.place(told.to(hidden.dtype))
            normed = normed + F.pad(told, (0, 0, 0, tokens.shape[1]))
        attended = self.attn(normed)[:, :count]
        hidden = hidden + scale * self.alpha_attn.tanh() * attended
        return hidden + scale * self.alpha_dense.tanh() * self.ff(self.norm2(hidden))


class SceneGate(nn.Module):
    """Gated cross-attention from a frame's features to the tokens of the first frame.

    Args:
        width: C, of the features.
        token_dim: D, of the tokens.
        heads: Of the attention.
        head_dim: Their width.
    """

    def __init__(self, width: int, token_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.linear = nn.Linear(token_dim, width)
        self.attn = Attention(query_dim=width, heads=heads, dim_head=head_dim)
        self.ff = FeedForward(width, activation_fn="geglu")
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.alpha_attn, self.alpha_dense = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def forward(self, hidden: Tensor, tokens: Tensor, scale: float = 1.0) -> Tensor:
        """Features (B*T, hw, C) that have attended to the first frame.

        Args:
            hidden: (B*T, hw, C).
            tokens: (B*T, V, D).
            scale: Multiplies both gates.
        """
        attended = self.attn(self.norm1(hidden), encoder_hidden_states=self.linear(tokens))
        hidden = hidden + scale * self.alpha_attn.tanh() * attended
        return hidden + scale * self.alpha_dense.tanh() * self.ff(self.norm2(hidden))


class EncoderBlock(nn.Module):
    """Residual block without a norm; the first of a level halves the size, rounding up.

    Args:
        channels_in: Of its input.
        channels: Of its output.
        halves: Whether it halves the size.
    """

    def __init__(self, channels_in: int, channels: int, halves: bool):
        super().__init__()
        down = nn.Conv2d(channels_in, channels_in, 3, stride=2, padding=1)
        self.down_opt = nn.ModuleDict({"op": down}) if halves else None
        self.in_conv = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, channels, h, w) of (B, channels_in, h, w), or half the size."""
        if self.down_opt is not None:
            hidden = self.down_opt["op"](hidden)
        hidden = self.in_conv(hidden)
        return hidden + self.block2(F.relu(self.block1(hidden)))


class FirstFrameEncoder(nn.Module):
    """Tokens of the first frame's latents; names of the weights are the published ones.

    Args:
        latent_channels: Of the latents.
        channels: Of the levels, each of half the size of the one before.
        blocks_per_level: Residual blocks.
    """

    def __init__(self, latent_channels: int, channels: Sequence[int], blocks_per_level: int):
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.body = nn.ModuleList()
        before = channels[0]
        for level, width in enumerate(channels):
            for number in range(blocks_per_level):
                self.body.append(EncoderBlock(before, width, halves=level > 0 and number == 0))
                before = width
        # Without norms, PyTorch's initialisation would leave next to nothing of the picture behind these convolutions,
        # which no residual connection leads around (docs/decisions.md, 39).
        for name, conv in self.named_modules():
            if not isinstance(conv, nn.Conv2d) or not name.endswith(("conv_in", "in_conv", ".op")):
                continue
            if conv.bias is not None and not conv.weight.is_meta:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
                nn.init.zeros_(conv.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """Feature map (B, D, h', w') of latents (B, C, h, w); at four levels h' is h / 8, rounded up."""
        hidden = self.conv_in(latents)
        for block in self.body:
            hidden = block(hidden)
        return hidden


class ObjectGates(ModelMixin, ConfigMixin):
    """Position network and object gates.

    Every clip is padded to `max_objects` with absent objects, in training and inference alike: their null tokens take
    part in the attention, so that their number matters.

    A small UNet learns to follow boxes only if it is told what a large one works out by itself; published gates have
    none of it (docs/decisions.md, 45).

    Args:
        places: (width, heads, head width) by place.
        text_dim: Width of the class names' text features.
        token_dim: Width of the tokens.
        max_objects: To which clips are padded.
        knows_places: A feature is told where in the frame it is, by the Fourier features of its place's box.
        knows_first_boxes: An object's token also tells its box in the first frame.
        tells_motion: A UNet that reads the first frame along displacements (`first_frame_warp`, `first_frame_skips`) is
            told that what is in a box has come with it, whether gates are open or closed.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        places: Mapping[str, Sequence[int]],
        text_dim: int = 768,
        token_dim: int = 768,
        max_objects: int = MAX_OBJECTS,
        knows_places: bool = False,
        knows_first_boxes: bool = False,
        tells_motion: bool = False,
    ):
        super().__init__()
        self.max_objects, self.tells_motion = max_objects, tells_motion
        self.position_net = PositionNetwork(text_dim, token_dim)
        self.first_position_net = PositionNetwork(text_dim, token_dim) if knows_first_boxes else None
        self.gates = nn.ModuleDict(
            {name: ObjectGate(p[0], token_dim, p[1], p[2], knows_places) for name, p in places.items()}
        )

    @classmethod
    def from_unet(
        cls,
        unet: Any,
        places: Sequence[str] | None = None,
        *,
        max_objects: int = MAX_OBJECTS,
        seed: int = 0,
        **settings: bool,
    ) -> ObjectGates:
        """Closed gates for a UNet, as many as it has places or those that are named; tokens are as wide as its text.

        `settings` are of the class.

        Raises:
            ValueError: The UNet has no such place, or `max_objects` is not positive.
        """
        if max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, got {max_objects}")
        width = unet.config["cross_attention_dim"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(_sizes(gate_places(unet, places)), width, width, max_objects, **settings)

    def forward(self, boxes: Tensor, present: Tensor, names: Tensor) -> Tensor:
        """Tokens (B*T, max_objects, D) of the objects in each frame.

        Args:
            boxes: (B, T, N, 4) xyxy as fractions of the frame's width and height.
            present: (B, T, N), bool or a fraction; where it is 0 an object has its null token, whatever the box.
            names: (B, N, D_text), text features of the class names (`Encoders.encode_names`).

        Raises:
            ValueError: Shapes do not fit together, or there are too many objects.
        """
        batch, num_frames, count = present.shape
        if boxes.shape != (batch, num_frames, count, 4) or names.shape[:2] != (batch, count):
            raise ValueError(
                f"boxes (B, T, N, 4), present (B, T, N) and names (B, N, D) do not fit together: "
                f"{tuple(boxes.shape)}, {tuple(present.shape)}, {tuple(names.shape)}"
            )
        missing = self.max_objects - count
        if missing < 0:
            raise ValueError(f"{count} objects, the model takes at most {self.max_objects}; leave some out")
        boxes, names = (F.pad(x, (0, 0, 0, missing)) for x in (boxes, names))
        present = F.pad(present.to(self.dtype), (0, missing))
        told = names.repeat_interleave(num_frames, dim=0)
        tokens = self.position_net(boxes=boxes.flatten(0, 1), masks=present.flatten(0, 1), positive_embeddings=told)
        if self.first_position_net is not None:
            first = self.first_position_net(boxes=boxes[:, 0], masks=present[:, 0], positive_embeddings=names)
            tokens = tokens + first.repeat_interleave(num_frames, dim=0)
        return tokens

    def motion(self, boxes: Tensor, present: Tensor) -> Tensor | None:
        """`Gating.box_motion` of boxes (B, T, N, 4) and present (B, T, N); None if there is none, or it is not told."""
        if not self.tells_motion or not boxes.shape[2]:
            return None
        there = (present * present[:, :1]).unsqueeze(-1).to(boxes.dtype)
        return torch.cat([boxes[:, :1].expand_as(boxes), boxes, there], dim=-1).flatten(0, 1)


class SceneGates(ModelMixin, ConfigMixin):
    """First-frame encoder, scene gates and the first frame's way into the UNet beside `conv_in`.

    Args:
        places: (width, heads, head width) by place.
        latent_channels: Of the latents.
        channels: Of the first-frame encoder's levels; the last is the width of the tokens.
        blocks_per_level: Of the first-frame encoder.
        input_channels: Of the features behind the UNet's `conv_in`.
        is_parallel: Scene gates read what object gates read, and both changes are added; else they read what object
            gates gave, as in the released model.
        frame_0_only: The input branch adds the first frame to frame 0 alone, not to all.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        places: Mapping[str, Sequence[int]],
        latent_channels: int = 4,
        channels: Sequence[int] = (256, 512, 1024, 1024),
        blocks_per_level: int = 3,
        input_channels: int = 320,
        is_parallel: bool = False,
        frame_0_only: bool = False,
    ):
        super().__init__()
        self.is_parallel, self.frame_0_only = is_parallel, frame_0_only
        self.image_encoder = FirstFrameEncoder(latent_channels, channels, blocks_per_level)
        self.gates = nn.ModuleDict({name: SceneGate(p[0], channels[-1], p[1], p[2]) for name, p in places.items()})
        # The other half of a `conv_in` that reads noisy latents and the first frame next to each other.
        self.input_branch = nn.Conv2d(latent_channels, input_channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.input_branch.weight)

    @classmethod
    def from_unet(cls, unet: Any, places: Sequence[str] | None = None, *, seed: int = 0, **settings: Any) -> SceneGates:
        """Closed gates for a UNet, as many as it has places or those that are named; `settings` are of the class.

        Raises:
            ValueError: The UNet has no such place.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(
                _sizes(gate_places(unet, places)),
                latent_channels=unet.config["in_channels"],
                input_channels=unet.config["block_out_channels"][0],
                **settings,
            )

    def forward(
        self, scene: Tensor | None, input_frame: Tensor | None, num_frames: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the first frame, row by row, and what it adds behind `conv_in`; each None without its picture.

        Args:
            scene: (B, C, h, w), scaled latents that the gates attend to; zeros = no picture, as in training.
            input_frame: (B, C, h, w), scaled latents for the input branch.
            num_frames: T.

        Returns:
            (B*T, V, D) and (B*T, C_0, h, w).
        """
        tokens = features = None
        if scene is not None:
            tokens = self.image_encoder(scene.to(self.dtype)).flatten(2).transpose(1, 2)
            tokens = tokens.repeat_interleave(num_frames, dim=0)
        if input_frame is not None:
            first = self.input_branch(input_frame.to(self.dtype))
            features = first.repeat_interleave(num_frames, dim=0)
            if self.frame_0_only:
                is_first = torch.arange(len(features), device=features.device) % num_frames == 0
                features = features * is_first.view(-1, 1, 1, 1)
        return tokens, features


def _place_boxes(count: int, size: tuple[int, int] | None, device: torch.device | str = "cpu") -> Tensor:
    """(1, hw, 4): each place as a box, xyxy as fractions of the frame.

    Args:
        count: Places of a level, hw.
        size: (h, w) of the latents, which each level halves, rounding up.
        device: Of the boxes.

    Raises:
        ValueError: There is no level of so many places, or no size.
    """
    height, width = size or (0, 0)
    while height * width > count:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != count:
        raise ValueError(f"latents of {size} have no level of {count} places, which gates that know theirs need")
    rows, columns = (torch.arange(side, device=device) / side for side in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y, x + 1 / width, y + 1 / height], dim=-1).reshape(1, count, 4)


def _sizes(places: Mapping[str, Place]) -> dict[str, list[int]]:
    return {name: [place.width, place.heads, place.head_dim] for name, place in places.items()}
