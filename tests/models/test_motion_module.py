"""Temporal attention at any number of sequences."""

import pytest
import torch
import torch.nn.functional as F
from parity_md import animatediff_unet, modelscope_unet

from imageconductor.models import motion_module
from imageconductor.models.motion_unet import TextToVideoUNet


@pytest.mark.parametrize(
    "build", [animatediff_unet, lambda: modelscope_unet(TextToVideoUNet)], ids=["ours", "modelscope"]
)
def test_no_kernel_sees_more_sequences_than_it_takes(build, monkeypatch):
    """CUDA's attention fails from 65536 on, which eight videos of 512x512 under two texts have."""
    unet, seen = build(), []
    x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 5, unet.config["cross_attention_dim"], generator=torch.Generator().manual_seed(1))

    def attend(query, *args, **kwargs):
        seen.append(len(query))
        return attention(query, *args, **kwargs)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with torch.no_grad():
        whole = unet(x, 500, text).sample
        assert max(seen) == 2 * 8 * 8
        seen.clear()
        monkeypatch.setattr(motion_module, "MOST_SEQUENCES", 50)
        parts = unet(x, 500, text).sample
    assert max(seen) == 50
    torch.testing.assert_close(parts, whole)
