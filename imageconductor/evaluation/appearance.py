"""Metrics of the frames: SSIM of the first one, CLIP similarities of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # mean of the pixels that CLIP was trained on
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def ssim(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Structural similarity of two images (H, W, 3), at most 1, with torchmetrics' 11x11 Gaussian window.

    Raises:
        ValueError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ValueError("SSIM needs torchmetrics: pip install -e '.[metrics]'") from error
    ours, other = (
        torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None].double() / 255 for x in (image, reference)
    )
    value: Any = structural_similarity_index_measure(ours, other, data_range=1.0)
    return float(value)


class ClipScorer:
    """CLIP similarities of a video: between the prompt and each frame, and between each frame and the next.

    Frames are resized (bicubic, shorter side) and centre-cropped to the network's size, as CLIP was trained.

    Args:
        name: Folder or hub name of a CLIP model with tokenizer, e.g. openai/clip-vit-large-patch14.
        device: Device of the network.

    Raises:
        FileNotFoundError: There is no such model.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        from transformers import AutoTokenizer, CLIPModel

        try:
            loaded: Any = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            model, found = loaded
            if missing := sorted(found["missing_keys"]):  # transformers would fill them at random.
                raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(f"clip: no CLIP model with tokenizer at {name}: {reason}") from error
        self.device = torch.device(device)
        self.model: Any = model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8], prompt: str) -> tuple[float, float]:
        """Text similarity and frame consistency of frames (T, H, W, 3): mean cosines in [-1, 1]."""
        side = self.model.config.vision_config.image_size
        height, width = frames.shape[1:3]
        scale = side / min(height, width)
        size = (max(side, round(height * scale)), max(side, round(width * scale)))
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).permute(0, 3, 1, 2).float() / 255
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = pixels[..., top : top + side, left : left + side]
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (_CLIP_MEAN, _CLIP_STD))
        vision = self.model.vision_model(pixel_values=(pixels - mean) / std).pooler_output
        images = F.normalize(self.model.visual_projection(vision), dim=-1)
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [prompt], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        text = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        words = F.normalize(self.model.text_projection(text), dim=-1)
        return float((images @ words.T).mean()), float((images[1:] * images[:-1]).sum(-1).mean())
