"""Cross-attention to a text that all frames of a video share."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from imageconductor.models.adapters import active, adapter_parameters, add_adapter
from imageconductor.models.motion_module import Float32Attention
from imageconductor.models.text_attention import TextAttention


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return TextAttention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)


def inputs():
    """Two videos of three frames, and a text for each."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, 16, generator=generator), torch.randn(2, 7, 12, generator=generator)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, Float32Attention])
def test_a_text_a_video_is_that_text_for_each_frame(layer, processor):
    """Also under a LoRA, and for gradients."""
    layer.set_processor(processor())
    hidden, text = inputs()
    add_adapter(layer, "style", rank=2, targets=["to_q", "to_k", "to_v"])
    for parameter in adapter_parameters(layer, "style").values():
        parameter.data.normal_(0, 0.3)
    learned = [p for key, p in layer.named_parameters() if "to_k" in key]
    with active(layer, "style"):
        found, expected = layer(hidden, text), layer(hidden, text.repeat_interleave(3, dim=0))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for p in learned:
            p.requires_grad_(True)
        for one, other in zip(
            torch.autograd.grad(layer(hidden, text).square().sum(), learned),
            torch.autograd.grad(layer(hidden, text.repeat_interleave(3, dim=0)).square().sum(), learned),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class PictureProcessor(AttnProcessor2_0):
    """As IP-Adapter's, one that may not be given several frames in one query."""

    seen = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        self.seen = hidden_states.shape, encoder_hidden_states.shape
        return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)


def test_other_processors_see_frames(layer):
    hidden, text = inputs()
    expected = layer(hidden, text)
    layer.set_processor(PictureProcessor())
    torch.testing.assert_close(layer(hidden, text), expected, rtol=1e-5, atol=1e-6)
    assert layer.processor.seen == ((6, 5, 16), (6, 7, 12))
