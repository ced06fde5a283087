"""Cross-attention to a text that all frames of a video share.

diffusers' blocks expect the text once for each frame, (B*T, L, D), and compute keys and values as often. Here it
arrives once for each video, and the frames of a video stand one after the other in the query:

(B*T, hw, C) -> (B, T*hw, C); text (B, L, D) -> keys and values (B, L, C)
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

from imageconductor.models.motion_module import Float32Attention

FOLDING: tuple[type, ...] = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, Float32Attention)
"""Processors that treat each position of the query alone, so that frames may follow each other in it."""


class TextAttention(Attention):
    """Cross-attention to a text given for each frame or for each video; parameters and their names are diffusers'."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Output (B*T, hw, C) of the attention.

        Args:
            hidden_states: (B*T, hw, C), the frames of one video next to each other.
            encoder_hidden_states: (B or B*T, L, D). Processors that are not diffusers' plain ones, such as those of
                IP-Adapter, are given it for each frame.
            attention_mask: As diffusers'.
            cross_attention_kwargs: As diffusers'.
        """
        text, frames = encoder_hidden_states, len(hidden_states)
        if not isinstance(text, Tensor) or len(text) == frames:
            return super().forward(hidden_states, text, attention_mask, **cross_attention_kwargs)
        if attention_mask is not None or type(self.processor) not in FOLDING:
            text = text.repeat_interleave(frames // len(text), dim=0)
            return super().forward(hidden_states, text, attention_mask, **cross_attention_kwargs)
        folded = hidden_states.reshape(len(text), -1, hidden_states.shape[-1])
        return super().forward(folded, text, **cross_attention_kwargs).view(hidden_states.shape)


def adopt_text_attention_(model: nn.Module) -> None:
    """Turns the cross-attention of every spatial transformer in `model` into ours, in place and with its weights."""
    for name, module in model.named_modules():
        if type(module) is Attention and ".attentions." in name and name.endswith(".attn2"):
            # The classes differ in `forward` alone, so the instance can change class and keep its parameters.
            module.__class__ = TextAttention
